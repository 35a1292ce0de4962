"""Data movement: the operator itself runs on the label tensor, so its index mapping needs no rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.algebra import merge
from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.core import Array, Classes, Labels, axes_of, expanded, from_tensor, line
from shohin.graph.labels.rules import rule
from shohin.program import concrete, family, shape_of
from shohin.program.nodes import argument, arguments, flatten, run

MOVEMENT = [
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "cat",
    "concat",
    "stack",
    "split",
    "split_with_sizes",
    "chunk",
    "slice",
    "select",
    "unbind",
    "squeeze",
    "unsqueeze",
    "repeat",
    "repeat_interleave",
    "movedim",
    "swapaxes",
    "narrow",
    "roll",
    "flip",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "tile",
    "view_as",
    "reshape_as",
    "index_select",
    "index",
    "adjoint",
    "mT",
    "hstack",
    "vstack",
    "numpy_T",
    "dstack",
    "column_stack",
    "fliplr",
    "flipud",
    "rot90",
    "diagonal",
    "unfold",
    "select_scatter",
    "slice_scatter",
    "hsplit",
    "vsplit",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "expand_copy",
    "moveaxis",
    "swapdims",
    "squeeze_copy",
    "contiguous",
    "concatenate",
    "broadcast_to",
    "ravel",
    "atleast_2d",
    "atleast_3d",
]
EXPAND = ("expand", "expand_as", "broadcast_to")
MOVEMENT += ["expand", "expand_as"]
#: how many of the first arguments are moved, where it is not one
MOVED = {"select_scatter": 2, "slice_scatter": 2}
#: movements that take an index tensor
INDEXING = frozenset(["index", "index_select", "repeat_interleave"])
#: movements that take the shape of their second argument
SHAPED = frozenset(["view_as", "reshape_as"])
#: movements that join tensors of one rank -> the default of the joined axis; None: it is a new one
JOINS = {"cat": 0, "concat": 0, "concatenate": 0, "stack": None}


@rule(*(name for name in MOVEMENT if name not in EXPAND))
def movement(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Runs the operator on labels, plane by plane. Index tensors keep their values where these are known."""
    if family(node) == "view" and isinstance(args[1], torch.dtype):  # the same bytes, read as numbers of another type
        x = context.labels(args[0])
        return x if shape_of(node) == x.shape else NotImplemented
    if family(node) in INDEXING and isinstance(args[0], Parameter):  # a table: its rows are chosen by number
        rows = range(len(args[1])) if family(node) == "index" else [args[1] % len(args[0].shape)] if len(args) > 2 else []
        context.fixed(args[0], [d for d in rows if d not in args[0].bound and not (family(node) == "index" and args[1][d] is None)])
    if family(node) in INDEXING and not _can_index(context, node, args):
        return NotImplemented
    moved = [v for v in flatten(args[: MOVED.get(family(node), 1)]) if isinstance(v, (Labels, Parameter, torch.Tensor))]
    if family(node) in JOINS:
        _alike(context, node, moved)
    if family(node) == "channel_shuffle":
        _groups(context, context.labels(args[0]), args[1])
    sources = {id(v): context.labels(v) for v in moved}
    if family(node) == "select_scatter":  # what is put in lacks the axis
        sources[id(args[1])] = _with_axis(sources[id(args[1])], args[2] % len(args[0].shape))
    shapes = [tuple(concrete(s) for s in t.shape) for t in flatten(node.meta["val"])]
    results: list[list[Array]] = [[] for _ in shapes]
    for planes in _layers(context, sources):
        tensors = {key: expanded(plane, sources[key].shape) for key, plane in planes.items()}
        if family(node) == "select_scatter":
            tensors[id(args[1])] = tensors[id(args[1])].squeeze(args[2] % len(args[0].shape))
        values = flatten(move(node, [_moved(context, a, tensors) for a in args]))
        for found, value in zip(results, values, strict=True):
            found.append(from_tensor(value))
    out = [context.tidy(found, shape) for found, shape in zip(results, shapes, strict=True)]
    if family(node) in SHAPED:
        return _shaped(context, node, out[0], args[1])
    return out[0] if isinstance(node.meta["val"], torch.Tensor) else out


