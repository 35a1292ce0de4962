"""What a criterion is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shohin.data import Call, Data
from shohin.errors import DataError
from shohin.graph import Graph

Scores = dict[str, Tensor]
"""Group name -> float64 tensor (units,): a unit with a higher score is kept longer."""

Needs = Literal["weights", "batches", "gradients"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a criterion may look at.

    Args:
        graph: of the model; scores are for its groups.
        data: gives the loss.
        calls: calibration batches; not needed by a criterion of weights alone.
        seed: of all that is drawn.
        tick: called after each batch of each pass (for progress).
    """

    graph: Graph
    data: Data | None = None
    calls: Sequence[Call] = ()
    seed: int = 0
    tick: Callable[[], None] | None = None

    def zeros(self) -> Scores:
        """A zero for each unit of each group."""
        return {g.name: torch.zeros(g.size, dtype=torch.float64) for g in self.graph.groups}


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Args:
        name: in `shohin.prune(criterion=...)`.
        score: the function.
        needs: "weights" (the model alone), "batches" (forward passes over calibration batches) or "gradients" (backward
            passes too; labels only where the criterion says so).
        paper: where it comes from.
    """

    name: str
    score: Callable[[Inputs], Scores]
    needs: Needs
    paper: str

    def __call__(self, inputs: Inputs) -> Scores:
        """The scores of all groups.

        Raises:
            DataError: if the criterion needs batches and there are none, or a score is not finite.
        """
        if self.needs != "weights" and not inputs.calls:
            raise DataError(
                f"criterion={self.name!r} needs batches: give Data(train=loader), or a criterion of weights alone such as 'magnitude'"
            )
        scores = self.score(inputs)
        for name, values in scores.items():
            if not bool(torch.isfinite(values).all()):
                raise DataError(
                    f"criterion={self.name!r} gave NaN or Inf for group {name!r}: look for NaN or Inf in the weights and the data"
                )
        return scores
