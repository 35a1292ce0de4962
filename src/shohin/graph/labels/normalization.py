"""Normalizations: their affine parameters follow the axis; those that compute statistics over it are noted."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shohin.graph.labels.algebra import meet
from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.core import Array, Labels, axes_of, rigid
from shohin.graph.labels.rules import rule
from shohin.program import family


def _channels(x: Labels) -> Array | None:
    return x.along(1) if 1 in x.varying else None


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Four vectors along axis 1. Other axes are treated alike; where statistics are computed over them, they are normalized."""
    x = context.labels(args[0])
    if len(args) > 5 and args[5] is True and family(node) in ("batch_norm", "instance_norm"):
        context.normalized.extend(p for p in x.planes if axes_of(p) != (1,))
        if any(len(axes_of(p)) > 1 for p in x.planes):
            x = context.collapse(x, [0, *range(2, len(x.shape))])
    else:
        x = context.collapse(x, [0, *range(2, len(x.shape))])
    for value in args[1:5]:
        context.bind(value, 0, _channels(x))
    x = context.labels(x)
    return x if isinstance(node.meta["val"], torch.Tensor) else [x, rigid((0,)), rigid((0,))]


@rule("group_norm")
def group_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Statistics over each group of channels: whole groups can go, or the same positions of every group."""
    x, groups = context.labels(args[0]), args[1]
    x = context.collapse(x, [0, *range(2, len(x.shape))])
    if 1 in x.varying and groups < x.shape[1]:
        grid = x.along(1).reshape(groups, -1)
        if groups > 1 and grid.all():
            context.classes.grids.append(grid)
        else:
            context.classes.unite(grid, grid[:1])
        x = context.labels(x)
        context.normalized.extend(x.planes)
    for value in args[2:4]:
        context.bind(value, 0, _channels(x))
    return context.labels(x)


@rule("layer_norm", "rms_norm")
def layer_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Statistics over the trailing axes: removing a unit changes them, so the axis is noted as normalized."""
    x = context.labels(args[0])
    rank, normalized = len(x.shape), len(args[1])
    context.normalized.extend(p for p in x.planes if any(n > 1 for n in p.shape[rank - normalized :]))
    affine = [v for v in args[2:4] if isinstance(v, (Parameter, Labels))]
    return meet(context, node, [(x, range(rank)), *((v, range(rank - normalized, rank)) for v in affine)], x.shape)


@rule("_weight_norm")
def weight_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``v * (g / norm of v over all axes but one)``."""
    context.normalized.extend(context.labels(args[0]).planes)
    rank = len(args[0].shape)
    return meet(context, node, [(args[0], range(rank)), (args[1], range(rank))], args[0].shape)
