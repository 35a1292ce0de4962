import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import chain, fitted, whole

from shohin.errors import DataError, PlanError
from shohin.planning.choice import Choice
from shohin.planning.loss import correct, group_options, kept_units, loss_table
from shohin.planning.relinearize import plan_for_budget
from shohin.planning.spdy import search_coefficients

saliencies = st.lists(st.floats(-1, 10, allow_nan=False), min_size=1, max_size=30)


@given(saliencies, st.data())
def test_table_is_the_least_sum_of_removed_units(saliency, data):
    counts = sorted(data.draw(st.sets(st.integers(1, len(saliency)), min_size=1)) | {len(saliency)})
    table = loss_table(saliency, counts)
    assert table[-1] == 0 and (np.diff(table) <= 0).all()
    for count, value in zip(counts, table, strict=True):
        kept = kept_units(saliency, count)
        assert len(kept) == count and list(kept) == sorted(set(kept))
        gone = [s for i, s in enumerate(saliency) if i not in kept]
        assert value == pytest.approx(sum(max(s, 0) for s in gone), abs=1e-9)
        assert max(gone, default=-2) <= min(saliency[i] for i in kept)


def test_ties_keep_the_first_units_and_narrower_choices_are_nested():
    assert kept_units([1, 2, 2, 2, 0], 2) == (1, 2)
    values = np.random.default_rng(0).integers(0, 4, 20)
    for count in range(1, 20):
        assert set(kept_units(values, count)) < set(kept_units(values, count + 1))


def test_bad_saliency_is_refused():
    with pytest.raises(DataError, match="unit 1"):
        loss_table([1.0, float("nan")], [1])
    with pytest.raises(PlanError):
        loss_table([1.0, 2.0], [3])
    with pytest.raises(PlanError):
        kept_units([1.0], 0)
    with pytest.raises(DataError):
        kept_units([], 1)


def test_correction_recovers_scale_and_power():
    random = np.random.default_rng(1)
    options = {n: group_options(n, random.gamma(1, 1, 64), range(4, 65, 4)) for n in "abcd"}
    real = {n: scale * g.loss**power for (n, g), scale, power in zip(options.items(), (3, 0.2, 1, 3), (1.0, 1.4, 0.7, 1.0), strict=True)}
    measured = {(n, c): float(real[n][options[n].index(c)]) for n in "abc" for c in (8, 24, 40, 56)}
    fixed = correct(options, measured)
    few = correct(options, {k: v for k, v in measured.items() if k[1] == 24})
    for n in "abc":
        before, after, single = (np.abs(np.log(t.loss[:-1] / real[n][:-1])).mean() for t in (options[n], fixed[n], few[n]))
        assert after < 0.25 * max(before, 0.8) or after < 0.1
        assert single < before + 0.3
    for table in (*fixed.values(), *few.values()):
        assert table.loss[-1] == 0 and (np.diff(table.loss) <= 1e-12).all() and np.isfinite(table.loss).all()
    # A group that was not measured takes the scale that the others share, and keeps its form.
    ratio = fixed["d"].loss[:-1] / options["d"].loss[:-1]
    assert np.ptp(ratio) < 1e-9 and 0.1 < ratio[0] < 3.5


def test_correction_bears_noise_and_refuses_nonsense():
    options = {"a": group_options("a", np.linspace(0.1, 1, 16), (4, 8, 12, 16))}
    fixed = correct(options, {("a", 12): -0.01, ("a", 4): 5.0})
    assert (fixed["a"].loss >= 0).all() and (np.diff(fixed["a"].loss) <= 0).all()
    assert np.array_equal(correct(options, {})["a"].loss, options["a"].loss)
    with pytest.raises(PlanError, match="unknown group"):
        correct(options, {("b", 4): 1.0})
    with pytest.raises(PlanError, match="cannot keep 5"):
        correct(options, {("a", 5): 1.0})
    with pytest.raises(DataError, match="NaN"):
        correct(options, {("a", 4): float("nan")})


class Views:
    """A real loss that weighs the groups otherwise than the tables do."""

    def __init__(self, options, seed):
        self.options, self.calls = options, 0
        self.weights = np.random.default_rng(seed).uniform(0.05, 3, len(options))

    def __call__(self, choice: Choice) -> float:
        self.calls += 1
        return float(sum(w * g.loss[g.index(choice.kept[g.name])] for w, g in zip(self.weights, self.options, strict=True)))


def test_coefficients_find_what_the_tables_miss_and_resume_exactly():
    ops, options = chain(8, 64, 2, most=6)
    costs = fitted(ops, options)
    budget = {"latency_ms": 0.45 * costs.model.predict(whole(options))}

    def plan(scaled):
        found = plan_for_budget(costs, scaled, [], budget, rounds=1)
        return found.choice if found.feasible else None

    views = Views(options, 0)
    first = views(plan(options))
    cache: dict[str, float] = {}
    found = search_coefficients(options, plan, views, evaluations=20, seed=3, cache=cache)
    assert found.loss < 0.97 * first and found.loss == views(found.choice)
    assert found.log[0] == first and list(found.log) == sorted(found.log, reverse=True)
    assert found.evaluations == len(cache) <= 20
    assert costs.model.predict(found.choice) <= budget["latency_ms"] * (1 + 1e-9)
    # Stopped after half of the evaluations: the rest is done, nothing is done twice, and the result is the same.
    half = dict(list(cache.items())[:10])
    again = Views(options, 0)
    resumed = search_coefficients(options, plan, again, evaluations=20, seed=3, cache=half)
    assert resumed == found and again.calls == len(cache) - 10


def test_coefficient_search_refuses_nan_and_reports_infeasible():
    _, options = chain(2, 16, 0)
    with pytest.raises(PlanError, match="relax"):
        search_coefficients(options, lambda _: None, lambda _: 0.0, evaluations=2)
    with pytest.raises(DataError, match="NaN"):
        search_coefficients(options, lambda o: Choice({g.name: g.size for g in o}), lambda _: float("nan"))


def test_choice_json_digest_and_hash():
    a = Choice({"b": 2, "a": 1}, frozenset({"r"}), frozenset({"x", "y"}))
    b = Choice.from_json(a.to_json())
    assert a == b and hash(a) == hash(b) and a.digest == b.digest
    assert len({a.digest, Choice({"a": 1, "b": 3}).digest, Choice({"a": 1, "b": 2}).digest}) == 3
    with pytest.raises(PlanError):
        Choice({"a": 0})
    with pytest.raises(PlanError, match="damaged"):
        Choice.from_json({"kept": {}})
