"""A cut model whose layers are refitted to what they gave before."""

from __future__ import annotations

from collections.abc import Sequence

from shohin.data import Call
from shohin.graph import Graph
from shohin.pipeline.job import load_tensors, own_tensors
from shohin.plan import Plan
from shohin.pruning.layerwise import refit
from shohin.surgery import Cut


def compensate(made: Cut, graph: Graph, plan: Plan, calls: Sequence[Call], seed: int) -> None:
    """Refits the model of a cut in place; arguments and errors as for `shohin.pruning.layerwise.refit`."""
    start = made.rewritten.sliced()
    start.update(own_tensors(made.model, start))
    load_tensors(made.model, refit(graph, plan, made.rewritten, start, calls, seed=seed))
