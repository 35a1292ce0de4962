import itertools
import time

import numpy as np
import pytest
from nets import chain, conv, fitted, residual, whole, width

from shohin.errors import BudgetError, PlanError
from shohin.graph.costs import Edge, Extent, Operator, Term
from shohin.planning.choice import Choice
from shohin.planning.front import Precision, front
from shohin.planning.options import GroupOptions, RegionOption, place_regions
from shohin.planning.pairs import pair_problem
from shohin.planning.relinearize import Space, plan_for_budget
from shohin.planning.resources import Costs
from shohin.planning.solve import solve


def brute(costs, options, regions, budgets, int8=frozenset()):
    """Least loss over all choices by the full costs."""
    space = Space(costs, options, regions, budgets, int8)
    picks = np.array(list(itertools.product(*(range(len(g.counts)) for g in space.options))))
    best = np.inf
    for flags in itertools.product((False, True), repeat=len(space.regions)):
        skipped = frozenset(r.name for r, f in zip(space.regions, flags, strict=True) if f)
        if any(r.conflicts & skipped for r in space.regions if r.name in skipped):
            continue
        dead = space.dead(skipped)
        table = [g.loss * (g.name not in dead) for g in space.options]
        loss = sum(t[picks[:, i]] for i, t in enumerate(table)) + sum(space.by_region[r].loss for r in skipped)
        fits = space.excess(picks, skipped) <= 1 + 1e-9
        best = min(best, float(loss[fits].min())) if fits.any() else best
    return best


def test_close_to_brute_force_on_chains():
    ratios = []
    for seed in range(8):
        ops, options = chain(5, 64, seed, most=6)
        costs = fitted(ops, options, seed=seed)
        low, high = (costs.model.predict(Choice({g.name: g.counts[i] for g in options})) for i in (0, -1))
        for fraction in (0.1, 0.4, 0.8):
            budget = {"latency_ms": low + fraction * (high - low)}
            plan = plan_for_budget(costs, options, [], budget)
            assert plan.feasible and costs.model.predict(plan.choice) <= budget["latency_ms"] * (1 + 1e-9)
            ratios.append(plan.loss / brute(costs, options, [], budget))
    assert min(ratios) >= 1 - 1e-6
    assert np.mean(ratios) <= 1.02 and max(ratios) <= 1.2


@pytest.mark.parametrize("nested", [False, True])
def test_regions_budgets_and_both_methods_against_brute_force(nested):
    ratios = []
    for seed in range(6):
        ops, options, regions = residual(1, 3, 48, seed, most=5, skip_loss=0.05, nested=nested)
        int8 = frozenset(op.address for op in ops[: seed + 2])
        edges = [Edge(a.address, b.address, (Term(64, (width("s0"),)),)) for a, b in itertools.pairwise(ops)]
        costs = fitted(ops, options, regions, seed=seed, int8=int8, edges=edges)
        full = costs.of(Choice(whole(options).kept, frozenset(), int8), ["latency_ms", "size_bytes"])
        for fraction in (0.35, 0.7):
            budgets = {"latency_ms": fraction * full["latency_ms"], "size_bytes": (fraction + 0.1) * full["size_bytes"]}
            least = brute(costs, options, regions, budgets, int8)
            pairs = plan_for_budget(costs, options, regions, budgets, int8=int8, method="pairs")
            plan = plan_for_budget(costs, options, regions, budgets, int8=int8)
            for p in (plan, pairs):
                assert p.feasible and p.choice.int8 == int8
                real = costs.of(p.choice, list(budgets))
                assert all(real[r] <= b * (1 + 1e-9) for r, b in budgets.items())
            assert pairs.loss == pytest.approx(least, rel=1e-6)
            assert plan.note == "relinearized"
            ratios.append(plan.loss / least)
    assert min(ratios) >= 1 - 1e-6 and np.mean(ratios) <= 1.02


