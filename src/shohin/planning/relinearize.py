"""Plans for a budget by separable relinearization of the true costs, each round solved exactly.

The cost of an operation depends on two widths, its input's and its output's. Around a choice it is replaced by the sum over
groups of the change if only that group changed; the exact solver finds the best choice of these tables; its true cost
corrects the bound; the next round starts there. At last single and paired moves are tried against the true costs. Only
choices that fit the budget by the full, non-linear costs are returned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from shohin.errors import PlanError
from shohin.planning.choice import Choice
from shohin.planning.options import GroupOptions, RegionOption, place_regions
from shohin.planning.pairs import pair_problem
from shohin.planning.resources import RESOURCES, Costs
from shohin.planning.solve import TOLERANCE, OutOfTimeError, Problem, Solution, describe, solve

Floats = npt.NDArray[np.float64]
Point = tuple[npt.NDArray[np.int64], frozenset[str]]  # option of each group, skipped regions


@dataclass(frozen=True)
class Planned:
    """A plan for one budget.

    Args:
        choice: that fits the budget by the full costs; if infeasible, the cheapest choice.
        loss: by the tables.
        predicted: resource -> value by the full costs.
        gap: proved relative gap of the last solution, with respect to its tables.
        note: how it was found, "relinearized" or "pairs".
        misses: resource -> (value, bound) that cannot be met; empty if feasible.
        binding: one sentence on what cannot be met; empty if feasible.
        rounds: for each solution its loss, and true cost over bound for each bounded resource.
    """

    choice: Choice
    loss: float
    predicted: Mapping[str, float]
    gap: float
    note: str
    misses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    binding: str = ""
    rounds: tuple[Mapping[str, float], ...] = ()

    @property
    def feasible(self) -> bool:
        """True if the budget holds by the full costs."""
        return not self.misses


class Space:
    """The options of one model in one assignment of precisions, with their true and their linearized costs."""

    def __init__(
        self,
        costs: Costs,
        options: Sequence[GroupOptions],
        regions: Sequence[RegionOption],
        budgets: Mapping[str, float],
        int8: Collection[str],
        offset: float = 0.0,
    ) -> None:
        features = costs.features
        self.costs, self.int8, self.offset = costs, frozenset(int8), offset
        self.options = sorted(options, key=lambda g: g.name)
        missing = sorted(set(features.groups) - {g.name for g in options})
        if missing:
            raise PlanError(
                f"no options were given for the unit group {missing[0]!r}; a group that must stay needs its full size as only count"
            )
        self.regions = place_regions(sorted((r for r in regions if r.name in features.regions), key=lambda r: r.name), features.operators)
        self.by_region = {r.name: r for r in self.regions}
        self.rows = costs.rows_of(budgets)
        self.counts = [np.array(g.counts) for g in self.options]
        self.column = {g: i for i, g in enumerate(features.groups)}

    def widths(self, picks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Options (batch, groups) to kept counts in the costs' order of groups."""
        out = np.zeros((len(picks), len(self.column)), dtype=np.int64)
        for i, (g, counts) in enumerate(zip(self.options, self.counts, strict=True)):
            if g.name in self.column:
                out[:, self.column[g.name]] = counts[picks[:, i]]
        return out

    def skips(self, sets: Sequence[frozenset[str]]) -> npt.NDArray[np.bool_]:
        """Skipped regions as (batch, regions) in the costs' order."""
        names = self.costs.features.regions
        return np.array([[r in s for r in names] for s in sets], dtype=bool).reshape(len(sets), len(names))

    def true(self, picks: npt.NDArray[np.int64], skipped: frozenset[str]) -> dict[str, Floats]:
        """Bounded rows by the full costs, for options of shape (batch, groups)."""
        return self.costs.table(self.widths(picks), np.repeat(self.skips([skipped]), len(picks), 0), self.int8, self.rows)

    def excess(self, picks: npt.NDArray[np.int64], skipped: frozenset[str]) -> Floats:
        """Largest cost over bound of each, by the full costs; at most 1 is feasible. Shape (batch,)."""
        values = self.true(picks, skipped)
        return np.asarray(np.max([np.zeros(len(picks)), *(values[r] / max(bound, 1e-300) for r, bound in self.rows.items())], axis=0))

    def dead(self, skipped: frozenset[str]) -> set[str]:
        """Groups inside skipped regions."""
        return {g for r in skipped for g in self.by_region[r].private}

    def loss(self, point: Point) -> float:
        """By the tables."""
        picks, skipped = point
        dead = self.dead(skipped)
        widths = sum(float(g.loss[k]) for g, k in zip(self.options, picks, strict=True) if g.name not in dead)
        return self.offset + widths + sum(self.by_region[r].loss for r in skipped)

    def choice(self, point: Point) -> Choice:
        """With the full size for groups inside skipped regions."""
        picks, skipped = point
        dead = self.dead(skipped)
        return Choice(
            {g.name: g.size if g.name in dead else g.counts[k] for g, k in zip(self.options, picks, strict=True)}, skipped, self.int8
        )

    def point(self, kept: Mapping[str, int], skipped: Collection[str], previous: Point | None = None) -> Point:
        """The nearest options; groups inside skipped regions keep their previous option, for when the region returns."""
        cut = frozenset(skipped) & frozenset(self.by_region)
        picks = np.array([int(np.argmin(np.abs(c - kept.get(g.name, g.size)))) for g, c in zip(self.options, self.counts, strict=True)])
        if previous is not None:
            dead = self.dead(cut)
            picks = np.where([g.name in dead for g in self.options], previous[0], picks)
        return picks, cut

    def linearize(self, point: Point) -> Problem:
        """Tables of the change of cost if only one group or region changed, around a point; exact at the point itself."""
        picks, skipped = point
        rows, sets = [picks], [skipped]
        spans = []
        for i, g in enumerate(self.options):
            # Inside a skipped region a width is judged as if the region were kept: that is when its tables count.
            alive = skipped - {r.name for r in self.regions if g.name in r.private}
            block = np.repeat(picks[None], len(g.counts), 0)
            block[:, i] = range(len(g.counts))
            spans.append(slice(len(rows), len(rows) + len(g.counts)))
            rows += list(block)
            sets += [alive] * len(g.counts)
        for r in self.regions:
            kept = skipped - {r.name} - r.conflicts
            rows += [picks, picks]
            sets += [kept, kept | {r.name}]
        values = self.costs.table(self.widths(np.array(rows)), self.skips(sets), self.int8, self.rows)
        tables: dict[str, dict[str, Floats]] = {}
        keep: dict[str, dict[str, float]] = {}
        fixed = {}
        first = len(rows) - 2 * len(self.regions)
        for resource, v in values.items():
            tables[resource] = {g.name: v[s] - v[s][k] for g, s, k in zip(self.options, spans, picks, strict=True)}
            keep[resource] = {r.name: float(v[first + 2 * i] - v[first + 2 * i + 1]) for i, r in enumerate(self.regions)}
            fixed[resource] = float(v[0]) - sum(c for r, c in keep[resource].items() if r not in skipped)
        return Problem(tuple(self.options), tables, self.rows, tuple(self.regions), keep, fixed)

    def cheapest(self) -> Point:
        """The choice that fits best: all widths smallest, and the regions whose skipping helps most."""
        picks = np.zeros(len(self.options), dtype=np.int64)
        if self.excess(picks[None], frozenset())[0] <= 1 + TOLERANCE or not self.regions:
            return picks, frozenset()
        problem = self.linearize((picks, frozenset()))
        costs = {r: {g: t[:1] for g, t in tables.items()} for r, tables in problem.costs.items()}
        found = solve(replace(problem, groups=[_only(g, 0) for g in self.options], costs=costs))
        return picks, found.skipped

    def uniform(self, skipped: frozenset[str]) -> Point:
        """The widest choice of one fraction for all groups that fits, or the smallest widths."""
        levels = np.linspace(0, 1, 101)
        picks = np.array([[int(np.searchsorted(c, f * c[-1] + 1e-9, side="right")) - 1 for c in self.counts] for f in levels])
        picks = np.maximum(picks, 0)
        fits = np.flatnonzero(self.excess(picks, skipped) <= 1 + TOLERANCE)
        return picks[int(fits[-1]) if len(fits) else 0], skipped


