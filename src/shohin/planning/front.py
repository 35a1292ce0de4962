"""Plans for several budgets and precisions: the front from which views are evaluated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from shohin.errors import BudgetError
from shohin.planning.choice import Choice
from shohin.planning.options import GroupOptions, RegionOption
from shohin.planning.relinearize import Planned, plan_for_budget
from shohin.planning.resources import Costs

FRACTIONS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.9)


@dataclass(frozen=True)
class Precision:
    """An assignment of precisions.

    Args:
        name: for the report.
        int8: addresses of the operations in int8.
        loss: estimated loss of the assignment, added to the loss of the widths.
    """

    name: str
    int8: frozenset[str] = field(default_factory=frozenset)
    loss: float = 0.0


@dataclass(frozen=True)
class Point:
    """A plan of the front: the precision, and the bound of the swept resource for which it was made."""

    precision: str
    bound: float
    plan: Planned


def front(
    costs: Costs,
    options: Sequence[GroupOptions],
    regions: Sequence[RegionOption],
    *,
    precisions: Sequence[Precision] = (Precision("float32"),),
    fractions: Collection[float] = FRACTIONS,
    budgets: Mapping[str, float] | None = None,
    resource: str = "latency_ms",
    rounds: int = 3,
    method: str = "relinearized",
    time_limit_s: float = 10.0,
) -> tuple[list[Point], list[Point]]:
    """(plans that fit, cheapest first and without duplicates; what could not be met, with the cheapest choice each).

    Args:
        costs, options, regions, rounds, method, time_limit_s: as for `shohin.planning.relinearize.plan_for_budget`.
        precisions: each is planned by itself. A plan for one bound is the second start of the next one.
        fractions: bounds of the swept resource, relative to the unchanged model in float32.
        budgets: further bounds that every plan must keep; a bound of the swept resource is an upper limit of the sweep and
            is itself part of it.
        resource: that is swept.

    Raises:
        BudgetError: if a fraction is not positive.
    """
    if any(not f > 0 for f in fractions):
        raise BudgetError(f"the fractions of a front must be positive, got {sorted(fractions)}")
    whole = costs.of(Choice({g.name: g.size for g in options}), [resource])[resource]
    limits = dict(budgets or {})
    bounds = {f * whole for f in fractions}
    if resource in limits:
        bounds = {b for b in bounds if b < limits[resource]} | {limits[resource]}
    fit: dict[Choice, Point] = {}
    failed: list[Point] = []
    for precision in precisions:
        start: Choice | None = None
        for bound in sorted(bounds, reverse=True):
            plan = plan_for_budget(
                costs,
                options,
                regions,
                {**limits, resource: bound},
                int8=precision.int8,
                start=start,
                rounds=rounds,
                offset=precision.loss,
                method=method,
                time_limit_s=time_limit_s,
            )
            if plan.feasible:
                start = plan.choice
                # The same plan for several bounds is named by the tightest one.
                fit[plan.choice] = Point(precision.name, bound, plan)
            else:
                failed.append(Point(precision.name, bound, plan))
    return sorted(fit.values(), key=lambda p: (p.plan.predicted[resource], p.plan.loss)), failed