@rule(*EXPAND)
def expand(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """An axis of size 1 that is repeated may be repeated less often: it gets labels of its own. The batch never does."""
    if family(node) == "expand_as":
        return merge(context, node, *args)
    moved = movement(context, node, args)
    sizes = node.meta["val"].shape
    lead = len(sizes) - len(args[0].shape)
    repeated = [d for d, n in enumerate(sizes) if isinstance(n, int) and n > 1 and d >= lead and args[0].shape[d - lead] == 1]
    fresh = [line(d, context.classes.fresh(int(sizes[d])), len(sizes)) for d in repeated]
    return context.tidy([*moved.planes, *fresh], moved.shape)


def _shaped(context: Context, node: fx.Node, x: Labels, other: Any) -> Labels:
    """Both must keep as much of each axis: the same indices, unless asking for these would tie all of an axis together.

    That happens where halves of a table are interleaved and take the table's own shape (rotary angles): the indices that go
    differ, their number does not, and the rewriting checks it.
    """
    y = context.labels(other)
    if any(len(axes_of(p)) > 1 for p in (*x.planes, *y.planes)):
        return merge(context, node, x, other)
    for axis in range(len(x.shape)):
        a, b = x.plane(axis), y.plane(axis)
        if a.size > 1 and b.size > 1:
            if not _would_be_one(a.reshape(-1), b.reshape(-1)):
                context.classes.unite(a, b)
        elif max(a.size, b.size) > 1:
            context.freeze(node, "a prunable axis meets a whole one", a if a.size > 1 else b)
    return context.labels(x)


def _would_be_one(a: Array, b: Array) -> bool:
    """True if uniting the labels pair by pair leaves one class of them."""
    names, ends = np.unique(np.concatenate((a, b)), return_inverse=True)
    classes = Classes()
    labels = classes.fresh(len(names))
    classes.unite(labels[ends[: len(a)]], labels[ends[len(a) :]])
    return len(np.unique(classes.find(labels))) == 1


def _alike(context: Context, node: fx.Node, moved: list[Any]) -> None:
    """Tensors that are joined are alike along the other axes: what goes from one goes from all, or the result is not rectangular."""
    default = JOINS[family(node)]
    joined = None if default is None else argument(node, 1, node.kwargs.get("dim", default)) % len(moved[0].shape)
    axes = [d for d in range(len(moved[0].shape)) if d != joined]
    others = [context.labels(v) for v in moved if not isinstance(v, Parameter)]
    for value in (v for v in moved if isinstance(v, Parameter)):
        context.fixed(value, [d for d in axes if d not in value.bound and any(d not in x.varying for x in others)])
    for axis in axes:
        planes = [context.labels(v).plane(axis) for v in moved]
        for plane in planes[1:]:
            if plane.shape == planes[0].shape and (joined is None or plane.shape[joined] == 1):
                context.classes.unite(planes[0], plane)


def _groups(context: Context, x: Labels, groups: int) -> None:
    """Channels that are shuffled: whole groups can go, or the same positions of every group."""
    if 1 in x.varying:
        grid = x.along(1).reshape(groups, -1)
        if grid.all():
            context.classes.grids.append(grid)
        else:
            context.classes.unite(grid, grid[:1])


def _with_axis(x: Labels, axis: int) -> Labels:
    return Labels(tuple(np.expand_dims(p, axis) for p in x.planes), (*x.shape[:axis], 1, *x.shape[axis:]))


def _layers(context: Context, sources: dict[int, Labels]) -> list[dict[int, Array]]:
    """Planes that move together: those of one tensor one by one; of several tensors those that share axes."""
    components: list[set[int]] = []
    for labels in sources.values():
        for plane in labels.planes:
            axes = set(axes_of(plane))
            components = [s for s in components if not s & axes] + [axes.union(*(s for s in components if s & axes))]
    layers = []
    for axes in sorted(components, key=min):
        layer = {}
        for key, labels in sources.items():
            mine = [p for p in labels.planes if set(axes_of(p)) & axes]
            plane = mine[0] if mine else np.zeros((1,) * len(labels.shape), np.int64)
            for other in mine[1:]:
                joined = context.classes.join(plane, other)
                if joined is None:
                    raise ValueError("two choices on axes that are joined")
                plane = joined
            layer[key] = plane
        layers.append(layer)
    return layers


def move(node: fx.Node, args: list[Any]) -> Any:
    """The operator on label tensors. Their strides are not those of the tensors, so a view may have to copy."""
    if family(node) == "view" and not isinstance(args[1], torch.dtype):
        return args[0].reshape(args[1])
    return run(node, args, node.kwargs)


def _moved(context: Context, value: Any, tensors: dict[int, torch.Tensor]) -> Any:
    """An argument as the operator needs it: labels for what is moved, zeros for an index that is not known."""
    if isinstance(value, (tuple, list)):
        return [_moved(context, v, tensors) for v in value]
    if id(value) in tensors:
        return tensors[id(value)]
    return torch.zeros(value.shape, dtype=torch.int64) if isinstance(value, (Labels, Parameter)) else value


def _can_index(context: Context, node: fx.Node, args: tuple[Any, ...]) -> bool:
    """False if an index that is not known selects along an axis on which labels vary (or as a mask)."""
    unknown = [v for v in flatten(args[1:]) if isinstance(v, (Labels, Parameter))]
    if not unknown:
        return True
    if family(node) == "repeat_interleave":
        return False
    if family(node) == "index":
        places = [i for i, v in enumerate(args[1]) if isinstance(v, (Labels, Parameter))]
        if any(arguments(node)[1][i].meta["val"].dtype == torch.bool for i in places):
            return False
    else:
        places = [args[1] % len(args[0].shape)]
    return not set(places) & set(context.labels(args[0]).varying)
