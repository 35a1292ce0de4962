"""Labels: an integer for each prunable element of a tensor, compressed along the axes on which it does not vary.

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
    """Labels of one tensor.

    Args:
        data: int64; size 1 along each axis on which labels do not vary, else the full size.
        shape: the tensor's full shape.
    """

    data: Array
    shape: tuple[int, ...]

    @property
    def varying(self) -> tuple[int, ...]:
        """The axes on which labels vary."""
        return tuple(d for d, n in enumerate(self.data.shape) if n > 1)

    @property
    def rigid(self) -> bool:
        """True if nothing in the tensor can be removed."""
        return not self.data.any()

    def along(self, axis: int) -> Array:
        """The label of each index of ``axis``, for a tensor whose labels vary on no other axis."""
        out: Array = np.broadcast_to(self.data.reshape(-1), (self.shape[axis],)).copy()
        return out

    def full(self) -> torch.Tensor:
        """An int64 tensor of the full shape, with stride 0 along the axes on which labels do not vary."""
        return torch.from_numpy(np.ascontiguousarray(self.data)).expand(self.shape)


def rigid(shape: Sequence[int]) -> Labels:
    """Labels of a tensor of which nothing can be removed."""
    return Labels(np.zeros((1,) * len(shape), np.int64), tuple(shape))


def along(axis: int, labels: Array, shape: Sequence[int]) -> Labels:
    """Labels that vary along one axis only."""
    view = [1] * len(shape)
    view[axis] = -1
    return compress(labels.reshape(view), shape)


def compress(data: Array, shape: Sequence[int]) -> Labels:
    """Labels from an array that broadcasts to ``shape``; axes of constant labels are reduced to size 1."""
    for axis in range(data.ndim):
        if data.shape[axis] > 1:
            first = data.take([0], axis)
            if (data == first).all():
                data = first
    return Labels(np.ascontiguousarray(data), tuple(shape))


def from_tensor(labels: torch.Tensor) -> Labels:
    """Labels from a full tensor, whose axes of stride 0 are known to be constant without looking."""
    shape = tuple(labels.shape)
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return compress(labels.numpy(), shape)


class Classes:
    """Union-find over labels, with links. Grows while the graph is walked; labels are never reused."""

    def __init__(self) -> None:
        self._parent: Array = np.zeros(1, np.int64)
        self.links: list[tuple[int, Array]] = []

    def fresh(self, count: int) -> Array:
        """``count`` new labels."""
        start = len(self._parent)
        new = np.arange(start, start + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, new])
        return new

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
        a, b = np.broadcast_arrays(self.find(a), self.find(b))
        differ = a != b
        if not differ.any():
            return
        pairs = np.unique(np.stack([a[differ], b[differ]]), axis=1)
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
