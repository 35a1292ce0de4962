"""What a rule works with: classes of labels, the model's tensors whose axes get labels as they are used, and what is frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.core import Array, Classes, Labels, axes_of, compress, line, rigid
from shohin.program import Program


@dataclass(frozen=True)
class Frozen:
    """Something that cannot be chosen, and why.

    Args:
        address: of the operation that prevents it.
        reason: one sentence part ("unknown operator", "output of the model").
        line: the user's source line, or "".
    """

    address: str
    reason: str
    line: str = ""


@dataclass(eq=False)
class Parameter:
    """A tensor that the model owns (or a constant that its forward makes), as an argument of a rule.

    Its axes get labels from the rules that use them: each axis once, alone or together with others.

    Args:
        name: qualified name; the node's name for a constant.
        planes: label arrays of the tensor's own rank.
        bound: the axes that have got labels, zeros included.
        constant: True if the forward makes it from no input and no weight.
    """

    name: str
    shape: tuple[int, ...]
    planes: list[Array] = field(default_factory=list)
    bound: set[int] = field(default_factory=set)
    constant: bool = False


class Context:
    """State of one walk: classes, the value of every node, what was frozen, and notes for later.

    The value of a node is `Labels`, a `Parameter`, a tensor of integers that is known (a constant index), a number, or a
    tuple of these.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.classes = Classes()
        self.frozen: list[Frozen] = []
        self.normalized: list[Array] = []
        self.produced: set[tuple[str, int]] = set()
        self.parameters: dict[str, Parameter] = {}
        self.values: dict[fx.Node, Any] = {}

    def tidy(self, planes: Iterable[Array], shape: Sequence[int]) -> Labels:
        """Labels from planes that may overlap or be constant. What is constant can never go (that would empty the tensor)."""
        kept: list[Array] = []
        for plane in planes:
            data = compress(self.classes.find(plane))
            if data.size <= 1:
                if data.any():
                    self.classes.whole.add(int(data.reshape(-1)[0]))
                continue
            for other in [o for o in kept if set(axes_of(o)) & set(axes_of(data))]:
                if other.shape == data.shape and (other == data).all():
                    break
                joined = self.classes.join(other, data)
                if joined is None:
                    self.classes.freeze(np.unique(data))
                    break
                kept = [o for o in kept if o is not other]
                data = joined
            else:
                kept.append(data)
        return Labels(tuple(kept), tuple(shape))

    def labels(self, value: Any) -> Labels:
        """Labels of an argument; axes of a parameter that have none yet get fresh ones."""
        if isinstance(value, Labels):
            return self.tidy(value.planes, value.shape)
        if isinstance(value, Parameter):
            for axis, size in enumerate(value.shape):
                if size > 1 and axis not in value.bound:
                    self.bind(value, axis, self.classes.fresh(size))
            return self.tidy(value.planes, value.shape)
        return rigid(tuple(value.shape)) if isinstance(value, torch.Tensor) else rigid(())

    def bind(self, value: Any, axis: int, labels: Array | None) -> None:
        """Says that index i of an axis of a weight, a bias or a statistic is removed with ``labels[i]``; None: never.

        Args:
            value: a `Parameter`; a computed weight (`Labels`); anything else is ignored.
        """
        if not isinstance(value, (Parameter, Labels, torch.Tensor)) or value.shape[axis] == 1:
            return  # the only index never goes
        whole = labels is None
        if labels is None:
            labels = np.zeros(value.shape[axis], np.int64)
        plane = line(axis, labels, len(value.shape))
        if isinstance(value, Parameter) and axis not in value.bound:
            value.planes.append(plane)
            value.bound.add(axis)
            return
        planes = value.planes if isinstance(value, (Parameter, Labels)) else ()
        for other in planes:
            if other.shape[axis] > 1:  # whole along this axis: what is chosen along another one stays a choice
                self.classes.unite(other, other.take([0], axis) if whole and len(axes_of(other)) > 1 else plane)
                return
        self.classes.freeze(np.unique(labels))

    def fixed(self, value: Any, axes: Iterable[int]) -> None:
        """Says that a use needs whole axes: other uses may not shrink them."""
        for axis in axes:
            self.bind(value, axis, None)

    def made(self, weight: Any, axis: int) -> Array:
        """The labels of the axis that a weight's output takes: fresh ones for a parameter that has none yet."""
        if isinstance(weight, Parameter):
            if weight.shape[axis] > 1 and axis not in weight.bound:
                self.bind(weight, axis, self.classes.fresh(weight.shape[axis]))
            if not weight.constant:
                self.produced.add((weight.name, axis))
        planes = weight.planes if isinstance(weight, Parameter) else self.labels(weight).planes
        weight = Labels(tuple(p for p in planes if p.shape[axis] > 1), tuple(weight.shape))
        others = [d for d in range(len(weight.shape)) if d != axis]
        x = self.collapse(self.labels(weight), others)
        return self.classes.find(x.along(axis))

    def collapse(self, x: Labels, axes: Iterable[int]) -> Labels:
        """Unites labels that differ only along ``axes``: an operator mixes or treats alike what lies there."""
        for axis in axes:
            plane = x.plane(axis)
            if plane.shape[axis] > 1:
                self.classes.unite(plane, plane.take([0], axis))
                x = self.labels(x)
        return x

    def note(self, note: Frozen, labels: Array) -> None:
        """Freezes labels, with the reason where that keeps a part of a weight from being removed."""
        data = np.unique(self.classes.find(labels))
        data = data[data > 0]
        if len(data):
            if any(np.isin(self.classes.find(p), data).any() for parameter in self.parameters.values() for p in parameter.planes):
                self.frozen.append(note)
            self.classes.freeze(data)

    def freeze(self, node: fx.Node, reason: str, *values: Any) -> None:
        """Freezes all labels of the values, noting the reason and the operation."""
        origin = self.program.origins.get(node.name)
        note = Frozen(origin.address if origin else node.name, reason, origin.line if origin else "")
        for value in values:
            for plane in (value,) if isinstance(value, np.ndarray) else self._planes(value):
                self.note(note, plane)

    def _planes(self, value: Any) -> Sequence[Array]:
        if isinstance(value, Parameter):
            self.fixed(value, [d for d in range(len(value.shape)) if d not in value.bound])
            return value.planes
        return self.labels(value).planes
