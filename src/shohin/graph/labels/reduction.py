"""Reductions, and operators that mix along one axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shohin.graph.labels.algebra import merge, reduce
from shohin.graph.labels.context import Context
from shohin.graph.labels.rules import rule
from shohin.program import family, shape_of

#: reductions -> position of the reduced axes among the arguments
REDUCTIONS = {
    "mean": 1,
    "sum": 1,
    "amax": 1,
    "amin": 1,
    "std": 1,
    "var": 1,
    "logsumexp": 1,
    "any": 1,
    "all": 1,
    "max": 1,
    "min": 1,
    "linalg_vector_norm": 2,
    "norm": 2,
    "std_mean": 1,
    "var_mean": 1,
    "frobenius_norm": 1,
    "prod": 1,
    "median": 1,
    "mode": 1,
}
#: what they give is a place along the axis, which would change its meaning
PLACES = {"argmax": 1, "argmin": 1}


@rule(*REDUCTIONS, *PLACES)
def reduction(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Reduction over some axes; over a prunable one what stays changes, and the axis is noted as normalized.

    ``max`` and ``min`` of two tensors are elementwise. Those that give places too (``max.dim``) mix only where nobody reads the places.
    """
    name = family(node)
    place = REDUCTIONS.get(name, 1)
    if name in ("max", "min") and len(args) > 1 and not isinstance(args[1], int):
        return merge(context, node, *args[:2])
    x = context.labels(args[0])
    dims = args[place] if len(args) > place else None
    whole = dims is None or isinstance(dims, bool) or dims == []
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    reduced = set(range(len(x.shape))) if whole else {d % len(x.shape) for d in listed}
    places = name in PLACES or any(family(user) == "getitem" and user.args[1] == 1 for user in node.users)
    if places and name not in ("std_mean", "var_mean") and reduced & set(x.varying):
        return NotImplemented
    single = isinstance(node.meta["val"], torch.Tensor)
    shape = shape_of(node) if single else tuple(node.meta["val"][0].shape)
    result = reduce(context, x, reduced, keep=len(shape) == len(x.shape), changes=True)
    return result if single else [result, result]


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Normalizes along one axis: what stays there changes when anything goes."""
    x = context.labels(args[0])
    plane = x.plane(args[1] % len(x.shape))
    if plane.size > 1:
        context.normalized.append(plane)
    return x


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def along_axis(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Mixes along one axis, which must not be prunable; ``cummax`` and ``cummin`` give places too."""
    x = context.labels(args[0])
    if args[1] % len(x.shape) in x.varying:
        return NotImplemented
    return x if isinstance(node.meta["val"], torch.Tensor) else [x, x]
