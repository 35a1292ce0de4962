"""Unit groups: what can be removed together, and which of these are interchangeable.

A unit is the smallest set of label classes whose removal leaves every tensor rectangular. Classes that lie in tensors with
one varying axis are units by themselves. Where labels vary on two axes (head x dim) a single class cannot go alone: a closure
completes slices, so that a head and "dim d of every head" become units of two groups that can be chosen independently.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
    """

    name: str
    units: tuple[Array, ...]
    slices: Mapping[str, Mapping[int, Array]]
    normalized: bool
    parameters: int

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.units)

    def __repr__(self) -> str:
        where = ", ".join(f"{n}[{a}]" for n, axes in self.slices.items() for a in axes)
        return f"UnitGroup({self.name!r}, {self.size} units, {self.parameters} parameters each, slices {where})"


def kept_indices(data: Array, gone: np.ndarray) -> dict[int, Array] | None:
    """The indices that stay along each varying axis when the classes marked in ``gone`` are removed.

    Returns:
        None if what stays is not rectangular, or nothing stays.
    """
    mask = gone[data]
    if not mask.any():
        return {}
    kept: dict[int, Array] = {}
    stays = ~mask
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

    def seeds(self) -> list[frozenset[int]]:
        """Slices of the grids, and the labels of links: where a closure may start."""
        found: dict[frozenset[int], None] = {}
        for grid in self.grids:
            for axis in range(grid.ndim):
                for index in range(grid.shape[axis]):
                    found[frozenset(np.unique(grid.take(index, axis)).tolist())] = None
        in_grids = set(self._grids_of)
        for parent, members in self.links:
            for label in (parent, *sorted(members)):
                if label not in in_grids:
                    found[frozenset((label,))] = None
        return list(found)

    def close(self, seed: Iterable[int]) -> frozenset[int] | None:
        """The smallest removable set that holds ``seed``; None if it would remove a frozen label or a whole tensor."""
        gone = set(seed)
        todo = set(gone)
        while todo:
            if 0 in gone:
                return None
            touched_links = {i for label in todo for i in self._links_of.get(label, ())}
            touched_grids = {i for label in todo for i in self._grids_of.get(label, ())}
            todo = set()
            for i in touched_links:
                parent, members = self.links[i]
                if parent in gone:
                    todo |= members - gone
                elif members <= gone:
                    todo.add(parent)
            for i in sorted(touched_grids):
                more = self._complete(self.grids[i], gone | todo)
                if more is None:
                    return None
                todo |= more
            todo -= gone
            gone |= todo
        emptied = any(gone.issuperset(self.vectors[i].tolist()) for i in {i for label in gone for i in self._vectors_of.get(label, ())})
        return None if emptied else frozenset(gone)

    @staticmethod
    def _complete(grid: Array, gone: set[int]) -> set[int] | None:
        """What must go too so that the grid stays rectangular, choosing the axis that costs least."""
        mask = np.isin(grid, list(gone))
        if mask.all():
            return None
        axes = range(grid.ndim)
        others = [tuple(d for d in axes if d != axis) for axis in axes]
        partial = mask.copy()
        full = []
        for axis in axes:
            line = mask.all(axis=others[axis])
            full.append(line)
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
            more = set(np.unique(grid.take(np.flatnonzero(line), axis)).tolist()) - gone
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
    produced: set[tuple[str, int]],
) -> list[UnitGroup]:
    """All unit groups, in the order in which parameters produce them.

    Args:
        planes: parameter name -> settled label planes, in program order.
        normalized: labels over which a normalization computes statistics.
        sizes: elements of each parameter that is counted (buffers are not).
        produced: (parameter, axis) of every axis that a weight produces; groups are named after these.
    """
    lines = _lines(planes)
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, (_, _, labels) in enumerate(lines):
        for index, label in enumerate(labels.tolist()):
            if label:
                places[label].append((number, index))
    visits: dict[int, list[int]] = defaultdict(list)
    for number, labels in enumerate([*(labels for _, _, labels in lines), *structure.vectors]):
        for label in labels.tolist():
            visits[label].append(number)
    complex_labels = structure.complex_labels
    units: list[frozenset[int]] = [frozenset((label,)) for label in places if label not in complex_labels]
    units += list(dict.fromkeys(u for seed in structure.seeds() if (u := structure.close(seed)) is not None))
    groups: dict[tuple[object, ...], list[frozenset[int]]] = defaultdict(list)
    for unit in units:
        counts: dict[int, int] = defaultdict(int)
        for label in unit:
            for number in visits.get(label, ()):
                counts[number] += 1
        if any(label in places for label in unit):
            groups[tuple(sorted(counts.items())), structure.signature(unit) if unit & complex_labels else ()].append(unit)
    named: dict[str, int] = defaultdict(int)
    out = []
    for members in sorted(groups.values(), key=lambda m: _order(m, places, lines)):
        if not _disjoint(members):
            continue
        members.sort(key=lambda u: _order([u], places, lines))
        slices = _slices(members, places, lines)
        made = [name for name, axes in slices.items() if any((name, axis) in produced for axis in axes)]
        if made:
            named[made[0]] += 1  # a single unit counts too: names stay when a cut leaves one
        if len(members) < 2 or not slices:
            continue
        base = next(iter(made), next(iter(slices)))
        named[base] += not made
        parameters = sum(_removed(planes[n], size, members[0]) for n, size in sizes.items())
        out.append(
            UnitGroup(
                name=base if named[base] == 1 else f"{base}#{named[base]}",
                units=tuple(np.array(sorted(u), np.int64) for u in members),
                slices=slices,
                normalized=bool(normalized & members[0]),
                parameters=parameters,
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


def _order(members: Sequence[frozenset[int]], places: Mapping[int, list[tuple[int, int]]], lines: Sequence[Line]) -> tuple[int, int, int]:
    """First place of a unit: parameter axis in program order, index, then distance to its second index there (a head, whose
    rows are neighbours, before "dim d of every head"). Nothing that depends on sizes, so that names survive a cut.
    """
    found = sorted(p for label in members[0] for p in places.get(label, ()))
    number, index = found[0] if found else (len(lines), 0)
    return number, index, next((i - index for n, i in found[1:] if n == number and i > index), 0)


def _disjoint(members: Sequence[frozenset[int]]) -> bool:
    return len(frozenset().union(*members)) == sum(map(len, members))


def _slices(
    members: Sequence[frozenset[int]], places: Mapping[int, list[tuple[int, int]]], lines: Sequence[Line]
) -> dict[str, dict[int, Array]]:
    rows: dict[int, list[list[int]]] = defaultdict(lambda: [[] for _ in members])
    for i, unit in enumerate(members):
        for label in unit:
            for number, index in places.get(label, ()):
                rows[number][i].append(index)
    out: dict[str, dict[int, Array]] = defaultdict(dict)
    for number in sorted(rows):
        name, axis, _ = lines[number]
        out[name][axis] = np.array([sorted(r) for r in rows[number]], np.int64)
    return dict(out)
