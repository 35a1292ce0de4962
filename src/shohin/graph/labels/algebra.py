"""How labels combine: elementwise operations, reductions, and contractions of activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.core import Array, Labels, axes_of, line


@dataclass
class _Operand:
    """An argument in the space of all axes.

    Args:
        value: the argument.
        axes: its own axis -> axis of the space, for axes of size above 1.
        planes: its planes, in the space.
    """

    value: Any
    axes: dict[int, int]
    planes: list[Array]

    @property
    def own(self) -> set[int]:
        return set(self.axes.values())

    @property
    def free(self) -> dict[int, int]:
        """Axis of the space -> own axis, for axes of a parameter that have no labels yet."""
        bound = self.value.bound if isinstance(self.value, Parameter) else set(self.axes)
        return {place: axis for axis, place in self.axes.items() if axis not in bound}


def _operand(context: Context, value: Any, places: Sequence[int], rank: int) -> _Operand:
    """An argument whose axis i lies at ``places[i]``."""
    if isinstance(value, Parameter):
        source: Sequence[Array] = [p for p in (context.classes.find(p) for p in value.planes) if p.any()]
    else:
        source = context.labels(value).planes
    planes = []
    for plane in source:
        order = np.argsort(places, kind="stable")
        moved = plane.transpose(order)
        shape = [1] * rank
        for axis in order:
            shape[places[axis]] = plane.shape[axis]
        planes.append(moved.reshape(shape))
    return _Operand(value, {a: p for a, p in enumerate(places) if value.shape[a] > 1}, planes)


def meet(context: Context, node: fx.Node, operands: Sequence[tuple[Any, Sequence[int]]], shape: Sequence[int]) -> Labels:
    """Labels of a product or sum of tensors in a space of axes: labels that meet are united.

    Args:
        operands: (argument, for each of its axes its place in the space).
        shape: of the space; an operand may have size 1 where it broadcasts, which asks for nothing.

    A plane that varies on fewer axes than the one it meets (a gate of one value per head, met by head x dim) is linked: its
    label goes when all it meets go.
    """
    rank = len(shape)
    items = [_operand(context, value, places, rank) for value, places in operands]
    for axes in _components(items):
        if not any(set(axes_of(p)) == axes for item in items for p in item.planes):
            _factor(context, items, axes)
    planes = [_component(context, node, items, axes, rank) for axes in _components(items)]
    found = [p for p in planes if p is not None]
    covered = {d for p in found for d in axes_of(p)} | {d for axes in _components(items) for d in axes}
    for place in range(rank):
        owners = [item for item in items if place in item.own]
        if place in covered or not any(place in item.free for item in owners):
            continue
        if all(place in item.free for item in owners):
            fresh = context.classes.fresh(shape[place])
            for item in owners:
                context.bind(item.value, item.free[place], fresh)
            found.append(line(place, fresh, rank))
        else:
            for item in owners:
                if place in item.free:
                    context.bind(item.value, item.free[place], None)
    return context.tidy(found, shape)


def _components(items: Sequence[_Operand]) -> list[set[int]]:
    """Sets of axes that planes tie together."""
    found: list[set[int]] = []
    for plane in (p for item in items for p in item.planes):
        axes = set(axes_of(plane))
        if not axes:
            continue
        touching = [s for s in found if s & axes]
        found = [s for s in found if not s & axes] + [axes.union(*touching)]
    return sorted(found, key=min)


def _factor(context: Context, items: Sequence[_Operand], axes: set[int]) -> None:
    """Planes that overlap without one that holds all axes (head x dim and head x state) become one plane for each axis.

    Nothing is lost: a tensor loses whole slices only, and what goes with a slice has a label of its own.
    """
    for item in items:
        out: list[Array] = []
        for plane in item.planes:
            mine = axes_of(plane)
            if len(mine) < 2 or not axes & set(mine):
                out.append(plane)
                continue
            context.classes.grids.append(plane.reshape([plane.shape[d] for d in mine]))
            out.extend(derived(context, plane, [d for d in mine if d != axis]) for axis in mine)
        item.planes = out


def _component(context: Context, node: fx.Node, items: Sequence[_Operand], axes: set[int], rank: int) -> Array | None:
    """The plane of the result over ``axes``; None if nothing can go there."""
    mine = [[p for p in item.planes if axes & set(axes_of(p))] for item in items]
    every = [p for planes in mine for p in planes]
    finest = max(every, key=lambda p: (len(axes_of(p)), p.any()))
    for item, planes in zip(items, mine, strict=True):
        here = axes & item.own
        unlabelled = here - {d for p in planes for d in axes_of(p)}
        free = {place: axis for place, axis in item.free.items() if place in here}
        if free and not planes and here == axes == set(free):
            _bind_together(item.value, free, finest)
            continue
        for place, axis in free.items():
            fresh = context.classes.fresh(item.value.shape[axis])
            context.bind(item.value, axis, fresh)
            planes.append(line(place, fresh, rank))
        for axis in unlabelled - set(free):  # whole along this axis: nothing that differs along it can go
            if not planes:
                context.freeze(node, "a prunable axis meets a whole one", finest)
                return None
            context.classes.unite(finest, finest.take([0], axis))
        for plane in planes:
            if plane is not finest:
                _tie(context, plane, finest)
    return context.classes.find(finest)


def _bind_together(parameter: Parameter, free: dict[int, int], plane: Array) -> None:
    """A parameter that had no labels takes those of a plane, over several axes at once."""
    places = sorted(free)
    order = sorted(range(len(places)), key=lambda i: free[places[i]])
    squeezed = plane.squeeze(axis=tuple(d for d in range(plane.ndim) if d not in free)).transpose(order)
    shape = [1] * len(parameter.shape)
    for place in places:
        shape[free[place]] = parameter.shape[free[place]]
    parameter.planes.append(squeezed.reshape(shape))
    parameter.bound.update(free.values())


def _tie(context: Context, coarse: Array, fine: Array) -> None:
    """Labels at equal positions become one class; a label that meets a whole line goes when all of the line does."""
    axes = axes_of(coarse)
    if axes == axes_of(fine):
        context.classes.unite(coarse, fine)
        return
    rest = [d for d in range(fine.ndim) if d not in axes]
    lines = fine.transpose([*axes, *rest]).reshape(int(np.prod([fine.shape[d] for d in axes])), -1)
    context.classes.link(coarse.reshape(-1), list(lines))


def merge(context: Context, node: fx.Node, *values: Any) -> Labels:
    """Labels of an elementwise result of arguments that broadcast; numbers are neutral."""
    tensors = [v for v in values if isinstance(v, (Labels, Parameter, torch.Tensor))]
    shape = np.broadcast_shapes(*[tuple(v.shape) for v in tensors])
    operands = [(v, range(len(shape) - len(v.shape), len(shape))) for v in tensors]
    if len(tensors) == 1 and isinstance(tensors[0], Labels):
        return context.labels(tensors[0])
    return meet(context, node, operands, shape)


def reduce(context: Context, x: Labels, axes: Iterable[int], *, keep: bool, changes: bool) -> Labels:
    """Labels of a reduction over ``axes``: what varies along them and on others gets a derived label, gone when all are.

    Args:
        changes: True if what stays depends on how much was there (a mean), so that a cut is not a multiplication by zero.
    """
    gone = set(axes)
    out = []
    for plane in x.planes:
        mine = axes_of(plane)
        inside = [d for d in mine if d in gone]
        if inside and changes:
            context.normalized.append(plane)
        if len(inside) < len(mine):
            if inside:
                plane = derived(context, plane, inside)
            out.append(plane)
    shape = tuple(1 if d in gone else n for d, n in enumerate(x.shape))
    if not keep:
        left = [d for d in range(len(shape)) if d not in gone]
        out = [p.reshape([p.shape[d] for d in left]) for p in out]
        shape = tuple(shape[d] for d in left)
    return context.tidy(out, shape)


def derived(context: Context, plane: Array, axes: Sequence[int]) -> Array:
    """A plane of size 1 along ``axes``, whose labels go when all of their line do."""
    rest = [d for d in range(plane.ndim) if d not in axes]
    shape = [1 if d in axes else n for d, n in enumerate(plane.shape)]
    fresh = context.classes.fresh(int(np.prod(shape)))
    lines = plane.transpose([*rest, *axes]).reshape(len(fresh), -1)
    context.classes.link(fresh, list(lines))
    return context.classes.find(fresh).reshape(shape)


def contract(context: Context, node: fx.Node, operands: Sequence[tuple[Any, str]], output: str, sizes: dict[str, int]) -> Labels | None:
    """Labels of an Einstein summation of two or more tensors: they meet, then the letters that the output lacks are summed.

    Args:
        operands: (argument, a letter for each of its axes).
        sizes: of the letters.

    Returns:
        None if a letter stands twice in one operand.
    """
    letters = output + "".join(dict.fromkeys(c for _, own in operands for c in own if c not in output))
    if any(len(set(own)) < len(own) for _, own in operands) or len(set(output)) < len(output):
        return None
    space = [sizes[c] for c in letters]
    x = meet(context, node, [(v, [letters.index(c) for c in own]) for v, own in operands], space)
    summed = [i for i, c in enumerate(letters) if c not in output]
    alone = [i for i in summed if sum(letters[i] in own for _, own in operands) == 1]
    return reduce(context, x, summed, keep=False, changes=bool(set(alone) & set(x.varying)))
