"""A program through a plan, as a value: the rewritten graph and what stays of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from shohin.errors import ShohinError
from shohin.graph.labels.core import Array


class CannotRewrite(ShohinError):
    """An operation's integers cannot follow the plan."""


@dataclass(frozen=True)
class Change:
    """One integer that follows the plan.

    Args:
        node: operation node name.
        position: in the node's flattened arguments; -1 if the operation itself had to become another one.
        old, new: values.
    """

    node: str
    position: int
    old: int
    new: int


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A program through a plan.

    Args:
        graph: the rewritten graph.
        kept: tensor name -> {axis: kept indices}, for tensors that are sliced.
        changes: every integer that changed.
        mended: node names that needed more than an integer (a scale written out, a split made uneven).
        tensors: the model's own, whole.
        scaled: tensor name -> (rows of the whole tensor, factor), for query rows whose head dims were cut.
    """

    graph: fx.Graph
    kept: Mapping[str, Mapping[int, Array]]
    changes: tuple[Change, ...]
    mended: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    scaled: Mapping[str, tuple[Tensor, float]]

    def own(self, name: str) -> Tensor:
        """A copy of what stays of the model's own tensor."""
        tensor = self.tensors[name].detach()
        return self.scale(name, self.slice(name, tensor)) if self.kept.get(name) else tensor.clone()

    def sliced(self) -> dict[str, Tensor]:
        """The parts that stay of all tensors, unscaled: values for the rewritten graph."""
        return {name: self.slice(name, tensor.detach()) for name, tensor in self.tensors.items()}

    def scale(self, name: str, part: Tensor) -> Tensor:
        """The kept part of a tensor with its query rows multiplied, where head dims were cut."""
        if name not in self.scaled:
            return part
        rows, factor = self.scaled[name]
        kept = self.kept.get(name, {}).get(0)
        index = torch.arange(len(part)) if kept is None else torch.from_numpy(kept)
        factors = torch.ones(len(part), dtype=torch.float64).masked_fill(torch.isin(index, rows), factor).to(part)
        return part * factors.reshape(-1, *[1] * (part.dim() - 1))

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a named tensor that stays."""
        for axis, indices in self.kept.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.from_numpy(indices).to(tensor.device))
        return tensor
