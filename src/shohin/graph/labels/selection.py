"""Choosing by value or by an index that is not known: along axes that are not prunable."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shohin.graph.labels.algebra import meet
from shohin.graph.labels.context import Context
from shohin.graph.labels.core import Labels
from shohin.graph.labels.rules import rule
from shohin.program import concrete, family
from shohin.program.nodes import argument

#: operator -> position of the axis among the arguments, and its default
ALONG = {"sort": (1, -1), "topk": (2, -1), "argsort": (1, -1), "kthvalue": (2, -1)}


@rule("sort", "topk", "argsort", "kthvalue")
def ordered(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Values in order along one axis, and their places."""
    x = context.labels(args[0])
    place, default = ALONG[family(node)]
    axis = argument(node, place, node.kwargs.get("dim", default))
    if isinstance(axis, bool) or axis % len(x.shape) in x.varying:
        return NotImplemented
    val = node.meta["val"]
    shapes = [tuple(concrete(s) for s in v.shape) for v in ([val] if isinstance(val, torch.Tensor) else val)]
    if any(len(s) != len(x.shape) for s in shapes):
        return NotImplemented
    found = [Labels(x.planes, s) for s in shapes]
    return found[0] if isinstance(val, torch.Tensor) else found


@rule("gather", "take_along_dim")
def gather(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Elements of one axis by an index tensor; the other axes of both are read side by side (``take_along_dim``: they broadcast)."""
    place = 1 if family(node) == "gather" else 2
    index = args[2] if place == 1 else args[1]
    x = context.labels(args[0])
    axis = args[place] % len(x.shape)
    beside = [(a, b) for d, (a, b) in enumerate(zip(x.shape, index.shape, strict=True)) if d != axis]
    if axis in x.varying or any(a != b and (place == 1 or 1 not in (a, b)) for a, b in beside):
        return NotImplemented
    rank = len(x.shape)
    space = tuple(n if d == axis else max(n, x.shape[d]) for d, n in enumerate(index.shape))
    source = Labels(x.planes, tuple(1 if d == axis else n for d, n in enumerate(x.shape)))
    return meet(context, node, [(source, range(rank)), (index, range(rank))], space)
