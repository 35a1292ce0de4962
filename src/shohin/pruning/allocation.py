"""How much of each group stays: one share everywhere, one threshold for all, or the least loss that the tables promise."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shohin.errors import PlanError
from shohin.graph import Graph
from shohin.planning.choice import Choice
from shohin.planning.features import Features
from shohin.planning.latency import LatencyModel
from shohin.planning.options import GroupOptions, RegionOption
from shohin.planning.relinearize import plan_for_budget
from shohin.planning.resources import Costs

Options = Mapping[str, GroupOptions]


def counted(graph: Graph) -> Costs:
    """What is counted of a choice ("macs", "params"); of its time nothing is known."""
    features = Features(graph.costs)
    return Costs(LatencyModel(features, np.zeros(len(features.names)), (Choice(graph.sizes),), np.ones(1), 0.0))


def share_of(graph: Graph, choice: Choice, of: str) -> float:
    """What a choice leaves of the model's "macs" or "params"."""
    costs = counted(graph)
    return costs.of(choice, [of])[of] / costs.of(Choice(graph.sizes), [of])[of]


def least_loss(graph: Graph, options: Options, regions: Sequence[RegionOption], keep: float, of: str) -> Choice:
    """The choice that loses least by the tables within ``keep`` of the model's "macs" or "params", by mixed-integer programs
    (`shohin.planning.relinearize`).

    Raises:
        PlanError: if no choice is that small; it names what binds.
    """
    costs = counted(graph)
    bound = keep * costs.of(Choice(graph.sizes), [of])[of]
    planned = plan_for_budget(costs, list(options.values()), regions, {of: bound})
    if not planned.feasible:
        raise _unreachable(graph, keep, of, planned.binding)
    return planned.choice


def uniform(graph: Graph, options: Options, keep: float, of: str) -> Choice:
    """The same share of the units of every group, as far as the allowed counts go: the largest within ``keep``.

    Raises:
        PlanError: if the smallest counts are still above it.
    """
    shares = sorted({count / g.size for g in options.values() for count in g.counts}, reverse=True)
    return _first_within(graph, shares, lambda share: _rounded(options, {n: share * g.size for n, g in options.items()}), keep, of)


def ranked(
    graph: Graph, options: Options, scores: Mapping[str, Sequence[float]], keep: float, of: str, classes: Mapping[str, object] | None = None
) -> Choice:
    """All units compete: those below one threshold go, the lowest that brings the model within ``keep``.

    Args:
        scores: group -> one for each unit, comparable among the groups of a class.
        classes: group -> what it competes with; of each class the same share goes (isomorphic pruning, Fang et al. 2024,
            arXiv 2407.04616). All compete with all by default.

    Raises:
        PlanError: if the smallest counts are still above it.
    """
    places = _places(options, scores, classes or {})
    levels = sorted({float(p) for places_ in places.values() for p in places_})
    return _first_within(graph, levels, lambda level: _rounded(options, {n: int((p >= level).sum()) for n, p in places.items()}), keep, of)


def _places(options: Options, scores: Mapping[str, Sequence[float]], classes: Mapping[str, object]) -> dict[str, npt.NDArray[np.float64]]:
    """Group -> the place of each unit in its class, 0 the lowest, towards 1 the highest; equal scores share one."""
    out: dict[str, npt.NDArray[np.float64]] = {}
    members: dict[object, list[str]] = {}
    for name in options:
        members.setdefault(classes.get(name), []).append(name)
    for names in members.values():
        pooled = np.sort(np.concatenate([np.asarray(scores[n], dtype=np.float64) for n in names]))
        out |= {n: np.searchsorted(pooled, np.asarray(scores[n], dtype=np.float64)) / len(pooled) for n in names}
    return out


def _rounded(options: Options, wanted: Mapping[str, float]) -> Choice:
    """The allowed counts at or below what is wanted; the smallest where there is none."""
    return Choice({n: max((c for c in g.counts if c <= wanted[n] + 1e-9), default=g.counts[0]) for n, g in options.items()})


def _first_within(graph: Graph, steps: Sequence[float], choice: Callable[[float], Choice], keep: float, of: str) -> Choice:
    """The first of ever smaller choices that is within the share."""
    costs = counted(graph)
    bound = keep * costs.of(Choice(graph.sizes), [of])[of] * (1 + 1e-12)
    found = bisect_left(range(len(steps)), True, key=lambda i: costs.of(choice(steps[i]), [of])[of] <= bound)
    if found == len(steps):
        raise _unreachable(graph, keep, of, "every group is at its smallest allowed width")
    return choice(steps[found])


def _unreachable(graph: Graph, keep: float, of: str, why: str) -> PlanError:
    frozen = ", ".join(f.address for f in graph.frozen[:4])
    return PlanError(f"keep={keep} of {of} cannot be reached: {why}" + (f"; frozen: {frozen}" if frozen else ""))
