"""Redundant units are chosen after a warm-up and taken to exact zero step by step, while the others learn to do without them
(OTO, Chen et al., 2021, arXiv 2107.07467; HESSO, 2409.09085).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.errors import DataError, PlanError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.planning.widths import group_counts, plan_of
from shohin.pruning.allocation import ranked
from shohin.pruning.amounts import check_amounts
from shohin.pruning.schedules.beside import Beside, Training, name_of, steps_in, train_with
from shohin.pruning.schedules.producing import Slices
from shohin.pruning.schedules.zeros import Zeroed, key, units_of, values_of, zeroed
from shohin.training import Objective, TrainConfig

Scores = Mapping[str, Tensor]
Choose = Callable[[Graph, Scores], Plan]
"""``choose(graph, scores) -> Plan`` of the units that stay; ``scores``: group -> float64 ``[units]``, low is useless."""


def forget(
    model: nn.Module,
    graph: Graph,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    keep: float | Choose,
    of: str = "macs",
    align: int = 1,
    warmup: int | None = None,
    periods: int = 4,
    length: int | None = None,
    **training: Unpack[Training],
) -> Zeroed:
    """Trains ``model`` in place and takes redundant units to exact zero on the way (Chen et al., 2021, arXiv 2107.07467, and HESSO:
    2409.09085).

    During the warm-up the saliency of each unit is averaged: the squared first-order change of the loss on removal,
    ``(sum of w g over the unit's producing slices)^2`` (Molchanov et al., 2019, arXiv 1906.10771). Then the units that are to go are
    chosen once, and go in ``periods`` batches, the least salient first: in each of the ``length`` steps of its period a unit is
    multiplied by ``left / (left + 1)``, so that it is zero exactly at its end, and zero it stays. Then the rest trains on.

    Args:
        model, graph: the graph was made from this model.
        keep: share of the model's ``of`` ("macs" or "params") that the plan leaves, or a function that chooses.
        align: kept widths are multiples of this.
        warmup, length: in steps; None: a tenth of the training, and as much for each period that they take half of it together.
        training: see `gradual`.

    Raises:
        PlanError: if an option is not known, the share cannot be reached, or the chosen plan removes units that cannot be made zero.
        DataError: if warm-up or length is None and the loader does not tell its length, or the periods do not fit.
        RunError: if the checkpoint belongs to another training or another pruning.
    """
    check_amounts(of, align, keep)
    config = config or TrainConfig()
    slices, excluded = units_of(graph, model)
    choose = keep if callable(keep) else _chooser(keep, of, align)
    begin, span = _times(data, config, warmup, periods, length)

    def before(beside: Beside) -> None:
        if beside.steps < begin:
            for name, one in slices.items():
                values = values_of(one, beside.parameters)
                slopes = {n: p.detach().double() * p.grad for n, p in values.items() if p.grad is not None}
                total = beside.get(one.home, key(name, "saliency"))
                new = one.sums(slopes).square()
                beside.put(one.home, key(name, "saliency"), new if total is None else total + new)
        elif beside.steps == begin:
            scores = {n: beside.get(one.home, key(n, "saliency")) for n, one in slices.items()}
            plan = choose(graph, {n: s for n, s in scores.items() if s is not None})
            for name, turn in _turns(plan, slices, scores, periods, excluded).items():
                beside.put(slices[name].home, key(name, "turn"), turn)

    def after(beside: Beside) -> None:
        for name, one in slices.items():
            turn = beside.get(one.home, key(name, "turn"))
            if turn is not None and bool((turn >= 0).any()):
                one.scale(values_of(one, beside.parameters), fading(turn, beside.steps - begin, span))

    settings = {"method": "forget", "keep": name_of(keep), "of": of, "align": align, "warmup": begin, "periods": periods, "length": span}
    result, beside = train_with(model, data, objective, config, settings, after, before, **training)
    turns = {n: turn for n, one in slices.items() if (turn := beside.get(one.home, key(n, "turn"))) is not None}
    gone = {n: (turn >= 0) & (beside.steps - begin >= (turn + 1) * span) for n, turn in turns.items()}
    return zeroed(model, graph, slices, excluded, result, gone)


def fading(turn: Tensor, step: int, length: int) -> Tensor:
    """Factors ``[units]`` after ``step`` steps since the warm-up, of units that go in period ``turn`` (-1: never)."""
    left = (length - (step - turn * length)).clamp(0, length).double()
    factors = torch.where(left < length, left / (left + 1), torch.ones_like(left))
    return torch.where(turn >= 0, factors, torch.ones_like(factors))


def _chooser(keep: float, of: str, align: int) -> Choose:
    def choose(graph: Graph, scores: Scores) -> Plan:
        part = graph.only(list(scores))
        lists = {name: s.tolist() for name, s in scores.items()}
        return plan_of(graph, ranked(part, group_counts(part, align), lists, keep, of), lists)

    return choose


def _turns(
    plan: Plan, slices: Mapping[str, Slices], scores: Mapping[str, Tensor | None], periods: int, excluded: Mapping[str, str]
) -> dict[str, Tensor]:
    """Group -> period in which each unit goes, or -1; within a group the least salient first."""
    out = {}
    for name, kept in plan.widths.items():
        if name not in slices:
            raise PlanError(f"the plan cuts {name!r}, whose units cannot be made zero: {excluded.get(name, 'the model has no such group')}")
        score = scores[name]
        gone = sorted(set(range(slices[name].size)) - set(kept), key=lambda u: 0.0 if score is None else float(score[u]))
        turn = torch.full((slices[name].size,), -1, dtype=torch.int64)
        turn[gone] = torch.arange(len(gone)) * periods // max(len(gone), 1)
        out[name] = turn
    return out


def _times(data: Data, config: TrainConfig, warmup: int | None, periods: int, length: int | None) -> tuple[int, int]:
    steps = steps_in(data, config)
    if (warmup is None or length is None) and steps is None:
        raise DataError("the training loader does not tell its length: say how many steps, warmup=100, length=50")
    whole = steps or 0
    begin = max(whole // 10, 1) if warmup is None else warmup
    span = max(whole // (2 * max(periods, 1)), 1) if length is None else length
    if begin < 1 or periods < 1 or span < 1 or (steps is not None and begin + periods * span > steps):
        raise DataError(
            f"forget needs warmup, periods and length of at least 1 and warmup + periods * length steps in all; got "
            f"{begin} + {periods} * {span} in a training of {steps} steps"
        )
    return begin, span