@pytest.mark.parametrize("seed", range(4))
def test_pair_tables_and_linearization_equal_the_full_costs(seed):
    ops, options, regions = residual(2, 2, 40, seed, nested=True)
    int8 = frozenset(op.address for op in ops[1:5])
    edges = [Edge(a.address, b.address, (Term(64, (width("s0"), Extent(2, {}))),)) for a, b in itertools.pairwise(ops)]
    costs = fitted(ops, options, regions, seed=seed, int8=int8, edges=edges)
    costs = Costs(costs.model, [(Term(4.0, (Extent(7, {"s0": 1, "h00": 2}),)),)], 50.0)
    huge = dict.fromkeys(("latency_ms", "size_bytes", "memory_bytes", "macs", "params"), 1e12)
    space = Space(costs, options, regions, huge, int8)
    random = np.random.default_rng(seed)
    for _ in range(5):
        picks = np.array([random.integers(len(g.counts)) for g in space.options])
        skipped = frozenset(r for r in ("r00", "r101") if random.uniform() < 0.5)
        # A problem with these choices as the only ones: the solver's totals are the tables' own.
        point = space.point({g.name: g.counts[k] for g, k in zip(space.options, picks, strict=True)}, skipped)
        held = [GroupOptions(g.name, g.counts[k], (g.counts[k],), np.zeros(1)) for g, k in zip(space.options, picks, strict=True)]
        forced = [RegionOption(r.name, -1.0 if r.name in skipped else 1.0, r.private, r.conflicts) for r in space.regions]
        true = {r: float(v[0]) for r, v in space.true(picks[None], skipped).items()}
        found = solve(pair_problem(costs, held, forced, huge, int8))
        assert found.skipped == skipped
        assert {r: found.totals[r] for r in true} == pytest.approx(true, rel=1e-9)
        linear = space.linearize(point)
        at = {r: linear.fixed[r] + sum(c for n, c in linear.keep_costs[r].items() if n not in skipped) for r in true}
        assert at == pytest.approx(true, rel=1e-9)
        # One group changed: the tables are exact.
        for i, g in enumerate(space.options):
            if g.name not in space.dead(skipped):
                other = picks.copy()
                other[i] = 0
                moved = {r: float(v[0]) for r, v in space.true(other[None], skipped).items()}
                assert {r: at[r] + linear.costs[r][g.name][0] for r in true} == pytest.approx(moved, rel=1e-9)


def test_an_impossible_budget_names_what_binds_and_gives_the_cheapest():
    ops, options, regions = residual(1, 2, 64, 0)
    costs = fitted(ops, options, regions)
    plan = plan_for_budget(costs, options, regions, {"latency_ms": 1e-6, "size_bytes": 1e9})
    assert not plan.feasible and list(plan.misses) == ["latency_ms"]
    assert plan.choice.skipped == {"r00", "r01"} and plan.choice.kept["s0"] == options[0].counts[0]
    assert plan.predicted["latency_ms"] == costs.model.predict(plan.choice) and "latency_ms is at least" in plan.binding
    assert plan_for_budget(costs, options, regions, {"latency_ms": plan.predicted["latency_ms"]}).feasible


def test_a_loose_budget_changes_nothing():
    ops, options, regions = residual(1, 2, 64, 0)
    costs = fitted(ops, options, regions)
    plan = plan_for_budget(costs, options, regions, {"latency_ms": 1e6}, offset=0.25)
    assert plan.choice == whole(options) and plan.loss == 0.25


def test_peak_memory_is_bounded_step_by_step():
    ops, options = chain(4, 64, 3)
    steps = [(Term(256.0, (Extent(0, {f"g{i}": 1, f"g{i + 1}": 1}),)),) for i in range(3)]
    costs = Costs(fitted(ops, options).model, steps)
    peak = costs.of(whole(options))["memory_bytes"]
    plan = plan_for_budget(costs, options, [], {"memory_bytes": 0.5 * peak})
    assert plan.feasible and costs.of(plan.choice)["memory_bytes"] <= 0.5 * peak
    # Each step must come down, so of every two neighbours at least one is narrow.
    kept = [plan.choice.kept[f"g{i}"] for i in range(4)]
    assert all(a + b <= 64 for a, b in itertools.pairwise(kept))
    with pytest.raises(BudgetError, match="not known"):
        plan_for_budget(Costs(costs.model), options, [], {"memory_bytes": 1.0})
    with pytest.raises(BudgetError, match="did you mean"):
        plan_for_budget(costs, options, [], {"latency": 1.0})


