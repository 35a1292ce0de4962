"""Data movement: sizes, bounds and places among the arguments."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.core import Array
from shohin.program import family
from shohin.program.nodes import argument, arguments
from shohin.surgery.follow.table import follow
from shohin.surgery.moves import evaluate
from shohin.surgery.rewritten import CannotRewrite
from shohin.surgery.work import Work, axis_of, set_argument, set_sizes


@follow("view", "reshape", "expand", "expand_copy", "broadcast_to")
def view(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """The sizes that stay."""
    labels = work.of(node)
    if labels is not None and not isinstance(arguments(node)[1], torch.dtype):
        set_sizes(work, node, copy, 1, work.shape(labels), labels.shape)


@follow("unflatten")
def unflatten(work: Work, node: fx.Node, copy: fx.Node) -> None:
    labels = work.of(node)
    if labels is not None:
        _, axis, sizes = arguments(node)[:3]
        start = axis % (len(labels.shape) - len(sizes) + 1)
        stop = start + len(sizes)
        set_sizes(work, node, copy, 2, work.shape(labels)[start:stop], labels.shape[start:stop])


@follow("squeeze", "squeeze_copy")
def squeeze(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """Takes the axes that had size 1, and not those that have it now."""
    source = work.of(node.args[0])
    if source is None:
        return
    axes = argument(node, 1, range(len(source.shape)))
    listed = {d % len(source.shape) for d in ([axes] if isinstance(axes, int) else axes)}
    if not any(len(kept) == 1 and d in listed for d, kept in work.kept(source).items()):
        return
    copy.target = torch.ops.aten.squeeze.dims
    copy.args = (copy.args[0], sorted(d for d in listed if source.shape[d] == 1))
    work.mended.append(node.name)


@follow("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "hsplit", "vsplit")
def pieces(work: Work, node: fx.Node, copy: fx.Node) -> None:
    pieces = work.graph.labels[node.name]
    if not isinstance(pieces, tuple):
        return
    axis = axis_of(node, 2, len(pieces[0].shape), int(family(node) == "hsplit"))
    before = [p.shape[axis] for p in pieces]
    wanted = [work.shape(p)[axis] for p in pieces]
    if wanted == before:
        return
    places = family(node) in ("tensor_split", "hsplit", "vsplit")
    if isinstance(node.args[1], (list, tuple)):
        set_argument(work, node, copy, 1, np.cumsum(wanted)[:-1].tolist() if places else wanted)
        return
    total = sum(wanted)
    if places:
        pass  # pieces as equal as can be have the same sizes again only by chance
    elif "chunk" in family(node):
        same = [len(c) for c in torch.arange(total).chunk(arguments(node)[1])]
        if same == wanted:
            return
    else:
        if wanted[0] and [min(wanted[0], total - i) for i in range(0, total, wanted[0])] == wanted:
            set_argument(work, node, copy, 1, wanted[0])
            return
    copy.target = torch.ops.aten.split_with_sizes.default
    copy.args = (copy.args[0], wanted, axis)
    copy.kwargs = {}
    work.mended.append(node.name)


@follow("slice")
def slice_(work: Work, node: fx.Node, copy: fx.Node) -> None:
    source = work.of(node.args[0])
    if source is None:
        return
    axis = axis_of(node, 1, len(source.shape))
    kept = work.kept(source).get(axis)
    if kept is None:
        return
    if argument(node, 4, 1) != 1:
        _strided(work, node, copy, axis, kept)
        return
    for position in (2, 3):
        value = argument(node, position)
        if isinstance(value, int):
            size = source.shape[axis]
            bound = value + size if value < 0 else value
            if bound < size:
                set_argument(work, node, copy, position, int((kept < bound).sum()))
        elif value is not None:
            raise CannotRewrite("a slice with a computed bound cannot follow")


def _strided(work: Work, node: fx.Node, copy: fx.Node, axis: int, kept: Array) -> None:
    """Every second index of what stays, where that is what stays of every second index; else these are listed."""
    source = work.of(node.args[0])
    bounds = (argument(node, 2), argument(node, 3))
    if source is None or not all(b is None or isinstance(b, int) for b in bounds):
        raise CannotRewrite("a slice with a computed bound cannot follow")
    taken = slice(*bounds, argument(node, 4))
    places = np.flatnonzero(np.isin(kept, np.arange(source.shape[axis])[taken]))
    if not np.array_equal(np.arange(len(kept))[taken], places):
        with copy.graph.inserting_before(copy):
            index = copy.graph.call_function(torch.tensor, (places.tolist(),))
        copy.target, copy.args, copy.kwargs = torch.ops.aten.index_select.default, (copy.args[0], axis, index), {}
        work.mended.append(node.name)


@follow("roll")
def roll(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """As much goes round the end as stays of it."""
    source = work.of(node.args[0])
    if source is None:
        return
    shifts, axes = list(arguments(node)[1]), argument(node, 2, [])
    for i, axis in enumerate(axes):
        size = source.shape[axis]
        kept = work.kept(source).get(axis % len(source.shape))
        if kept is not None and isinstance(shifts[i], int):
            shifts[i] = int((kept >= size - shifts[i] % size).sum()) - (len(kept) if shifts[i] < 0 else 0)
    set_argument(work, node, copy, 1, shifts)


@follow("channel_shuffle")
def channel_shuffle(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """As many groups as still have channels."""
    source, groups = work.of(node.args[0]), arguments(node)[1]
    kept = None if source is None else work.kept(source).get(1)
    if source is not None and kept is not None:
        set_argument(work, node, copy, 1, len(np.unique(kept // (source.shape[1] // groups))))


@follow("select")
def select(work: Work, node: fx.Node, copy: fx.Node) -> None:
    source = work.of(node.args[0])
    if source is None:
        return
    axis = axis_of(node, 1, len(source.shape))
    kept = work.kept(source).get(axis)
    if kept is not None:
        index = arguments(node)[2] % source.shape[axis]
        place = np.flatnonzero(kept == index)
        if not len(place):
            raise CannotRewrite("the selected index is removed")
        set_argument(work, node, copy, 2, int(place[0]))


@follow("narrow")
def narrow(work: Work, node: fx.Node, copy: fx.Node) -> None:
    source, labels = work.of(node.args[0]), work.of(node)
    if source is None or labels is None:
        return
    axis = axis_of(node, 1, len(source.shape))
    kept = work.kept(source).get(axis)
    if kept is not None:
        set_argument(work, node, copy, 2, int((kept < arguments(node)[2]).sum()))
        set_argument(work, node, copy, 3, work.shape(labels)[axis])


@follow("pad", "constant_pad_nd")
def pad(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """As many constants as stay on each side."""
    labels = work.of(node)
    if labels is None:
        return
    amounts = list(arguments(node)[1])
    for axis, kept in work.kept(labels).items():
        place = 2 * (len(labels.shape) - 1 - axis)
        if place + 1 < len(amounts):
            before, after = amounts[place], amounts[place + 1]
            amounts[place] = int((kept < before).sum())
            amounts[place + 1] = int((kept >= labels.shape[axis] - after).sum())
    set_argument(work, node, copy, 1, amounts)


@follow("index", "index_select")
def index(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """A known index along an axis that shrinks counts what stays."""
    source, labels = work.of(node.args[0]), work.of(node)
    if source is None or labels is None:
        return
    listed = arguments(node)[1] if family(node) == "index" else [arguments(node)[2]]
    axes = range(len(listed)) if family(node) == "index" else [arguments(node)[1] % len(source.shape)]
    for axis, known in zip(axes, listed, strict=True):
        kept = work.kept(source).get(axis)
        if not isinstance(known, fx.Node) or kept is None:
            continue
        values = evaluate(work, known)
        if values.dim() != 1 or sum(isinstance(n, fx.Node) for n in listed) > 1:
            raise CannotRewrite("an index of several axes along a prunable axis cannot follow")
        places = np.searchsorted(kept, values.numpy() % source.shape[axis])
        stays = np.isin(values.numpy() % source.shape[axis], kept)
        with copy.graph.inserting_before(copy):
            constant = copy.graph.call_function(torch.tensor, (places[stays].tolist(),))
        new = [constant if i is known else (work.use(i, node) if isinstance(i, fx.Node) else i) for i in listed]
        copy.args = (copy.args[0], new) if family(node) == "index" else (copy.args[0], copy.args[1], new[0])
        work.mended.append(node.name)


@follow("slice_scatter")
def slice_scatter(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """Bounds count what stays."""
    source = work.of(node)
    if source is None:
        return
    axis = axis_of(node, 2, len(source.shape))
    kept = work.kept(source).get(axis)
    if kept is None:
        return
    for position in (3, 4):
        value = argument(node, position)
        if isinstance(value, int):
            bound = value + source.shape[axis] if value < 0 else value
            if bound < source.shape[axis]:
                set_argument(work, node, copy, position, int((kept < bound).sum()))


@follow("repeat_interleave")
def repeat_interleave(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """The output size, where the call states it."""
    labels = work.of(node)
    if labels is not None and isinstance(node.kwargs.get("output_size"), int):
        axis = axis_of(node, 2, len(labels.shape))
        copy.kwargs = {**copy.kwargs, "output_size": work.shape(labels)[axis]}
        if work.shape(labels)[axis] != labels.shape[axis]:
            work.mended.append(node.name)
