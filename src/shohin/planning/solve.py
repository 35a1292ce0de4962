"""The exact solver: one option per group, regions kept or skipped, several resources bounded, least total loss.

A multiple-choice knapsack as a mixed-integer program for HiGHS. A skipped region's private groups choose no option at all:
``sum_k x[g, k] = 1 - sum_r y[r]`` over the regions r that contain g, so they cost and lose nothing. Costs that depend on
two groups are exact through pair variables with the marginals of the local polytope (`JointTable`). "Optimal" and the gap
refer to the given tables.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shohin.errors import PlanError
from shohin.planning.options import GroupOptions, RegionOption

Floats = npt.NDArray[np.float64]
TOLERANCE = 1e-9  # relative, of a budget


class OutOfTimeError(PlanError):
    """The solver's time ran out before it had any choice."""


@dataclass(frozen=True, eq=False)
class JointTable:
    """Costs that depend on the options of up to two groups together and vanish if a region is skipped.

    Args:
        groups: names of at most two groups.
        costs: resource -> array over the options of the groups, in that order.
        regions: skipping any of these makes the cost vanish.
    """

    groups: tuple[str, ...]
    costs: Mapping[str, Floats]
    regions: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Problem:
    """What the solver minimizes under what bounds.

    Args:
        groups: options with their loss.
        costs: resource -> group -> cost of each option (any sign); absent entries cost nothing.
        budgets: resource -> upper bound of the total.
        regions: that may be skipped.
        keep_costs: resource -> region -> cost that is saved by skipping it.
        fixed: resource -> cost that no choice changes.
        joint: costs that depend on two groups.

    Raises:
        PlanError: if a table names an unknown group or region, has the wrong shape, or holds NaN or infinities.
    """

    groups: Sequence[GroupOptions]
    costs: Mapping[str, Mapping[str, Floats]]
    budgets: Mapping[str, float]
    regions: Sequence[RegionOption] = ()
    keep_costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    joint: Sequence[JointTable] = ()

    def __post_init__(self) -> None:
        lengths = {g.name: len(g.counts) for g in self.groups}
        regions = {r.name for r in self.regions}
        if len(lengths) != len(self.groups) or len(regions) != len(self.regions):
            raise PlanError("two groups or two regions have the same name")
        for resource, tables in self.costs.items():
            for group, table in tables.items():
                if group not in lengths or np.shape(table) != (lengths[group],) or not np.isfinite(table).all():
                    raise PlanError(
                        f"cost table {resource!r} of group {group!r} needs {lengths.get(group, 0)} finite values, one per option"
                    )
        for resource, keep in self.keep_costs.items():
            for region, cost in keep.items():
                if region not in regions or not np.isfinite(cost):
                    raise PlanError(f"cost {resource!r} of keeping region {region!r}: unknown region or not a finite number ({cost})")
        for joint in self.joint:
            shape = tuple(lengths.get(g, 0) for g in joint.groups)
            if not len(set(joint.groups)) == len(joint.groups) <= 2 or not joint.regions <= regions:
                raise PlanError(
                    f"a joint cost needs at most two different groups and known regions, got {joint.groups} in {set(joint.regions)}"
                )
            if any(np.shape(c) != shape or not np.isfinite(c).all() for c in joint.costs.values()):
                raise PlanError(f"joint cost of {joint.groups} needs finite values of shape {shape}")
        for resource, bound in self.budgets.items():
            if not np.isfinite(bound):
                raise PlanError(f"the bound of {resource!r} is {bound}; leave out what is not bounded")


@dataclass(frozen=True)
class Solution:
    """The solver's answer.

    Args:
        kept: group -> count; groups inside a skipped region have their full size, which costs nothing.
        skipped: regions.
        objective: total loss.
        totals: resource -> total cost, for every resource of the problem.
        gap: proved relative distance of the objective to the optimum of the tables; 0 is optimal.
        status: "optimal", "feasible" (stopped by time) or "infeasible": then this is the choice that misses the bounds by
            the smallest fraction.
        misses: resource -> (total, bound) of the bounds that are missed; empty if feasible.
        binding: one sentence on what cannot be met; empty if feasible.
    """

    kept: Mapping[str, int]
    skipped: frozenset[str]
    objective: float
    totals: Mapping[str, float]
    gap: float
    status: str
    misses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    binding: str = ""

    @property
    def feasible(self) -> bool:
        """True if all bounds hold."""
        return not self.misses


