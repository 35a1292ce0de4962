"""Plans that leave a given share of a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from shohin.errors import PlanError
from shohin.graph import Graph
from shohin.integrations.transformers import uniform, write_config
from shohin.plan import Plan
from shohin.planning.choice import Choice
from shohin.planning.features import Features
from shohin.planning.latency import LatencyModel
from shohin.planning.loss import loss_table
from shohin.planning.options import GroupOptions
from shohin.planning.relinearize import plan_for_budget
from shohin.planning.resources import Costs
from shohin.planning.widths import group_counts, plan_of
from shohin.surgery import Cut, cut


def widths_within(graph: Graph, keep: float, of: str, align: int, saliency: Mapping[str, list[float]]) -> tuple[Plan, float]:
    """The plan that loses least within the share, and the share that it leaves. Raises PlanError if it cannot be reached."""
    options = [GroupOptions(g.name, g.size, g.counts, loss_table(saliency[g.name], g.counts)) for g in group_counts(graph, align).values()]
    features = Features(graph.costs)
    full = Choice(graph.sizes)
    costs = Costs(LatencyModel(features, np.zeros(len(features.names)), (full,), np.ones(1), 0.0))  # no time is asked for here
    whole = costs.of(full, [of])[of]
    planned = plan_for_budget(costs, options, [], {of: keep * whole})
    if not planned.feasible:
        raise PlanError(
            f"keep={keep} of {of} cannot be reached: {planned.binding}; frozen: {', '.join(f.address for f in graph.frozen[:4])}"
        )
    plan = plan_of(graph, planned.choice, dict(saliency))
    return plan, planned.predicted[of] / whole


def uniform_cut(model: nn.Module, graph: Graph, keep: float, of: str, saliency: Mapping[str, list[float]]) -> tuple[Plan, float, Cut]:
    """A plan that the model's configuration can express, and the cut with its configuration, and the share that is left. Raises PlanError if there is none."""
    plan = uniform(graph, model, keep, of=of, scores=saliency)
    made = cut(model, graph, plan)
    write_config(made, model, graph)
    share = graph.macs(plan) / graph.macs() if of == "macs" else _count(made.model) / _count(model)
    return plan, share, made


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def magnitudes(graph: Graph) -> dict[str, list[float]]:
    """Squared weights of the producing slices (axis 0) of each unit (Li et al. 2017, 1608.08710, with L2)."""
    out = {}
    for group in graph.groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for name, axes in group.slices.items():
            tensor = graph.program.tensors[name].detach().double()
            if 0 in axes and tensor.dim() > 1:
                total += tensor.square().flatten(1).sum(1)[torch.from_numpy(axes[0])].sum(1)
        out[group.name] = total.tolist()
    return out