def test_groups_without_options_and_triple_products_are_refused():
    ops, options = chain(3, 32, 0)
    with pytest.raises(PlanError, match="g2"):
        plan_for_budget(fitted(ops, options), options[:2], [], {"macs": 1.0})
    ops.append(Operator("t", "matmul", (Term(1, (width("g0"), width("g1"), width("g2"))),), (), (), (), "t"))
    costs = fitted(ops, options)
    budget = {"macs": 0.5 * costs.of(whole(options))["macs"]}
    with pytest.raises(PlanError, match="together"):
        plan_for_budget(costs, options, [], budget, method="pairs")
    assert plan_for_budget(costs, options, [], budget).feasible


def test_private_groups_and_conflicts_are_read_off_the_operators():
    ops, _, regions = residual(1, 2, 16, 0, nested=True)
    placed = {r.name: r for r in place_regions(regions, ops)}
    assert placed["r00"].private == {"h00"} and placed["r001"].private == {"h00", "h01"}
    assert placed["r001"].conflicts == {"r00", "r01"} and placed["r00"].conflicts == {"r001"}


def test_front_is_sorted_distinct_feasible_and_repeats():
    ops, options, regions = residual(2, 2, 64, 5, skip_loss=0.05)
    int8 = frozenset(op.address for op in ops)
    costs = fitted(ops, options, regions, noise=0.01, int8=int8)
    latency = costs.model.predict(whole(options))
    call = dict(precisions=[Precision("float32"), Precision("int8", int8, 0.01)], fractions=(1e-4, 0.25, 0.5, 0.9, 5.0, 6.0))
    points, failed = front(costs, options, regions, **call)
    assert len({p.plan.choice for p in points}) == len(points)
    assert {p.precision for p in points} == {"float32", "int8"} and all(p.plan.feasible for p in points)
    assert all(costs.model.predict(p.plan.choice) <= p.bound * (1 + 1e-9) for p in points)
    times = [p.plan.predicted["latency_ms"] for p in points]
    assert times == sorted(times)
    assert {(p.precision, p.bound) for p in failed} == {("float32", 1e-4 * latency), ("int8", 1e-4 * latency)}
    for precision in ("float32", "int8"):
        losses = [p.plan.loss for p in points if p.precision == precision]
        assert losses == sorted(losses, reverse=True)
    assert sum(p.plan.choice.kept == whole(options).kept and not p.plan.choice.skipped for p in points) == 2
    again, _ = front(costs, options, regions, **call)
    assert [(p.plan.choice, p.plan.loss) for p in again] == [(p.plan.choice, p.plan.loss) for p in points]
    limited, _ = front(costs, options, regions, fractions=(0.5, 0.9), budgets={"latency_ms": 0.6 * latency, "size_bytes": 1e9})
    assert {p.bound for p in limited} <= {0.5 * latency, 0.6 * latency}


def test_thirty_groups_take_about_a_second():
    ops, options, regions = residual(6, 4, 192, 0, skip_loss=0.05)
    costs = fitted(ops, options, regions, noise=0.01)
    assert len(options) == 30 and len(ops) > 75 and max(len(g.counts) for g in options) >= 22
    latency = costs.model.predict(whole(options))
    start = time.process_time()
    for fraction in (0.35, 0.6):
        plan = plan_for_budget(costs, options, regions, {"latency_ms": fraction * latency})
        assert plan.feasible and plan.predicted["latency_ms"] <= fraction * latency * (1 + 1e-9)
    # CPU time, with room for a slow machine.
    assert time.process_time() - start < 8


def test_one_operator_of_one_group():
    costs = fitted([conv("c", Extent(3, {}), width("g"), 16)], [GroupOptions("g", 16, (8, 16), np.array([1.0, 0.0]))])
    options = [GroupOptions("g", 16, (8, 16), np.array([1.0, 0.0]))]
    macs = costs.of(Choice({"g": 16}))["macs"]
    assert plan_for_budget(costs, options, [], {"macs": macs * 0.9}).choice.kept == {"g": 8}