def _only(group: GroupOptions, k: int) -> GroupOptions:
    """A group that is held at one option; its size is that count, so that the table is well formed."""
    return GroupOptions(group.name, group.counts[k], (group.counts[k],), group.loss[k : k + 1])


def plan_for_budget(
    costs: Costs,
    options: Sequence[GroupOptions],
    regions: Sequence[RegionOption],
    budgets: Mapping[str, float],
    *,
    int8: Collection[str] = frozenset(),
    start: Choice | None = None,
    rounds: int = 3,
    offset: float = 0.0,
    method: str = "relinearized",
    time_limit_s: float = 10.0,
) -> Planned:
    """The choice of least loss that fits the budgets by the full costs.

    Args:
        costs: latency model and static costs.
        options: for every group on which a cost depends.
        regions: that may be skipped; what they contain is read off the operators. One without operators saves nothing and is kept.
        budgets: resource ("latency_ms", "size_bytes", "memory_bytes", "macs", "params") -> upper bound.
        int8: addresses of the operations in int8.
        start: a second starting point, such as the plan for a neighbouring budget.
        rounds: of relinearization from each start.
        offset: loss of the precision, added to all losses.
        method: "relinearized", or "pairs": exact with pair variables as well (seconds; refuses products of three widths). If
            time runs out before they are better, the relinearized plan is returned, and its note says so.
        time_limit_s: of each call of the solver.

    Raises:
        PlanError: if a group has no options, or a product of three widths is asked of "pairs".
        BudgetError: if a resource cannot be bounded.
    """
    if method not in ("relinearized", "pairs"):
        raise PlanError(f"unknown method {method!r}; known: relinearized, pairs")
    space = Space(costs, options, regions, budgets, int8, offset)
    cheapest = space.cheapest()
    if not space.excess(cheapest[0][None], cheapest[1])[0] <= 1 + TOLERANCE:
        return _planned(space, cheapest, 0.0, budgets, method, [])
    starts = [space.uniform(cheapest[1])]
    if start is not None:
        starts.append(space.point(start.kept, start.skipped))
    best, gap, log = starts[0], 0.0, list[Mapping[str, float]]()
    for point in starts:
        for _ in range(rounds):
            try:
                found, point, reached = _round(space, point, time_limit_s, log)
            except OutOfTimeError:
                break  # what fits already is kept
            if reached is not None and space.loss(reached) < space.loss(best) - 1e-12:
                best, gap = reached, found.gap
            if reached is not None:
                point = reached
    best = _polish(space, best)
    relinearized = _planned(space, best, gap, budgets, "relinearized", log)
    if method == "relinearized":
        return relinearized
    problem = pair_problem(costs, space.options, space.regions, budgets, space.int8)
    try:
        exact = solve(problem, time_limit_s=time_limit_s)
    except OutOfTimeError:
        return relinearized
    point = space.point(exact.kept, exact.skipped)
    if not exact.feasible or space.excess(point[0][None], point[1])[0] > 1 + TOLERANCE or space.loss(point) > space.loss(best):
        return relinearized
    return _planned(space, point, exact.gap, budgets, "pairs", log)


