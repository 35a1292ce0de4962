"""Which units compete, and on what scale: scores of different groups are made comparable, or kept apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.errors import PlanError, closest
from shohin.graph import Graph, UnitGroup
from shohin.graph.kinds import kind, uses


@dataclass(frozen=True)
class Normalized:
    """Scores that can be compared within classes.

    Args:
        scores: group -> float64 (units,); higher stays longer.
        classes: group -> name of the class within which its units compete, by one threshold. Scores of different classes say
            nothing of each other: from each class the same share goes, or whatever else an allocation decides.
    """

    scores: Mapping[str, Tensor]
    classes: Mapping[str, str]

    @property
    def members(self) -> dict[str, list[str]]:
        """Class -> its groups, in the graph's order."""
        found: dict[str, list[str]] = {}
        for group, name in self.classes.items():
            found.setdefault(name, []).append(group)
        return found


def normalize(graph: Graph, scores: Mapping[str, Tensor], how: str = "none") -> Normalized:
    """Scores on one scale, and the classes within which they compete.

    Args:
        scores: group -> (units,), finite; of the groups that are to be chosen.
        how: "none": as they are, each group by itself; "global": as they are, all together (for criteria in the unit of the
            loss); "mean", "max": divided by the group's mean or largest score, all together; "isomorphic": as they are, groups of
            equal `structure` together (Fang et al. 2024, "Isomorphic Pruning for Vision Models", arXiv 2407.04616).

    Raises:
        PlanError: for an unknown ``how``, or a group that the graph does not have.
    """
    if how not in WAYS:
        raise PlanError(f"normalization {how!r} is not known; one of {', '.join(WAYS)}{closest(how, WAYS)}")
    for name in scores:
        if name not in graph.sizes:
            raise PlanError(f"scores for a group {name!r} that the model does not have{closest(name, graph.sizes)}")
    scale, classify = WAYS[how]
    ordered = [g for g in graph.groups if g.name in scores]
    return Normalized({g.name: scale(scores[g.name].double()) for g in ordered}, {g.name: classify(graph, g) for g in ordered})


def structure(graph: Graph, group: UnitGroup) -> str:
    """What makes, reads, carries and normalizes the units of a group, and how often: equal for groups that are alike but for sizes.

    An example is "neuron: makes linear, reads linear". Sizes do not enter, nor do kernel sizes or names; a residual stream through
    three blocks is another structure than one through four.
    """
    counts = Counter(f"{role} {family}" for _, role, family in {(u.node, u.role, u.family) for u in uses(graph)[group.name]})
    listed = ", ".join(name if n == 1 else f"{name} x{n}" for name, n in sorted(counts.items()))
    return f"{kind(graph, group)}: {listed}"


def _as_it_is(scores: Tensor) -> Tensor:
    return scores


def _by_mean(scores: Tensor) -> Tensor:
    return _divided(scores, scores.mean())


def _by_max(scores: Tensor) -> Tensor:
    return _divided(scores, scores.max())


def _divided(scores: Tensor, by: Tensor) -> Tensor:
    """A group that scores zero throughout stays at zero: nothing is lost with it."""
    return scores / by if float(by) > 0 else torch.zeros_like(scores)


def _together(graph: Graph, group: UnitGroup) -> str:
    return "all"


def _alone(graph: Graph, group: UnitGroup) -> str:
    return group.name


Scale = Callable[[Tensor], Tensor]
Classify = Callable[[Graph, UnitGroup], str]

WAYS: dict[str, tuple[Scale, Classify]] = {
    "none": (_as_it_is, _alone),
    "global": (_as_it_is, _together),
    "mean": (_by_mean, _together),
    "max": (_by_max, _together),
    "isomorphic": (_as_it_is, structure),
}
