import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shohin.errors import PlanError
from shohin.planning.options import GroupOptions, RegionOption, aligned_counts
from shohin.planning.solve import JointTable, Problem, solve

RESOURCES = ("latency_ms", "size_bytes")


def problem(seed: int, groups: int, regions: int, joint: bool, whole_numbers: bool, tightness: float) -> Problem:
    """A random instance: regions own some groups, neighbours among them conflict, joint costs join neighbouring groups."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.integers(0, 6, shape).astype(float) if whole_numbers else random.gamma(1, 1, shape)

    options = []
    for i in range(groups):
        n = int(random.integers(1, 5))
        options.append(GroupOptions(f"g{i}", n, tuple(range(1, n + 1)), draw(n)))
    places = []
    for i in range(regions):
        private = frozenset({f"g{i}"} if i < groups else ())
        places.append(RegionOption(f"r{i}", float(draw(1)[0]), private, frozenset({f"r{i + 1}"} if i % 2 == 0 and i + 1 < regions else ())))
    costs = {r: {g.name: draw(len(g.counts)) - (0 if whole_numbers else 0.3) for g in options} for r in RESOURCES}
    keep = {r: {p.name: float(draw(1)[0]) for p in places} for r in RESOURCES}
    tables = []
    if joint:
        for a, b in itertools.pairwise(options):
            inside = frozenset(p.name for p in places if p.private & {a.name, b.name})
            tables.append(JointTable((a.name, b.name), {r: draw(len(a.counts), len(b.counts)) for r in RESOURCES}, inside))
        # A table of one group that vanishes with a region the group is not part of.
        if places and groups > regions:
            tables.append(JointTable((options[-1].name,), {RESOURCES[0]: draw(len(options[-1].counts))}, frozenset({places[0].name})))
    bare = Problem(options, costs, {}, places, keep, {RESOURCES[0]: 0.5}, tables)
    totals = [t for _, t, _ in every(bare)]
    budgets = {r: float(np.quantile([t[r] for t in totals], tightness)) for r in RESOURCES}
    return Problem(options, costs, budgets, places, keep, {RESOURCES[0]: 0.5}, tables)


def every(p: Problem):
    """All (choice, totals, loss), by definition and without any linear algebra."""
    for flags in itertools.product((False, True), repeat=len(p.regions)):
        skipped = {r.name for r, f in zip(p.regions, flags, strict=True) if f}
        if any(r.conflicts & skipped for r in p.regions if r.name in skipped):
            continue
        if any(b.name in a.conflicts for a in p.regions for b in p.regions if {a.name, b.name} <= skipped):
            continue
        dead = {g for r in p.regions if r.name in skipped for g in r.private}
        if sum(len(r.private & dead) for r in p.regions if r.name in skipped) > len(dead):
            continue
        alive = [g for g in p.groups if g.name not in dead]
        for picks in itertools.product(*(range(len(g.counts)) for g in alive)):
            at = {g.name: k for g, k in zip(alive, picks, strict=True)}
            totals = {}
            for r in RESOURCES:
                value = p.fixed.get(r, 0.0) + sum(p.costs[r][n][k] for n, k in at.items())
                value += sum(c for n, c in p.keep_costs[r].items() if n not in skipped)
                for t in p.joint:
                    if r in t.costs and not t.regions & skipped:
                        value += t.costs[r][tuple(at[g] for g in t.groups)]
                totals[r] = float(value)
            loss = sum(float(g.loss[at[g.name]]) for g in alive) + sum(r.loss for r in p.regions if r.name in skipped)
            yield (at, frozenset(skipped)), totals, loss


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 5),
    regions=st.integers(0, 3),
    joint=st.booleans(),
    whole_numbers=st.booleans(),
    tightness=st.sampled_from([0.0, 0.05, 0.2, 0.6]),
)
def test_equals_brute_force(seed, groups, regions, joint, whole_numbers, tightness):
    p = problem(seed, groups, min(regions, groups), joint, whole_numbers, tightness)
    fitting = [(loss, totals) for _, totals, loss in every(p) if all(totals[r] <= b + 1e-9 * abs(b) + 1e-12 for r, b in p.budgets.items())]
    found = solve(p)
    assert found.feasible == bool(fitting)
    if fitting:
        assert found.status == "optimal" and found.gap == 0
        assert found.objective == pytest.approx(min(loss for loss, _ in fitting), rel=1e-7, abs=1e-7)
        assert all(found.totals[r] <= b + 1e-9 * max(abs(b), 1) for r, b in p.budgets.items())
    else:
        assert found.status == "infeasible"
        if min(abs(b) for b in p.budgets.values()) < 0.1:
            return  # a fraction of nearly nothing
        best = min(max((t[r] - b) / max(abs(b), 1e-12) for r, b in p.budgets.items()) for _, t, _ in every(p))
        mine = max((found.totals[r] - b) / max(abs(b), 1e-12) for r, b in p.budgets.items())
        assert mine == pytest.approx(best, rel=1e-4, abs=1e-4)
        assert found.misses and all(r in found.binding for r in found.misses)
    # The reported choice has the reported totals and loss.
    same = [
        (totals, loss)
        for (at, skipped), totals, loss in every(p)
        if skipped == found.skipped and all(p.groups[int(n[1:])].counts[k] == found.kept[n] for n, k in at.items())
    ]
    assert len(same) == 1
    assert found.totals == pytest.approx(same[0][0]) and found.objective == pytest.approx(same[0][1])


def test_says_what_binds_and_by_how_much():
    g = GroupOptions("g", 16, (8, 16), np.array([1.0, 0.0]))
    found = solve(
        Problem(
            [g],
            {"latency_ms": {"g": np.array([2.0, 4.0])}, "size_bytes": {"g": np.array([10.0, 20.0])}},
            {"latency_ms": 1.5, "size_bytes": 15},
        )
    )
    assert not found.feasible and found.kept == {"g": 8}
    assert found.misses == {"latency_ms": (2.0, 1.5)}
    assert "latency_ms is at least 2" in found.binding and "0.5 above" in found.binding and "size" not in found.binding


def test_tiny_losses_are_not_lost_in_the_solvers_tolerance():
    g = [GroupOptions(f"g{i}", 2, (1, 2), np.array([1e-9 * (i + 1), 0.0])) for i in range(6)]
    found = solve(Problem(g, {"macs": {x.name: np.array([0.0, 1.0]) for x in g}}, {"macs": 4.0}))
    assert [found.kept[x.name] for x in g] == [1, 1, 2, 2, 2, 2]


def test_is_deterministic():
    p = problem(5, 5, 2, True, True, 0.2)
    a, b = solve(p), solve(p)
    assert (a.kept, a.skipped, a.objective) == (b.kept, b.skipped, b.objective)


def test_bad_tables_are_refused():
    g = GroupOptions("g", 2, (1, 2), np.zeros(2))
    with pytest.raises(PlanError, match="finite values"):
        Problem([g], {"macs": {"g": np.array([1.0, np.nan])}}, {})
    with pytest.raises(PlanError, match="finite values"):
        Problem([g], {"macs": {"other": np.zeros(2)}}, {})
    with pytest.raises(PlanError, match="unknown region"):
        Problem([g], {}, {}, keep_costs={"macs": {"r": 1.0}})
    with pytest.raises(PlanError, match="shape"):
        Problem([g], {}, {}, joint=[JointTable(("g",), {"macs": np.zeros(3)})])
    with pytest.raises(PlanError, match="bound"):
        Problem([g], {}, {"macs": float("inf")})
    with pytest.raises(PlanError, match="nothing to choose"):
        solve(Problem([], {}, {}))
    for counts in ((2, 1), (1,), (0, 2), ()):
        with pytest.raises(PlanError):
            GroupOptions("g", 2, counts, np.zeros(len(counts)))


@given(st.integers(1, 300), st.sampled_from([1, 4, 8, 16]), st.floats(0, 1), st.one_of(st.none(), st.integers(2, 12)))
def test_aligned_counts(size, multiple, fraction, most):
    counts = aligned_counts(size, multiple, fraction, most)
    assert counts[-1] == size and list(counts) == sorted(set(counts))
    assert all(c % multiple == 0 and c >= fraction * size - 1e-6 for c in counts[:-1])
    assert most is None or len(counts) <= most
    if size <= multiple:
        assert counts == (size,)
    whole = aligned_counts(size, multiple, fraction)
    assert set(counts) <= set(whole) and counts[0] == whole[0]
    assert most is not None or set(whole) == {c for c in range(multiple, size, multiple) if c >= fraction * size - 1e-6} | {size}