def _round(space: Space, around: Point, time_limit_s: float, log: list[Mapping[str, float]]) -> tuple[Solution, Point, Point | None]:
    """One linearization, solved with corrected bounds until its true cost fits: (last solution, its point, best that fits)."""
    problem = space.linearize(around)
    bounds = dict(problem.budgets)
    best: Point | None = None
    for attempt in range(4):
        found = solve(replace(problem, budgets=bounds), time_limit_s=time_limit_s, relative_gap=1e-4)
        point = space.point(found.kept, found.skipped, around)
        true = space.true(point[0][None], point[1])
        share = {r: float(true[r][0]) / max(bound, 1e-300) for r, bound in space.rows.items()}
        log.append({"loss": space.loss(point), **share})
        fits = max(share.values(), default=0.0) <= 1 + TOLERANCE
        if fits and (best is None or space.loss(point) < space.loss(best)):
            best = point
        if fits and (attempt >= 2 or not share or max(share.values()) > 0.995):
            break
        # What the tables got wrong at this point is taken off the bound (or given back), a little more each time.
        for r, bound in space.rows.items():
            error = float(true[r][0]) - found.totals[r]
            bounds[r] = bound - error * (1 + 0.25 * attempt if error > 0 else 1.0)
    return found, point, best


def _polish(space: Space, point: Point, tries: int = 256, steps: int = 12) -> Point:
    """Moves of one group or of two groups together that lower the loss and fit by the full costs, best first, until none is left."""
    picks, skipped = point
    dead = space.dead(skipped)
    free = [i for i, g in enumerate(space.options) if g.name not in dead]
    for _ in range(steps):
        if not free:
            break
        problem = space.linearize((picks, skipped))
        owner = np.concatenate([np.full(len(space.counts[i]), i) for i in free])
        option = np.concatenate([np.arange(len(space.counts[i])) for i in free])
        gain = np.concatenate([space.options[i].loss - space.options[i].loss[picks[i]] for i in free])
        pair_gain = gain[:, None] + gain[None]
        allowed = (owner[:, None] < owner[None]) & (pair_gain < -1e-12)
        now = space.true(picks[None], skipped)
        for r, bound in space.rows.items():
            change = np.concatenate([problem.costs[r][space.options[i].name] for i in free])
            # The tables only choose what is tried; 2 % of slack leaves room for their error.
            allowed &= change[:, None] + change[None] <= bound - now[r][0] + 0.02 * abs(bound)
        first, second = np.nonzero(allowed)
        order = np.argsort(pair_gain[first, second], kind="stable")[:tries]
        single = np.flatnonzero(gain < -1e-12)
        rows = np.repeat(picks[None], len(order) + len(single), 0)
        n = np.arange(len(order))
        rows[n, owner[first[order]]] = option[first[order]]
        rows[n, owner[second[order]]] = option[second[order]]
        rows[len(order) + np.arange(len(single)), owner[single]] = option[single]
        gains = np.concatenate([pair_gain[first[order], second[order]], gain[single]])
        fits = np.flatnonzero(space.excess(rows, skipped) <= 1 + TOLERANCE) if len(rows) else np.zeros(0, dtype=np.int64)
        if len(fits) == 0:
            break
        picks = rows[fits[int(np.argmin(gains[fits]))]]
    return picks, skipped


def _planned(space: Space, point: Point, gap: float, budgets: Mapping[str, float], note: str, log: list[Mapping[str, float]]) -> Planned:
    choice = space.choice(point)
    known = [r for r in RESOURCES if r != "memory_bytes" or space.costs.memory]
    predicted = space.costs.of(choice, known)
    misses = {r: (predicted[r], b) for r, b in budgets.items() if predicted[r] > b * (1 + TOLERANCE)}
    return Planned(choice, space.loss(point), predicted, gap, note, misses, describe(misses), tuple(log))
