"""Iterative structured pruning: score, cut a little, train a little, again; one plan of the original describes the result.

Small steps let scores follow what the network has become (Han et al., 2015, arXiv 1506.02626; Molchanov et al., 2017, 1611.06440).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from torch import nn

from shohin.data import Data
from shohin.errors import DataError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.planning.choice import Choice
from shohin.planning.widths import group_counts, plan_of
from shohin.pruning.allocation import counted, ranked
from shohin.pruning.amounts import check_amounts
from shohin.pruning.saliency import group_saliency
from shohin.pruning.schedules.beside import Training, name_of
from shohin.pruning.schedules.rounds import Rounds
from shohin.surgery import cut_sharing_values, understand
from shohin.training import Objective, TrainConfig, TrainResult, copy_state, load_state, train
from shohin.training.loop import Evaluate
from shohin.training.randomness import generators_of, isolated, mix, seed_everything
from shohin.training.state import norm_of

Score = Callable[[Graph, nn.Module], Mapping[str, Sequence[float]]]
"""``score(graph, model) -> {group: one number for each unit}``; what is low goes first."""


class Options(Training, total=False):
    """What is handed on to `shohin.training.train` in each round."""

    evaluate: Evaluate | None
    lower_is_better: bool | None


@dataclass(frozen=True, eq=False)
class Iterated:
    """A model that was cut in rounds.

    Args:
        model: after the last whole round; another module than the one that was given.
        plan: of the original, that leads to it.
        plans: of each round, each for the model that the rounds before left.
        training: of the last round that was trained in this call.
        finished: False if a deadline ended it before the last round was whole.
    """

    model: nn.Module
    plan: Plan
    plans: tuple[Plan, ...]
    training: TrainResult | None
    finished: bool


def iterative(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    shares: Sequence[float],
    of: str = "macs",
    align: int = 1,
    score: Score | None = None,
    samples: int = 256,
    folder: str | Path | None = None,
    **training: Unpack[Options],
) -> Iterated:
    """Cuts and trains once for each share; ``model`` itself is not changed.

    Args:
        objective: of every round; it is called with the cut model.
        config: of every round's training.
        shares: of the original's ``of`` ("macs" or "params") that are gone after each round, ascending; see `geometric`.
        align: kept widths are multiples of this.
        score: of units, comparable among groups; None: `shohin.pruning.saliency.group_saliency` on ``samples`` training samples.
        folder: weights and plan of each round are kept there; called again, it goes on after the last whole round, and within a
            round after the last whole epoch.
        training: ``evaluate``, ``lower_is_better``, ``deadline``, ``progress``, ``optimizer``, ``schedule``, ``callbacks``, as for
            `train`; with ``evaluate`` the best epoch of each round counts.

    Raises:
        DataError: if the shares do not ascend, and as `train` does.
        PlanError: if a share cannot be reached; the rounds before are in the folder.
        RunError: if the folder belongs to another job.
    """
    check_amounts(of, align)
    config = config or TrainConfig()
    if not shares or list(shares) != sorted(shares) or not all(0 <= s < 1 for s in shares):
        raise DataError(f"iterative pruning needs ascending shares in [0, 1), at least one; got {list(shares)}")
    original = understand(model, data.example())
    settings = {
        "method": "iterative",
        "fingerprint": original.program.fingerprint,
        "start": norm_of(copy_state(model)),
        "config": config.to_json(),
        "shares": list(shares),
        "of": of,
        "align": align,
        "score": "saliency" if score is None else name_of(score),
        "samples": samples,
    }
    rounds = Rounds(folder, settings)
    whole = counted(original).of(Choice(original.sizes), [of])[of]
    now, plan, plans, result = model, Plan(original.program.fingerprint), list[Plan](), None
    for number in range(len(shares)):
        found = rounds.read(number)
        if found is None:
            break
        plan, last = Plan.from_json(found[1]["plan"]), found[0]
        plans.append(Plan.from_json(found[1]["step"]))
    if plans:
        now = cut_sharing_values(model, original, plan).model
        load_state(now, last)
    for number in range(len(plans), len(shares)):
        graph = original if now is model else understand(now, data.example())
        scores = _saliency(graph, data, samples, config.seed) if score is None else score(graph, now)
        step = _step(graph, scores, (1 - shares[number]) * whole, of, align)
        made = cut_sharing_values(now, graph, step).model
        training["checkpoint"] = rounds.checkpoint(number)
        result = train(made, data, objective, config, **training)
        if result.stopped == "deadline":
            return Iterated(now, plan, tuple(plans), result, False)
        now, plan = made, plan.then(step)
        plans.append(step)
        rounds.write(number, copy_state(now), {"plan": plan.to_json(), "step": step.to_json()})
    return Iterated(now, plan, tuple(plans), result, True)


def _saliency(graph: Graph, data: Data, samples: int, seed: int) -> dict[str, list[float]]:
    """Scores on the first training samples, in the same order at every call."""
    generators = generators_of(data.train, data.validation)
    with isolated(generators):
        seed_everything(mix(seed), generators)
        found = group_saliency(graph, data, list(data.calls("train", samples)), seed=seed)
    return {name: values.tolist() for name, values in found.items()}


def _step(graph: Graph, scores: Mapping[str, Sequence[float]], bound: float, of: str, align: int) -> Plan:
    """The plan of one round: at most ``bound`` of the cost is left."""
    cost = counted(graph).of(Choice(graph.sizes), [of])[of]
    if cost <= bound * (1 + 1e-9):
        return Plan(graph.program.fingerprint)
    listed = {name: list(values) for name, values in scores.items()}
    return plan_of(graph, ranked(graph, group_counts(graph, align), listed, bound / cost, of), listed)