class _Program:
    """Columns and rows: x (options), y (skips), z (pairs), t (largest relative excess, used only if infeasible)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.first: dict[str, int] = {}
        self.sizes = {g.name: len(g.counts) for g in problem.groups}
        n = 0
        for g in problem.groups:
            self.first[g.name], n = n, n + len(g.counts)
        self.options = n
        self.skip = {r.name: n + i for i, r in enumerate(problem.regions)}
        n += len(problem.regions)
        self.integers = n
        self.pairs = []
        for table in problem.joint:
            self.pairs.append(n)
            n += int(np.prod([self._size(g) for g in table.groups]))
        self.excess = n
        self.columns = n + 1
        self.home = {g.name: frozenset(r.name for r in problem.regions if g.name in r.private) for g in problem.groups}
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        self._structure()
        self.resources = sorted(
            {*problem.costs, *problem.budgets, *problem.keep_costs, *problem.fixed, *(r for j in problem.joint for r in j.costs)}
        )
        self.cost, self.constant = {}, {}
        for resource in self.resources:
            self.cost[resource], self.constant[resource] = self._resource(resource)
        # What counts as one unit of a bound; a bound near zero is measured by its costs.
        self.scale = {r: max(abs(b), 1e-3 * float(np.abs(self.cost[r]).max()), 1e-12) for r, b in problem.budgets.items()}
        self.loss = np.zeros(self.columns)
        for g in problem.groups:
            self.loss[self._span(g.name)] = g.loss
        for r in problem.regions:
            self.loss[self.skip[r.name]] = r.loss

    def _size(self, group: str) -> int:
        return self.sizes[group]

    def _span(self, group: str) -> slice:
        return slice(self.first[group], self.first[group] + self._size(group))

    def _structure(self) -> None:
        for g in self.problem.groups:
            span, regions = self._span(g.name), [self.skip[r] for r in sorted(self.home[g.name])]
            columns = [*range(span.start, span.stop), *regions]
            self.rows.append((columns, [1.0] * len(columns), 1.0, 1.0))
        exclusive: set[tuple[str, str]] = set()
        for a in self.problem.regions:
            for b in self.problem.regions:
                if a.name < b.name and (b.name in a.conflicts or a.name in b.conflicts or a.private & b.private):
                    self.rows.append(([self.skip[a.name], self.skip[b.name]], [1.0, 1.0], -np.inf, 1.0))
                    exclusive.add((a.name, b.name))
        for start, table in zip(self.pairs, self.problem.joint, strict=True):
            sizes = [self._size(g) for g in table.groups]
            z = start + np.arange(int(np.prod(sizes))).reshape(sizes)
            inside = [self.skip[r] for r in sorted(table.regions)]
            mass = z.ravel().tolist()
            ones = [1.0] * (len(mass) + len(inside))
            # The operation is alive if none of its regions is skipped; if several may be skipped at once, it dies only once.
            several = not all((a, b) in exclusive for a in table.regions for b in table.regions if a < b)
            self.rows.append(([*mass, *inside], ones, 1.0, np.inf if several else 1.0))
            if several:
                self.rows += [([*mass, y], [1.0] * (len(mass) + 1), -np.inf, 1.0) for y in inside]
            for axis, group in enumerate(table.groups):
                # A group that outlives the operation still has an option when the operation is gone: then only an upper bound.
                low = 0.0 if self.home[group] == table.regions else -np.inf
                for k, zs in enumerate(np.moveaxis(z, axis, 0).reshape(sizes[axis], -1).tolist()):
                    self.rows.append(([*zs, self.first[group] + k], [1.0] * len(zs) + [-1.0], low, 0.0))

    def _resource(self, resource: str) -> tuple[Floats, float]:
        problem = self.problem
        row, constant = np.zeros(self.columns), float(problem.fixed.get(resource, 0.0))
        for group, table in problem.costs.get(resource, {}).items():
            row[self._span(group)] += table
        for region, cost in problem.keep_costs.get(resource, {}).items():
            row[self.skip[region]] -= cost
            constant += cost
        for start, joint in zip(self.pairs, problem.joint, strict=True):
            if resource in joint.costs:
                values = np.ravel(joint.costs[resource])
                row[start : start + len(values)] += values
        return row, constant

    def run(self, objective: Floats, slack: bool, margins: Mapping[str, float], time_limit_s: float, gap: float) -> Any:
        import scipy.optimize  # here, because it takes a third of a second
        import scipy.sparse

        rows = self.rows
        matrix = scipy.sparse.csr_matrix(
            (
                [v for _, values, _, _ in rows for v in values],
                ([i for i, (columns, *_) in enumerate(rows) for _ in columns], [c for columns, *_ in rows for c in columns]),
            ),
            shape=(len(rows), self.columns),
        )
        constraints = [scipy.optimize.LinearConstraint(matrix, [r[2] for r in rows], [r[3] for r in rows])]
        if self.problem.budgets:
            dense, upper = [], []
            for resource, bound in self.problem.budgets.items():
                # Rows are scaled so that the solver's absolute tolerance is far below any difference that matters.
                unit = 1e3 / self.scale[resource]
                row = self.cost[resource] * unit
                row[self.excess] = -1e3
                dense.append(row)
                upper.append((bound - self.constant[resource]) * unit - margins.get(resource, 0.0) * 1e3)
            constraints.append(scipy.optimize.LinearConstraint(scipy.sparse.csr_matrix(np.array(dense)), -np.inf, np.array(upper)))
        upper_bounds = np.ones(self.columns)
        upper_bounds[self.excess] = np.inf if slack else 0.0
        integrality = np.zeros(self.columns)
        integrality[: self.integers] = 1
        integrality[self.excess] = 0 if slack else 1
        with _quiet():
            return scipy.optimize.milp(
                objective,
                integrality=integrality,
                bounds=scipy.optimize.Bounds(np.zeros(self.columns), upper_bounds),
                constraints=constraints,
                options={"mip_rel_gap": gap, "time_limit": time_limit_s},
            )

    def read(self, x: Floats) -> tuple[dict[str, int], frozenset[str], dict[str, float], float]:
        """(kept, skipped, totals, loss) with integers rounded and pairs recomputed from them, so that totals are exact."""
        skipped = frozenset(r for r, i in self.skip.items() if x[i] > 0.5)
        clean = np.zeros(self.columns)
        kept: dict[str, int] = {}
        option: dict[str, int | None] = {}
        for g in self.problem.groups:
            if self.home[g.name] & skipped:
                kept[g.name], option[g.name] = g.size, None
                continue
            k = int(np.argmax(x[self._span(g.name)]))
            kept[g.name], option[g.name] = g.counts[k], k
            clean[self.first[g.name] + k] = 1
        for r in skipped:
            clean[self.skip[r]] = 1
        for start, table in zip(self.pairs, self.problem.joint, strict=True):
            if not table.regions & skipped:
                sizes = [self._size(g) for g in table.groups]
                at = [option[g] or 0 for g in table.groups]
                clean[start + (int(np.ravel_multi_index(at, sizes)) if at else 0)] = 1
        totals = {r: float(self.cost[r] @ clean + self.constant[r]) for r in self.resources}
        return kept, skipped, totals, float(self.loss @ clean)

    def misses(self, totals: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Resource -> (total, bound) of the bounds that do not hold."""
        return {r: (totals[r], b) for r, b in self.problem.budgets.items() if totals[r] > b + TOLERANCE * self.scale[r]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS writes stray lines to the process's standard output, past Python: they go nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def solve(problem: Problem, *, time_limit_s: float = 10.0, relative_gap: float = 0.0) -> Solution:
    """The choice of least loss within the budgets, exactly (to ``relative_gap``).

    If nothing fits, the answer is the choice that misses the bounds by the smallest fraction, with status "infeasible".

    Args:
        problem: tables and bounds.
        time_limit_s: for the solver; then the best choice so far is returned with its gap.
        relative_gap: stop at this proved relative gap; 0 is exact.

    Raises:
        OutOfTimeError: if the solver stops at its time limit without any choice.
        PlanError: if there is nothing to choose.
    """
    if not problem.groups and not problem.regions:
        raise PlanError("there is nothing to choose: no unit groups and no regions")
    program = _Program(problem)
    # The solver's absolute gap is 1e-6: losses are scaled so that it is small beside every table.
    unit = 1e3 / max(float(np.abs(program.loss).max()), 1e-300)
    margins: dict[str, float] = {}
    for _ in range(4):
        result = program.run(program.loss * unit, False, margins, time_limit_s, relative_gap)
        if result.x is None:
            break
        kept, skipped, totals, loss = program.read(result.x)
        misses = program.misses(totals)
        if not misses:
            gap = max(float(result.mip_gap or 0.0), 0.0)
            return Solution(kept, skipped, loss, totals, gap, "optimal" if result.status == 0 else "feasible")
        # Within the solver's tolerance but outside ours: tighten that bound by the excess.
        for resource, (total, bound) in misses.items():
            margins[resource] = margins.get(resource, 0.0) + 2 * (total - bound) / program.scale[resource]
    if result.status == 1:
        raise OutOfTimeError(f"the solver found no choice within {time_limit_s} s; allow more time or give fewer options per group")
    least = np.zeros(program.columns)
    least[program.excess] = 1e3
    # Among the choices that miss by the same fraction the one of least loss.
    result = program.run(least + program.loss * unit * 1e-7, True, {}, time_limit_s, relative_gap)
    if result.x is None:
        raise OutOfTimeError(f"the solver found no choice within {time_limit_s} s; allow more time or give fewer options per group")
    kept, skipped, totals, loss = program.read(result.x)
    misses = program.misses(totals)
    return Solution(kept, skipped, loss, totals, 0.0, "infeasible", misses, describe(misses))


def describe(misses: Mapping[str, tuple[float, float]]) -> str:
    """One sentence on bounds that cannot be met."""
    parts = [
        f"{resource} is at least {total:.4g}, {total - bound:.3g} above its bound of {bound:.4g}"
        for resource, (total, bound) in misses.items()
    ]
    return f"no allowed choice fits: {'; '.join(parts)}" if parts else ""
