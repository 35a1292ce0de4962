"""Labels: integers for the prunable elements of a tensor, compressed along the axes on which they do not vary.

Label 0 is the frozen class: what carries it can never be removed. Equal classes are kept in a union-find; a *link* says
that one label is removed exactly when all of a set of others are (a head's score goes when all dims of its query go).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of one tensor, as independent planes: an element is removed if its label in any plane is.

    Args:
        planes: int64 arrays of the tensor's rank; size 1 along each axis on which the plane's labels do not vary, else the
            full size. No two planes vary on one axis, and none is constant.
        shape: the tensor's full shape.
    """

    planes: tuple[Array, ...]
    shape: tuple[int, ...]

    @property
    def varying(self) -> tuple[int, ...]:
        """The axes on which labels vary."""
        return tuple(sorted(d for plane in self.planes for d in axes_of(plane)))

    @property
    def rigid(self) -> bool:
        """True if nothing in the tensor can be removed."""
        return not self.planes

    def plane(self, axis: int) -> Array:
        """The plane that varies on an axis, or one of zeros."""
        for plane in self.planes:
            if plane.shape[axis] > 1:
                return plane
        return np.zeros((1,) * len(self.shape), np.int64)

    def along(self, axis: int) -> Array:
        """The label of each index of ``axis``; zeros if none varies. Raises ValueError if they vary on another axis with it."""
        plane = self.plane(axis)
        if plane.size not in (1, plane.shape[axis]):
            raise ValueError("labels vary on several axes together")
        out: Array = np.broadcast_to(plane.reshape(-1), (self.shape[axis],)).copy()
        return out


def axes_of(plane: Array) -> tuple[int, ...]:
    """The axes on which a plane's labels vary."""
    return tuple(d for d, n in enumerate(plane.shape) if n > 1)


def rigid(shape: Sequence[int]) -> Labels:
    """Labels of a tensor of which nothing can be removed."""
    return Labels((), tuple(shape))


def line(axis: int, labels: Array, rank: int) -> Array:
    """A plane that varies along one axis only."""
    view = [1] * rank
    view[axis] = -1
    return labels.reshape(view)


def expanded(plane: Array, shape: Sequence[int]) -> torch.Tensor:
    """A plane as an int64 tensor of the full shape, with stride 0 along the axes on which it does not vary."""
    return torch.from_numpy(np.ascontiguousarray(plane)).expand(tuple(shape))


def compress(data: Array) -> Array:
    """The plane with axes of constant labels reduced to size 1."""
    for axis in range(data.ndim):
        if data.shape[axis] > 1:
            first = data.take([0], axis)
            if (data == first).all():
                data = first
    return np.ascontiguousarray(data)


def from_tensor(labels: torch.Tensor) -> Array:
    """A plane from a full tensor, whose axes of stride 0 are known to be constant without looking."""
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return compress(labels.numpy())


class Classes:
    """Union-find over labels, with links. Grows while the graph is walked; labels are never reused.

    ``grids`` are matrices of labels that must stay rectangular though no tensor has their shape (two axes that became one);
    ``whole`` are labels that all of some tensor carries.
    """

    def __init__(self) -> None:
        self._parent: Array = np.arange(1024, dtype=np.int64)
        self.count = 1
        self.links: list[tuple[int, Array]] = []
        self.grids: list[Array] = []
        self.whole: set[int] = set()

    def fresh(self, count: int) -> Array:
        """``count`` new labels."""
        start, self.count = self.count, self.count + count
        if self.count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * self.count, dtype=np.int64)])
        return np.arange(start, self.count, dtype=np.int64)

    def find(self, labels: Array) -> Array:
        """The representative of each label."""
        roots: Array = self._parent[labels]
        while True:
            further = self._parent[roots]
            if (further == roots).all():
                return roots
            roots = further

    def unite(self, a: Array, b: Array) -> None:
        """Makes the labels at equal positions one class (arrays broadcast). The smallest label represents a class, so 0 absorbs."""
        a, b = self.find(a), self.find(b)
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        differ = a != b
        if not differ.any():
            return
        pairs = np.stack([a[differ], b[differ]])
        nodes, index = np.unique(pairs, return_inverse=True)
        index = index.reshape(pairs.shape)
        _, component = connected_components(
            coo_array((np.ones(pairs.shape[1]), (index[0], index[1])), shape=(len(nodes), len(nodes))), directed=False
        )
        smallest = np.full(component.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(smallest, component, nodes)
        self._parent[nodes] = smallest[component]

    def freeze(self, labels: Array) -> None:
        """Puts labels into the frozen class."""
        self.unite(labels, np.zeros(1, np.int64))

    def link(self, parents: Array, children: Iterable[Array]) -> None:
        """Each parent is removed exactly when all of its children are. One child is an equality."""
        for parent, members in zip(parents.reshape(-1).tolist(), children, strict=True):
            distinct = np.unique(self.find(members.reshape(-1)))
            if len(distinct) == 1:
                self.unite(np.array([parent]), distinct)
            else:
                self.links.append((parent, distinct))

    def join(self, a: Array, b: Array, limit: int = 1 << 16) -> Array | None:
        """One plane for two that vary on a common axis: an element goes if its label in either does.

        Returns:
            None if the labels of the two do not meet as a product (each of one with each of the other), or too many would.
        """
        if np.prod(np.maximum(a.shape, b.shape)) > limit:
            return None
        a, b = (np.asarray(x) for x in np.broadcast_arrays(self.find(a), self.find(b)))
        rows, row = np.unique(a, return_inverse=True)
        columns, column = np.unique(b, return_inverse=True)
        grid = np.zeros((len(rows), len(columns)), np.int64)
        row, column = row.reshape(-1), column.reshape(-1)
        met = np.zeros(grid.shape, bool)
        met[row, column] = True
        if not met.all() or not rows[0] or not columns[0]:
            return None
        grid[:] = self.fresh(grid.size).reshape(grid.shape)
        self.grids.append(grid)
        self.link(rows, list(grid))
        self.link(columns, list(grid.T))
        return grid[row, column].reshape(a.shape)

    def settle(self) -> None:
        """Simplifies links whose children have become one class since, until nothing changes."""
        changed = True
        while changed:
            changed = False
            kept: list[tuple[int, Array]] = []
            seen: set[tuple[int, bytes]] = set()
            for parent, members in self.links:
                root = int(self.find(np.array([parent]))[0])
                distinct = np.unique(self.find(members))
                if len(distinct) == 1:
                    if distinct[0] != root:
                        self.unite(np.array([root]), distinct)
                        changed = True
                elif (root, distinct.tobytes()) not in seen:
                    seen.add((root, distinct.tobytes()))
                    kept.append((root, distinct))
            self.links = kept
