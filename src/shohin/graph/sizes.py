"""Sizes of a program's tensors for one sample, as functions of the widths that are chosen.

The batch is not always axis 0: attention blocks put it second, or multiply it with heads or windows. So sizes are taken of
whole tensors at the example's batch, and divided by it where the tensor depends on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from shohin.graph.costs import Term
from shohin.graph.labels.core import Array, Labels
from shohin.program import Program, concrete

#: the labels of a tensor that vary along an axis, the axis, and its size
Axis = tuple[Array, int, int]


class Products(Protocol):
    """What multiplies axes (`shohin.graph.operators.Extents`)."""

    def product(self, axes: Sequence[Axis], factor: float = 1.0) -> list[Term]:
        """The product of several axes' sizes, as a sum of terms."""
        ...


class Sizes:
    """Sizes of the tensors of one program.

    Args:
        labels: node name -> settled labels.
        planes: tensor name -> settled label planes.
        extents: of the graph's groups.
    """

    def __init__(self, program: Program, labels: Mapping[str, Labels], planes: Mapping[str, Sequence[Array]], extents: Products) -> None:
        self.program, self.labels, self.planes, self.extents = program, labels, planes, extents
        self._batched = batched(program)

    @cached_property
    def batch(self) -> int:
        """Batch size of the example."""
        return self.program.batch

    def depends_on_batch(self, node: fx.Node) -> bool:
        """True if a larger batch makes the tensor larger."""
        return node.name in self._batched

    def axis(self, node: fx.Node, axis: int) -> Axis:
        """One axis of a tensor of the model or of an activation."""
        shape = shape_at_example(self.program, node)
        axis %= len(shape)
        if node.name in self.program.names:
            return plane_of(self.planes.get(self.program.names[node.name], ()), axis, len(shape)), axis, shape[axis]
        labels = self.labels.get(node.name)
        return (labels.plane(axis) if labels is not None else _rigid(len(shape))), axis, shape[axis]

    def axes(self, node: fx.Node) -> list[Axis]:
        """All axes of a tensor, at the example's batch."""
        return [self.axis(node, d) for d in range(len(shape_at_example(self.program, node)))]

    def product(self, axes: Sequence[Axis], nodes: Iterable[fx.Node] = (), factor: float = 1.0) -> list[Term]:
        """The product of axes for one sample, where the axes belong to ``nodes``."""
        share = self.batch if any(self.depends_on_batch(n) for n in nodes) else 1
        return [Term(t.coefficient / share, t.extents) for t in self.extents.product(axes, factor)]

    def elements(self, node: fx.Node) -> list[Term]:
        """Elements of an activation for one sample."""
        return self.product(self.axes(node), (node,))


def plane_of(planes: Sequence[Array], axis: int, rank: int) -> Array:
    """The plane that labels an axis of a parameter, or an unlabelled one."""
    return next((plane for plane in planes if plane.shape[axis] > 1), _rigid(rank))


def _rigid(rank: int) -> Array:
    return np.zeros((1,) * rank, np.int64)


def shape_at_example(program: Program, node: fx.Node) -> tuple[int, ...]:
    """Shape of a tensor in the example."""
    if node.name in program.names:
        return tuple(program.tensors[program.names[node.name]].shape)
    return tuple(concrete(s) for s in node.meta["val"].shape)


def batched(program: Program) -> frozenset[str]:
    """Nodes whose tensors (of several, any) grow with the batch: by their symbolic sizes, or, where the batch is a number in
    the program, by what they are computed from.
    """
    nodes = list(program.graph.nodes)
    if any(_symbolic(n) for n in nodes if n.name in program.inputs):
        return frozenset(n.name for n in nodes if _symbolic(n))
    reached: set[fx.Node] = set()
    for node in nodes:
        if node.name in program.inputs or any(i in reached for i in node.all_input_nodes):
            reached.add(node)
    return frozenset(n.name for n in reached)


def _symbolic(node: fx.Node) -> bool:
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return any(is_symbolic(s) for t in tensors if isinstance(t, torch.Tensor) for s in t.shape)


def is_symbolic(size: Any) -> bool:
    """True for a size that depends on the batch; a symbol that the model's own code has fixed is a number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None
