"""The widths that a graph allows, and the plan that a choice of widths means."""

from __future__ import annotations

from typing import Any

import numpy as np

from shohin.graph import Graph
from shohin.plan import Plan
from shohin.planning.choice import Choice
from shohin.planning.loss import kept_units
from shohin.planning.options import GroupOptions, aligned_counts


def group_counts(graph: Graph, multiple_of: int) -> dict[str, GroupOptions]:
    """Allowed widths of every group, multiples of the target's vector width in channels; losses are zero."""
    out = {}
    for group in graph.groups:
        per_unit = max(index.shape[1] for axes in group.slices.values() for index in axes.values()) if group.slices else 1
        multiple = max(1, multiple_of // int(np.gcd(multiple_of, per_unit)))
        counts = aligned_counts(group.size, multiple, most=24)
        out[group.name] = GroupOptions(group.name, group.size, counts, np.zeros(len(counts)))
    return out


def plan_of(graph: Graph, choice: Choice, saliency: dict[str, Any] | None = None) -> Plan:
    """The plan that keeps the most salient units (the first ones, without saliency) and has the choice's formats."""
    widths = {}
    for name, count in choice.kept.items():
        if count < graph.sizes[name]:
            widths[name] = tuple(range(count)) if saliency is None else kept_units(saliency[name], count)
    dead = {n for r in choice.skipped for n in graph.region(r).nodes}
    addresses = {graph.program.origins[n].address for n in dead}
    formats = dict.fromkeys(sorted((choice.int8 & set(graph.sites)) - addresses), "int8")
    return Plan(graph.program.fingerprint, widths, tuple(choice.skipped), formats)
