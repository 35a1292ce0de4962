"""What cutting one group, or skipping one region, really does to the outputs: measured on views, to scale the tables of planning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from shohin.errors import ShohinError
from shohin.graph import Graph
from shohin.planning.choice import Choice
from shohin.planning.options import GroupOptions
from shohin.planning.widths import plan_of
from shohin.surgery import view

Divergence = Callable[[nn.Module], float]
Tick = Callable[[], None]


def of_groups(
    graph: Graph,
    options: Mapping[str, GroupOptions],
    scores: Mapping[str, Sequence[float]],
    divergence: Divergence,
    tick: Tick | None = None,
) -> list[tuple[str, int, float]]:
    """(group, count, divergence) of the view that cuts this group alone, to about a half; one for each group with a choice."""
    found = []
    for name, group in options.items():
        if len(group.counts) > 1:
            half = group.nearest(0.5)
            count = half if half < group.size else group.counts[0]
            plan = plan_of(graph, Choice({**graph.sizes, name: count}), dict(scores))
            found.append((name, count, divergence(view(graph, plan))))
        if tick is not None:
            tick()
    return found


def of_regions(graph: Graph, names: Iterable[str], divergence: Divergence, tick: Tick | None = None) -> list[tuple[str, float]]:
    """(region, divergence) of the view that skips it alone; what cannot be skipped is left out."""
    found = []
    for name in names:
        try:
            found.append((name, divergence(view(graph, plan_of(graph, Choice(graph.sizes, frozenset((name,))))))))
        except ShohinError:
            continue
        if tick is not None:
            tick()
    return found
