"""Normalizations: their affine parameters follow the axis; those that compute statistics over it are noted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.context import Context, Parameter, rule
from shohin.graph.labels.contraction import consume
from shohin.graph.labels.core import Labels, rigid


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Four vectors along axis 1; statistics are over the other axes, so labels must vary on axis 1 only."""
    x = context.labels(args[0])
    x = context.collapse(x, range(2, len(x.shape)))
    if 0 in x.varying:
        return NotImplemented
    for value in args[1:5]:
        context.vector(value, x.along(1))
    x = context.labels(x)
    return x if isinstance(node.meta["val"], torch.Tensor) else [x, rigid((0,)), rigid((0,))]


@rule("group_norm")
def group_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Statistics over each group of channels: the same positions leave every group, so that groups stay equal."""
    x, groups = context.labels(args[0]), args[1]
    x = context.collapse(x, range(2, len(x.shape)))
    if 0 in x.varying:
        return NotImplemented
    if 1 in x.varying and groups < x.shape[1]:
        grid = x.along(1).reshape(groups, -1)
        context.classes.unite(grid, grid[:1])
        x = context.labels(x)
        context.normalized.append(x.data)
    for value in args[2:4]:
        context.vector(value, x.along(1))
    return context.labels(x)


@rule("layer_norm", "rms_norm")
def layer_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Statistics over the trailing axes: removing a unit changes them, so the axis is noted as normalized."""
    x = context.labels(args[0])
    normalized = len(args[1])
    affine = [v for v in args[2:4] if isinstance(v, (Parameter, Labels))]
    inside = [d for d in x.varying if d >= len(x.shape) - normalized]
    if inside:
        context.normalized.append(x.data)
    if not affine:
        return x
    if normalized != 1 and inside:
        return NotImplemented
    if not inside:
        for value in affine:
            context.vector(value, np.zeros(value.shape[0], np.int64) if len(value.shape) == 1 else np.zeros(1, np.int64))
    else:
        x, vector = consume(context, x, -1)
        if vector is not None:
            for value in affine:
                context.vector(value, vector)
            x = context.labels(x)
    return x
