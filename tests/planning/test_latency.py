import itertools
import json

import numpy as np
import pytest
from nets import chain, conv, fitted, residual, truth, whole, width

from shohin.errors import PlanError
from shohin.graph.costs import Edge, Extent, Operator, Term
from shohin.planning.choice import Choice
from shohin.planning.features import ELEMENTS_SCALE, MACS_SCALE, Features
from shohin.planning.latency import LatencyModel, random_choices
from shohin.planning.resources import Costs


def test_features_equal_the_operators_own_sums():
    ops, options, regions = residual(2, 2, 40, seed=1)
    features = Features(ops)
    int8 = frozenset({"r00.a", "r00.b", "stem1"})
    for choice in random_choices({g.name: g for g in options}, 12, 3, regions=[r.name for r in regions], precisions=[frozenset(), int8]):
        expected = dict.fromkeys(features.names, 0.0)
        for op in ops:
            if set(op.regions) & choice.skipped:
                continue
            precision = "int8" if op.address in choice.int8 else "float32"
            macs, elements, _ = op.amounts(choice.kept)
            expected[f"fixed/{precision}"] += 1 / len(ops)
            expected[f"{op.kind}/{precision}:macs"] += macs / MACS_SCALE
            expected[f"{op.kind}/{precision}:elements"] += elements / ELEMENTS_SCALE
        np.testing.assert_allclose(features.matrix([choice])[0], [expected[n] for n in features.names], rtol=1e-12)


def test_boundary_counts_only_tensors_that_change_precision():
    ops, _options = chain(3, 32, seed=0)
    edges = [
        Edge("", "c0", (Term(64, (Extent(3, {}),)),)),
        Edge("c0", "c1", (Term(64, (width("g0"),)),)),
        Edge("c1", "c2", (Term(32, (width("g1"),)),)),
    ]
    features = Features(ops, edges)

    def boundary(*int8):
        return features.matrix([Choice({"g0": 16, "g1": 24, "g2": 32}, frozenset(), frozenset(int8))])[0, -1] * ELEMENTS_SCALE

    assert features.names[-1] == "boundary"
    assert boundary() == 0
    assert boundary("c0") == pytest.approx(64 * 3 + 64 * 16)
    assert boundary("c0", "c1") == pytest.approx(64 * 3 + 32 * 24)
    assert boundary("c1") == pytest.approx(64 * 16 + 32 * 24)


@pytest.mark.parametrize("seed", range(5))
def test_fit_predicts_unseen_choices_within_the_noise(seed):
    ops, options, regions = residual(2, 2, 64, seed)
    int8 = frozenset(op.address for op in ops)
    noise = 0.02
    model = fitted(ops, options, regions, seed=seed, noise=noise, int8=int8).model
    features = model.features
    unseen = random_choices({g.name: g for g in options}, 40, seed + 100, regions=[r.name for r in regions], precisions=[frozenset(), int8])
    errors = model.errors_on(unseen, features.matrix(unseen) @ truth(features, seed))
    assert np.mean(errors) < noise and np.quantile(errors, 0.95) < 3 * noise
    # Leaving one out measures the same, and cannot be far below the noise of the timings themselves.
    assert 0.3 * noise < np.mean(model.errors) < 3 * noise
    assert (model.coefficients >= 0).all()


def test_errors_leave_each_timing_out():
    ops, options = chain(3, 64, 1)
    model = fitted(ops, options, noise=0.1, n=6).model
    for i, error in enumerate(model.errors):
        rest = [j for j in range(len(model.choices)) if j != i]
        other = LatencyModel.fit(model.features, [model.choices[j] for j in rest], model.measured_ms[rest])
        assert error == pytest.approx(other.errors_on([model.choices[i]], model.measured_ms[[i]])[0])
    assert np.mean(model.errors) > np.mean(model.errors_on(model.choices, model.measured_ms))


def test_without_noise_separable_coefficients_are_recovered():
    random = np.random.default_rng(0)
    ops = [conv(f"c{i}", width(f"a{i}"), width(f"b{i}"), 40, taps=t) for i, t in enumerate((1, 9))]
    features = Features(ops)
    choices = [Choice({g: int(random.integers(4, 64)) for g in features.groups}) for _ in range(24)]
    known = truth(features, 1) * [0 if "int8" in n else 1 for n in features.names]
    model = LatencyModel.fit(features, choices, features.matrix(choices) @ known, ridge=1e-9)
    np.testing.assert_allclose(model.coefficients, known, rtol=1e-3, atol=1e-9)
    assert model.errors.max() < 1e-4


def test_classes_that_always_grow_together_are_harmless():
    one, two = conv("a", width("g"), width("h"), 30), conv("b", width("g"), width("h"), 30)
    twin = Operator(two.address, "twin", two.macs, two.elements, two.weights, (), "b")
    single, double = Features([one, two]), Features([one, twin])
    random = np.random.default_rng(2)
    choices = [Choice({"g": int(a), "h": int(b)}) for a, b in random.integers(4, 64, (16, 2))]
    times = 0.1 + 0.02 * single.matrix(choices)[:, 2]
    a, b = LatencyModel.fit(single, choices, times), LatencyModel.fit(double, choices, times)
    new = [Choice({"g": int(x), "h": int(y)}) for x, y in random.integers(4, 64, (30, 2))]
    for choice in new:
        assert b.predict(choice) == pytest.approx(a.predict(choice), rel=0.01)
    assert np.isfinite(b.coefficients).all()


