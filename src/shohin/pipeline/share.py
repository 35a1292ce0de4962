"""Plans that leave a given share of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from shohin.graph import Graph
from shohin.integrations.transformers import uniform, write_config
from shohin.plan import Plan
from shohin.surgery import Cut, cut


def uniform_cut(model: nn.Module, graph: Graph, keep: float, of: str, scores: Mapping[str, Tensor]) -> tuple[Plan, float, Cut]:
    """A plan that the model's configuration can express, and the cut with its configuration, and the share that is left. Raises PlanError if there is none."""
    plan = uniform(graph, model, keep, of=of, scores={name: values.tolist() for name, values in scores.items()})
    made = cut(model, graph, plan)
    write_config(made, model, graph)
    share = graph.macs(plan) / graph.macs() if of == "macs" else _count(made.model) / _count(model)
    return plan, share, made


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
