"""Training towards whole units of exact zeros, so that cutting them changes nothing: a penalty decides how many vanish.

See `shohin.pruning.schedules.forget` for a schedule that is told how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.errors import DataError, PlanError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.pruning.amounts import check_graph
from shohin.pruning.schedules.beside import Beside, Training, train_with
from shohin.pruning.schedules.producing import Slices, producing
from shohin.training import Objective, TrainConfig, TrainResult


@dataclass(frozen=True, eq=False)
class Zeroed:
    """A training that left whole units at exact zero.

    Args:
        training: what the loop gives back; its state and the model hold the zeros.
        plan: whose cut leaves the outputs as they are.
        excluded: group -> why its units cannot be made zero by their producing slices.
    """

    training: TrainResult
    plan: Plan
    excluded: dict[str, str]


def group_lasso(
    model: nn.Module,
    graph: Graph,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    strength: float | Mapping[str, float],
    **training: Unpack[Training],
) -> Zeroed:
    """Trains ``model`` in place with a penalty on the norm of each unit (Yuan & Lin, 2006; Wen et al., 2016, arXiv 1608.03665).

    After each optimizer step the proximal step of ``strength * sqrt(elements) * norm`` over each unit's producing slices (rows, biases
    and normalization scales together): they shrink by ``rate * strength * sqrt(elements)``, and are zero exactly where their norm was
    smaller. The last state counts.

    Args:
        model, graph: the graph was made from this model.
        strength: of the penalty, for all groups or by group (others: none). With SGD a unit vanishes in time if the gradient of its
            slices is shorter than ``strength * sqrt(elements)``; AdamW makes all gradients alike and needs several times as much.
        training: see `gradual`.

    Raises:
        PlanError: if a group is not known.
        DataError: if a strength is negative, or the model has no unit that can be made zero.
        RunError: if the checkpoint belongs to another training or another pruning.
    """
    config = config or TrainConfig()
    slices, excluded = units_of(graph, model)
    for name in strength if isinstance(strength, Mapping) else ():
        if name not in graph.sizes:
            raise PlanError(f"strength names a unit group {name!r} that the model does not have")
    forces = {n: float(strength.get(n, 0.0) if isinstance(strength, Mapping) else strength) for n in slices}
    if any(force < 0 for force in forces.values()):
        raise DataError("group_lasso needs strengths >= 0")

    def after(beside: Beside) -> None:
        rates = {id(p): float(group["lr"]) for group in beside.optimizer.param_groups for p in group["params"]}
        for name, one in slices.items():
            values = values_of(one, beside.parameters)
            norms = one.sums(squares(values)).sqrt()
            rate = max((rates.get(id(p), 0.0) for p in values.values()), default=0.0)
            factors = shrinkage(norms, rate * forces[name] * one.elements(values) ** 0.5)
            if forces[name]:
                one.scale(values, factors)
            beside.put(one.home, key(name, "alive"), norms * factors > 0)

    settings = {"method": "group lasso", "strength": forces}
    result, beside = train_with(model, data, objective, config, settings, after, **training)
    gone = {n: ~alive for n, one in slices.items() if (alive := beside.get(one.home, key(n, "alive"))) is not None}
    return zeroed(model, graph, slices, excluded, result, gone)


def shrinkage(norms: Tensor, amount: float) -> Tensor:
    """Factors of the proximal step: ``max(0, 1 - amount / norm)``; zero stays zero."""
    return (1 - amount / norms.clamp_min(1e-300)).clamp_min(0.0)


def zero_plan(model: nn.Module, graph: Graph) -> Plan:
    """The plan that cuts all units whose producing slices are zero exactly; as many of them stay as a group needs.

    Groups whose units cannot be made zero (see `producing`) are left as they are.
    """
    slices, _ = producing(graph)
    values = dict(model.named_parameters())
    return _plan(graph, {n: one.sums(squares(values_of(one, values))) == 0 for n, one in slices.items()})


def key(group: str, what: str) -> str:
    """Under which a group's values are kept beside the optimizer."""
    return f"{what} {group}".replace("/", "|")


def units_of(graph: Graph, model: nn.Module) -> tuple[dict[str, Slices], dict[str, str]]:
    """`producing`, without the groups that are not wholly trained.

    Raises:
        DataError: if there is nothing left.
        ModelError: if the graph is of another model.
    """
    check_graph(model, graph)
    slices, excluded = producing(graph)
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    for name in list(slices):
        still = [p for p, _, _ in slices[name].places if p in fixed]
        if still:
            del slices[name]
            excluded[name] = f"{still[0]} requires no gradient"
    if not slices:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(excluded.items())[:3]) or "it has no unit groups"
        raise DataError(f"no unit of the model can be made zero by its producing slices: {why}")
    return slices, excluded


def values_of(one: Slices, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters that a group's slices lie in."""
    return {name: parameters[name] for name, _, _ in one.places if name in parameters}


def squares(values: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Their squared elements, in float64."""
    return {name: p.detach().double().square() for name, p in values.items()}


def zeroed(
    model: nn.Module,
    graph: Graph,
    slices: Mapping[str, Slices],
    excluded: dict[str, str],
    result: TrainResult,
    gone: Mapping[str, Tensor],
) -> Zeroed:
    """Zeros in what the training gave back (an average of weights has none of its own), and their plan."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, dead in gone.items():
            one = slices[name]
            one.scale(values_of(one, parameters), (~dead).double())
            one.scale({n: result.state[n] for n, _, _ in one.places if n in result.state}, (~dead).double())
    zero = {n: one.sums(squares(values_of(one, parameters))) == 0 for n, one in slices.items()}
    return Zeroed(result, _plan(graph, zero), excluded)


def _plan(graph: Graph, zero: Mapping[str, Tensor]) -> Plan:
    widths = {}
    for name, dead in zero.items():
        multiple = graph.group(name).multiple
        alive = int((~dead).sum())
        count = max(-(-alive // multiple) * multiple, multiple)
        if count < len(dead):
            order = np.argsort(dead.numpy(), kind="stable")[:count]  # the living first, then as many of the dead as are needed
            widths[name] = tuple(sorted(int(i) for i in order))
    return Plan(graph.program.fingerprint, widths)
