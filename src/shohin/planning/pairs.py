"""The exact program of a plan: costs as tables over the options of at most two groups, without linearization."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shohin.errors import PlanError
from shohin.graph.costs import Term
from shohin.planning.options import GroupOptions, RegionOption
from shohin.planning.resources import Costs
from shohin.planning.solve import JointTable, Problem

Floats = npt.NDArray[np.float64]


def monomials(term: Term) -> Iterator[tuple[float, dict[str, int]]]:
    """The term multiplied out: (coefficient, group -> power)."""
    for picks in itertools.product(*([("", e.fixed), *e.per_unit.items()] for e in term.extents)):
        coefficient, powers = term.coefficient, dict[str, int]()
        for group, factor in picks:
            coefficient *= factor
            if group:
                powers[group] = powers.get(group, 0) + 1
        if coefficient:
            yield coefficient, powers


def pair_problem(
    costs: Costs, options: Sequence[GroupOptions], regions: Sequence[RegionOption], budgets: Mapping[str, float], int8: Collection[str]
) -> Problem:
    """The problem with pair variables for every product of two widths.

    Args:
        costs: of the model.
        options: for every group of the costs.
        regions: with their private groups (`shohin.planning.options.place_regions`).
        budgets: as for `shohin.planning.relinearize.plan_for_budget`.
        int8: addresses.

    Raises:
        PlanError: if a cost is a product of the widths of three or more groups; use the relinearization there.
    """
    counts = {g.name: np.array(g.counts, dtype=np.float64) for g in options}
    names = {r.name for r in regions}
    home = {g.name: frozenset(r.name for r in regions if g.name in r.private) for g in options}
    rows = costs.rows_of(budgets)
    tables: dict[tuple[tuple[str, ...], frozenset[str]], dict[str, Floats]] = {}
    fixed = dict.fromkeys(rows, 0.0)
    for resource in rows:
        for piece in costs.pieces(resource, int8):
            for coefficient, powers in (m for t in piece.terms for m in monomials(t)):
                groups = tuple(sorted(powers))
                if len(groups) > 2:
                    raise PlanError(
                        f"{resource} depends on the widths of {', '.join(groups)} together; pair variables hold two groups only"
                    )
                # What is made of a group inside a region vanishes with it (memory has no regions of its own).
                inside = (piece.regions & names).union(*(home[g] for g in groups))
                value = np.array(coefficient * piece.rate)
                for group in groups:
                    value = value[..., None] * counts[group] ** powers[group]
                if not value.any():
                    continue
                table = tables.setdefault((groups, inside), {})
                table[resource] = table[resource] + value if resource in table else value
    separable: dict[str, dict[str, Floats]] = {r: {} for r in rows}
    keep: dict[str, dict[str, float]] = {r: {} for r in rows}
    joint = []
    for (groups, inside), table in tables.items():
        if not groups and not inside:
            for resource, constant in table.items():
                fixed[resource] += float(constant)
        elif not groups and len(inside) == 1:
            for resource, constant in table.items():
                keep[resource][min(inside)] = keep[resource].get(min(inside), 0.0) + float(constant)
        elif len(groups) == 1 and home[groups[0]] == inside:
            for resource, values in table.items():
                separable[resource][groups[0]] = separable[resource].get(groups[0], 0.0) + values
        else:
            joint.append(JointTable(groups, table, inside))
    return Problem(tuple(options), separable, rows, tuple(regions), keep, fixed, tuple(joint))
