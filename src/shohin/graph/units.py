"""Unit groups: what can be removed together, and which of these are interchangeable.

A unit is the smallest set of label classes whose removal leaves every tensor rectangular. Classes that lie in tensors with
one varying axis are units by themselves. Where labels vary on two axes (head x dim) a single class cannot go alone: a closure
completes slices, so that a head and "dim d of every head" become units of two groups that can be chosen independently.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shohin.graph.labels.core import Array


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """The interchangeable units of one width decision.

    Args:
        name: the address of the parameter that produces the axis, with ``#2``... where it produces several.
        units: label classes of each unit.
        slices: parameter name -> {axis: int64 array (units, indices per unit)}.
        normalized: True if a normalization computes statistics over the axis (removal changes the kept outputs).
        parameters: parameter elements that one unit removes, with all other groups at full width.
        bytes: of these.
        macs: multiply-accumulates of one sample that one unit removes, with all other groups at full width.
        multiple: the number of units that stays must be divisible by it. Units are closed (a block of PixelShuffle, the same
            position of every group), so this is 1 unless a rule asks for more.
    """

    name: str
    units: tuple[Array, ...]
    slices: Mapping[str, Mapping[int, Array]]
    normalized: bool
    parameters: int
    bytes: int = 0
    macs: float = 0.0
    multiple: int = 1

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.units)

    def __repr__(self) -> str:
        where = ", ".join(f"{n}[{a}]" for n, axes in self.slices.items() for a in axes)
        return f"UnitGroup({self.name!r}, {self.size} units, {self.parameters} parameters each, slices {where})"


def kept_indices(planes: Iterable[Array], gone: np.ndarray) -> dict[int, Array] | None:
    """The indices that stay along each axis that shrinks when the classes marked in ``gone`` are removed.

    Args:
        planes: of one tensor.

    Returns:
        None if what stays is not rectangular, or nothing stays.
    """
    kept: dict[int, Array] = {}
    for plane in planes:
        found = _kept(plane, gone)
        if found is None:
            return None
        for axis, indices in found.items():
            kept[axis] = indices if axis not in kept else np.intersect1d(kept[axis], indices)
    return kept if all(len(i) for i in kept.values()) else None


def _kept(data: Array, gone: np.ndarray) -> dict[int, Array] | None:
    stays = ~gone[data]
    if stays.all():
        return {}
    kept: dict[int, Array] = {}
    for axis in range(data.ndim):
        if data.shape[axis] > 1:
            other = tuple(d for d in range(data.ndim) if d != axis)
            line = stays.any(axis=other)
            if not line.any():
                return None
            if not line.all():
                kept[axis] = np.flatnonzero(line)
    rest = stays
    for axis, indices in kept.items():
        rest = rest.take(indices, axis)
    return kept if kept and rest.all() else None


class Structure:
    """The tensors and links that units must respect.

    Units are interchangeable only if each tensor loses as much with one as with another: halves of a split are two groups,
    so that neither can become empty and every size is linear in the numbers of units.
    """

    def __init__(self, arrays: Iterable[Array], links: Sequence[tuple[int, Array]]) -> None:
        distinct: dict[tuple[bytes, tuple[int, ...]], Array] = {}
        for array in arrays:
            squeezed = array.squeeze()
            distinct.setdefault((squeezed.tobytes(), squeezed.shape), squeezed)
        self.grids = [a for a in distinct.values() if a.ndim >= 2]
        self.vectors = [a.reshape(-1) for a in distinct.values() if a.ndim < 2 and a.any()]
        self.links = [(p, frozenset(m.tolist())) for p, m in links]
        top = max((int(a.max()) for a in (*distinct.values(), *(np.append(m, p) for p, m in links))), default=0)
        self._gone = np.zeros(top + 1, bool)
        self._grids_of: dict[int, list[int]] = defaultdict(list)
        for index, grid in enumerate(self.grids):
            for label in np.unique(grid).tolist():
                self._grids_of[label].append(index)
        self._vectors_of: dict[int, list[int]] = defaultdict(list)
        for index, vector in enumerate(self.vectors):
            for label in np.unique(vector).tolist():
                self._vectors_of[label].append(index)
        self._links_of: dict[int, list[int]] = defaultdict(list)
        for index, (parent, members) in enumerate(self.links):
            for label in {parent, *members}:
                self._links_of[label].append(index)

    @property
    def complex_labels(self) -> set[int]:
        """Labels that cannot be units by themselves without looking."""
        return set(self._grids_of) | set(self._links_of)

    def units(self) -> list[frozenset[int]]:
        """The removable sets of labels that grids and links tie together: closures of slices of grids and of links' labels.

        Large slices come first. Where the first slices along an axis close to sets that are known already, the others that
        lie inside known ones are left out: slices of one axis are alike.
        """
        found: dict[frozenset[int], None] = {}
        known: dict[int, list[frozenset[int]]] = defaultdict(list)
        for seeds in self._seeds():
            nothing_new = 0
            for seed in seeds:
                if nothing_new >= 3 and any(seed <= unit for unit in known[min(seed)]):
                    continue
                unit = self.close(seed)
                if unit is None or unit in found:
                    nothing_new += 1
                    continue
                nothing_new = 0
                found[unit] = None
                for label in unit:
                    known[label].append(unit)
        return list(found)

    def _seeds(self) -> list[list[frozenset[int]]]:
        """Where a closure may start: the slices of each axis of the grids, and the labels of links."""
        families: list[list[frozenset[int]]] = []
        for grid in self.grids:
            for axis in range(grid.ndim):
                rows = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)
                families.append([frozenset(row) for row in rows.tolist()])
        families.sort(key=lambda seeds: -max(map(len, seeds)))
        in_grids = set(self._grids_of)
        loose = (label for parent, members in self.links for label in (parent, *sorted(members)) if label not in in_grids)
        return [*families, [frozenset((label,)) for label in dict.fromkeys(loose)]]

    def close(self, seed: Iterable[int]) -> frozenset[int] | None:
        """The smallest removable set that holds ``seed``; None if it would remove a frozen label or a whole tensor."""
        gone = set(seed)
        todo = set(gone)
        try:
            while todo:
                if 0 in gone:
                    return None
                self._gone[list(todo)] = True
                touched_links = {i for label in todo for i in self._links_of.get(label, ())}
                touched_grids = {i for label in todo for i in self._grids_of.get(label, ())}
                todo = set()
                for i in touched_links:
                    parent, members = self.links[i]
                    if parent in gone:
                        todo |= members - gone
                    elif members <= gone:
                        todo.add(parent)
                self._gone[list(todo)] = True
                for i in sorted(touched_grids):
                    more = self._complete(self.grids[i])
                    if more is None:
                        return None
                    todo |= more
                    self._gone[list(more)] = True
                todo -= gone
                gone |= todo
            touched = {i for label in gone for i in self._vectors_of.get(label, ())}
            return None if any(self._gone[self.vectors[i]].all() for i in touched) else frozenset(gone)
        finally:
            self._gone[:] = False

    def _complete(self, grid: Array) -> set[int] | None:
        """What must go too so that the grid stays rectangular, choosing the axis that costs least."""
        mask = self._gone[grid]
        if mask.all():
            return None
        axes = range(grid.ndim)
        others = [tuple(d for d in axes if d != axis) for axis in axes]
        partial = mask.copy()
        full = []
        for axis in axes:
            line = mask.all(axis=others[axis])
            full.append(line)
            if line.any():
                shape = [1] * grid.ndim
                shape[axis] = -1
                partial &= ~line.reshape(shape)
        if not partial.any():
            return set()
        best: set[int] | None = None
        for axis in axes:
            line = partial.any(axis=others[axis])
            if (line | full[axis]).all():
                continue
            lost = grid.take(np.flatnonzero(line), axis)
            more = set(lost[~self._gone[lost]].tolist())
            if best is None or len(more) < len(best):
                best = more
        return best

    def signature(self, unit: frozenset[int]) -> tuple[tuple[int, int, int], ...]:
        """(grid, axis, slices) of what the unit removes: units of one group remove alike."""
        out = []
        for i in sorted({i for label in unit for i in self._grids_of.get(label, ())}):
            mask = np.isin(self.grids[i], list(unit))
            for axis in range(mask.ndim):
                count = int(mask.all(axis=tuple(d for d in range(mask.ndim) if d != axis)).sum())
                if count:
                    out.append((i, axis, count))
        return tuple(out)


def find_groups(
    planes: Mapping[str, Sequence[Array]],
    structure: Structure,
    normalized: set[int],
    sizes: Mapping[str, int],
    itemsize: Mapping[str, int],
    produced: set[tuple[str, int]],
) -> list[UnitGroup]:
    """All unit groups, in the order in which parameters produce them.

    Args:
        planes: parameter name -> settled label planes, in program order.
        normalized: labels over which a normalization computes statistics.
        sizes: elements of each parameter that is counted (buffers are not).
        itemsize: bytes of one element.
        produced: (parameter, axis) of every axis that a weight produces; groups are named after these.
    """
    lines = _lines(planes)
    index = _Index([labels for _, _, labels in lines], structure.vectors)
    complex_labels = structure.complex_labels
    units: list[frozenset[int]] = [frozenset((label,)) for label in index.placed if label not in complex_labels]
    units += structure.units()
    groups: dict[tuple[object, ...], list[frozenset[int]]] = defaultdict(list)
    for unit in units:
        if any(label in index.first for label in unit):
            groups[index.signature(unit), structure.signature(unit) if unit & complex_labels else ()].append(unit)
    named: dict[str, int] = defaultdict(int)
    out = []
    for members in sorted(groups.values(), key=lambda m: index.order(m[0])):
        if not _disjoint(members):
            continue
        members.sort(key=index.order)
        slices = _slices(members, lines, index, planes)
        made = [name for name, axes in slices.items() if any((name, axis) in produced for axis in axes)]
        if made:
            named[made[0]] += 1  # a single unit counts too: names stay when a cut leaves one
        if len(members) < 2 or not slices:
            continue
        base = next(iter(made), max(slices, key=lambda n: sizes.get(n, 0)))  # a computed weight: its largest part
        named[base] += not made
        removed = {n: _removed(planes[n], sizes[n], members[0]) for n in slices if n in sizes}
        out.append(
            UnitGroup(
                name=base if named[base] == 1 else f"{base}#{named[base]}",
                units=tuple(np.array(sorted(u), np.int64) for u in members),
                slices=slices,
                normalized=bool(normalized & members[0]),
                parameters=sum(removed.values()),
                bytes=sum(count * itemsize[n] for n, count in removed.items()),
            )
        )
    return out


Line = tuple[str, int, Array]


def _lines(planes: Mapping[str, Sequence[Array]]) -> list[Line]:
    """(parameter, axis, label of each index) of every parameter axis with labels.

    An axis of a plane with several varying axes gets the label of an index only where the whole slice has one label;
    the rest is decided by the grid.
    """
    lines = []
    for name, arrays in planes.items():
        for array in arrays:
            for axis in range(array.ndim):
                if array.shape[axis] > 1 and sum(n > 1 for n in array.shape) == 1:
                    lines.append((name, axis, array.reshape(-1)))
    return lines


def _removed(arrays: Sequence[Array], size: int, unit: frozenset[int]) -> int:
    """Elements of a parameter that go with a unit, in any of its planes."""
    labels = list(unit)
    stays = [~np.isin(a, labels) for a in arrays]
    if all(s.all() for s in stays):
        return 0
    whole = np.broadcast_shapes(*(s.shape for s in stays))
    left = stays[0] if len(stays) == 1 else np.logical_and.reduce([np.broadcast_to(s, whole) for s in stays])
    return size - int(left.sum()) * (size // left.size)


class _Index:
    """Where labels lie: in the axes of parameters (``lines``) and in other tensors (``vectors``)."""

    def __init__(self, lines: Sequence[Array], vectors: Sequence[Array]) -> None:
        arrays = [*lines, *vectors]
        labels = np.concatenate([np.zeros(0, np.int64), *arrays])
        numbers = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])
        places = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(a)) for a in arrays)])
        keys, counts = np.unique(labels * max(len(arrays), 1) + numbers, return_counts=True)
        self._visits = np.stack([keys % max(len(arrays), 1), counts], 1)
        label, start = np.unique(keys // max(len(arrays), 1), return_index=True)
        self._span = dict(zip(label.tolist(), pairwise([*start.tolist(), len(keys)]), strict=True))
        count = sum(len(a) for a in lines)
        found, at = np.unique(labels[:count], return_index=True)
        where = np.stack([numbers[at], places[at]], 1)
        self.first = {label: (number, place) for label, (number, place) in zip(found.tolist(), where.tolist(), strict=True) if label}
        self.placed = sorted(self.first, key=self.first.__getitem__)
        self._lines = lines

    def visits(self, label: int) -> Array:
        """(array, times) of every array that holds a label, by array."""
        start, stop = self._span.get(label, (0, 0))
        found: Array = self._visits[start:stop]
        return found

    def signature(self, unit: frozenset[int]) -> bytes:
        """What a unit takes from every array: interchangeable units take alike."""
        if len(unit) == 1:
            return self.visits(next(iter(unit))).tobytes()
        every = np.concatenate([self.visits(label) for label in sorted(unit)])
        numbers, inverse = np.unique(every[:, 0], return_inverse=True)
        return np.stack([numbers, np.bincount(inverse, every[:, 1]).astype(np.int64)], 1).tobytes()

    def order(self, unit: frozenset[int]) -> tuple[int, int, int]:
        """First place of a unit: parameter axis in program order, index, then distance to its second index there (a head,
        whose rows are neighbours, before "dim d of every head"). Nothing that depends on sizes, so that names survive a cut.
        """
        number, place = min((self.first[label] for label in unit if label in self.first), default=(len(self._lines), 0))
        if len(unit) == 1 or number == len(self._lines):
            return number, place, 0
        mine = np.flatnonzero(np.isin(self._lines[number], list(unit)))
        return number, place, int(mine[1] - place) if len(mine) > 1 else 0


def _disjoint(members: Sequence[frozenset[int]]) -> bool:
    return len(frozenset().union(*members)) == sum(map(len, members))


def _slices(
    members: Sequence[frozenset[int]], lines: Sequence[Line], index: _Index, planes: Mapping[str, Sequence[Array]]
) -> dict[str, dict[int, Array]]:
    """Parameter name -> {axis: (units, indices per unit)}, in program order."""
    labels = np.array(sorted(label for unit in members for label in unit), np.int64)
    owner = {label: i for i, unit in enumerate(members) for label in unit}
    owners = np.array([owner[label] for label in labels.tolist()], np.int64)
    touched = sorted({number for label in members[0] for number in index.visits(label)[:, 0].tolist() if number < len(lines)})
    out: dict[str, dict[int, Array]] = defaultdict(dict)
    for number in touched:
        name, axis, line = lines[number]
        at = np.minimum(np.searchsorted(labels, line), len(labels) - 1)
        places = np.flatnonzero(labels[at] == line)
        order = np.argsort(owners[at[places]], kind="stable")
        out[name][axis] = places[order].reshape(len(members), -1)
    for name, arrays in planes.items():
        for plane in (a for a in arrays if sum(n > 1 for n in a.shape) > 1 and np.isin(a, labels).any()):
            for axis in range(plane.ndim):
                found = _whole_slices(plane, axis, members)
                if found is not None:
                    out[name][axis] = found
    return {name: out[name] for name in planes if name in out}


def _whole_slices(plane: Array, axis: int, members: Sequence[frozenset[int]]) -> Array | None:
    """(units, indices) along an axis of a plane that varies on several: whole slices that go with each unit."""
    if plane.shape[axis] == 1:
        return None
    others = tuple(d for d in range(plane.ndim) if d != axis)
    rows = [np.flatnonzero(np.isin(plane, list(unit)).all(axis=others)) for unit in members]
    return np.array(rows, np.int64) if rows[0].size and len({len(r) for r in rows}) == 1 else None