def test_attributed_times_sum_to_the_prediction():
    ops, options, regions = residual(2, 2, 32, seed=4)
    int8 = frozenset(op.address for op in ops[:6])
    edges = [Edge(a.address, b.address, (Term(5000, ()),)) for a, b in itertools.pairwise(ops)]
    model = fitted(ops, options, regions, int8=int8, edges=edges).model
    for skipped in (frozenset(), frozenset({"r01"})):
        choice = Choice(whole(options).kept, skipped, int8)
        times = model.operator_ms(choice)
        assert sum(times.values()) == pytest.approx(model.predict(choice), rel=1e-12)
        assert {a for a, t in times.items() if t == 0} == {op.address for op in ops if set(op.regions) & skipped}


def test_a_precision_that_was_never_timed_is_an_error():
    ops, options = chain(3, 32, seed=0)
    model = fitted(ops, options).model
    with pytest.raises(PlanError, match="no timed plan contains it"):
        model.predict(Choice(whole(options).kept, frozenset(), frozenset({"c1"})))


def test_json_round_trip_and_refit():
    ops, options, regions = residual(1, 2, 64, seed=6)
    model = fitted(ops, options, regions, noise=0.05, n=6).model
    again = LatencyModel.from_json(json.loads(json.dumps(model.to_json())), Features(ops))
    choices = random_choices({g.name: g for g in options}, 20, 9)
    assert [again.predict(c) for c in choices] == [model.predict(c) for c in choices]
    true = model.features.matrix(choices) @ truth(model.features, 0)
    refit = again.refit(choices, true)
    assert len(refit.choices) == len(model.choices) + len(choices)
    assert refit.errors_on(choices, true).mean() < model.errors_on(choices, true).mean()
    with pytest.raises(PlanError, match="another model"):
        LatencyModel.from_json(model.to_json(), Features(chain(2, 16, 0)[0][:1]))
    with pytest.raises(PlanError, match="version"):
        LatencyModel.from_json({**model.to_json(), "version": 9}, Features(ops))


@pytest.mark.parametrize("bad", [[1.0], [1.0, float("nan")], [1.0, 0.0]])
def test_bad_timings_are_refused(bad):
    ops, options = chain(2, 16, 0)
    with pytest.raises(PlanError, match="timing"):
        LatencyModel.fit(Features(ops), [whole(options)] * 2, bad)


def test_random_choices_are_allowed_cover_the_range_and_repeat():
    _, options, regions = residual(2, 3, 96, seed=0, nested=True)
    groups, names = {g.name: g for g in options}, [r.name for r in regions]
    conflicts = {
        "r000": set(),
        "r001": {"r00", "r01"},
        "r101": {"r10", "r11"},
        "r00": {"r001"},
        "r01": {"r001"},
        "r10": {"r101"},
        "r11": {"r101"},
    }
    int8 = frozenset({"head"})
    draw = random_choices(groups, 40, 7, regions=names, conflicts=conflicts, precisions=[frozenset(), int8])
    assert draw == random_choices(groups, 40, 7, regions=names, conflicts=conflicts, precisions=[frozenset(), int8])
    assert draw != random_choices(groups, 40, 8, regions=names, conflicts=conflicts, precisions=[frozenset(), int8])
    assert len(draw) == 84 and sum(c.int8 == int8 for c in draw) == 42
    assert draw[0].kept == whole(options).kept and all(draw[1].kept[g.name] == g.counts[0] for g in options)
    for choice in draw:
        assert all(choice.kept[n] in g.counts for n, g in groups.items())
        assert not any(set(conflicts.get(r, ())) & choice.skipped for r in choice.skipped)
    share = [sum(c.kept.values()) / sum(g.size for g in options) for c in draw]
    assert min(share) < 0.3 and max(share) == 1
    assert any(c.skipped for c in draw)


def test_static_costs_equal_the_operators_own_sums():
    ops, options, regions = residual(2, 2, 32, seed=3)
    costs = fitted(ops, options, regions, int8=frozenset(op.address for op in ops))
    costs = Costs(costs.model, [(Term(4.0, (width("s0"),)), Term(4.0, (width("h00"),))), (Term(4.0, (width("s1"),)),)], 100.0)
    choice = Choice({**whole(options).kept, "s0": 16, "h00": 8}, frozenset({"r01"}), frozenset({"stem0"}))
    got = costs.of(choice)
    amounts = {op.address: op.amounts(choice.kept) for op in ops if "r01" not in op.regions}
    assert got["macs"] == pytest.approx(sum(a[0] for a in amounts.values()))
    assert got["params"] == pytest.approx(sum(a[2] for a in amounts.values()))
    assert got["size_bytes"] == pytest.approx(100 + sum(a[2] * (1 if n == "stem0" else 4) for n, a in amounts.items()))
    assert got["memory_bytes"] == max(4 * 16 + 4 * 8, 4 * 32)
    assert got["latency_ms"] == pytest.approx(costs.model.predict(choice))
