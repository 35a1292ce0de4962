"""The choice among finished candidates: never slower, never worse without saying so, always something in hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shohin.budget import Budget
from shohin.candidate import Candidate, Measurement, Metrics
from shohin.pipeline.choose import choose
from shohin.plan import Plan


def candidate(name: str, quality: float, latency: float, size: float = 100.0, base: float = 1.0) -> Candidate:
    def measured(value: float) -> Measurement:
        return Measurement(value, "measured: in a test")

    metrics = Metrics(quality=measured(quality), latency_ms=measured(latency), size_bytes=measured(size))
    ratio = latency / base
    return Candidate(name, Plan("f"), metrics=metrics, notes={"latency_ratio": [ratio, ratio * 0.98, ratio * 1.02]})


def picked(budget: str, *rows: tuple[str, float, float, float], lower: bool = False) -> dict[str, object]:
    found = {"baseline": candidate("baseline", 0.8, 1.0)}
    found |= {name: candidate(name, quality, latency, size) for name, quality, latency, size in rows}
    return choose(found, Budget.parse(budget), lower)


def test_a_slower_candidate_is_refused_and_named() -> None:
    found = picked("drop <= 50 %", ("slow", 0.9, 1.4, 10.0))
    assert found["best"] == "baseline" and found["unmet"] == []
    assert any("slow is not faster than the original (1.400" in r for r in found["reasons"])  # type: ignore[attr-defined]
    assert any("the original is the best: slow is slower" in r for r in found["reasons"])  # type: ignore[attr-defined]
    small = picked("size <= 50 b", ("slow", 0.9, 1.4, 10.0))
    assert small["best"] == "baseline" and "size <= 50 cannot be met" in small["unmet"][0]  # type: ignore[index]


def test_bounded_costs_buy_quality_and_a_bounded_drop_buys_speed() -> None:
    rows = (("fast", 0.78, 0.2, 10.0), ("middle", 0.79, 0.5, 20.0), ("good", 0.8, 0.9, 90.0))
    assert picked("latency <= 60 %", *rows)["best"] == "middle"
    assert picked("drop <= 0.03", *rows)["best"] == "fast"
    assert picked("drop <= 0.005", *rows)["best"] == "good"
    assert picked("latency <= 60 %, size <= 15 b", *rows)["best"] == "fast"


def test_an_impossible_budget_names_what_binds_and_gives_the_nearest() -> None:
    found = picked("latency <= 0.1 ms, drop <= 0.05", ("fast", 0.78, 0.2, 10.0), ("bad", 0.1, 0.11, 10.0))
    assert found["best"] == "fast" and len(found["unmet"]) == 1  # type: ignore[arg-type]
    assert found["unmet"][0] == "latency <= 0.1 cannot be met: the nearest candidate, fast, has 0.2"  # type: ignore[index]


def test_what_keeps_the_original_is_said_for_each() -> None:
    found = picked("latency <= 2 ms, drop <= 0.01", ("a", 0.7, 0.5, 10.0), ("b", 0.795, 0.5, 10.0))
    assert found["best"] == "baseline"
    assert found["reasons"] == ["the original is the best: a has drop 0.1, allowed 0.01; b has lower quality"]


def test_a_metric_that_should_be_low() -> None:
    rows = (("better", 0.7, 0.5, 10.0), ("worse", 0.9, 0.4, 10.0))
    assert picked("latency <= 60 %", *rows, lower=True)["best"] == "better"
    assert picked("drop <= 0.05", *rows, lower=True)["best"] == "better"
    assert picked("drop <= 0.2", *rows, lower=True)["best"] == "worse"


def test_unmeasured_candidates_are_not_chosen() -> None:
    half = candidate("half", 0.9, 0.5)
    half.metrics = Metrics(quality=half.metrics.quality, size_bytes=half.metrics.size_bytes)
    assert choose({"baseline": candidate("baseline", 0.8, 1.0), "half": half}, Budget(), False)["best"] == "baseline"


number = st.floats(0.01, 2.0)


@given(
    st.lists(st.tuples(number, number, number), max_size=5),
    st.fixed_dictionaries({}, optional={"latency_ms": number, "drop": number, "size_kb": number}),
    st.booleans(),
)
def test_the_choice_keeps_its_promises(rows: list[tuple[float, float, float]], limits: dict[str, float], lower: bool) -> None:
    budget = Budget(**limits)  # type: ignore[arg-type]
    found = {"baseline": candidate("baseline", 1.0, 1.0, 1024.0)}
    found |= {f"c{i}": candidate(f"c{i}", q, t, s * 1024) for i, (q, t, s) in enumerate(rows)}
    base = found["baseline"].metrics.values()
    chosen = choose(found, budget, lower)
    best = found[chosen["best"]].metrics.values()
    assert best["latency_ms"] <= 1.0
    usable = [c.metrics.values() for c in found.values() if c.metrics.values()["latency_ms"] <= 1.0]
    keeping = [v for v in usable if not budget.violations(v, base, lower_is_better=lower)]
    assert bool(chosen["unmet"]) == (not keeping)
    if keeping:
        assert best in keeping
        sign = -1 if lower else 1
        if set(limits) != {"drop"}:
            assert sign * best["quality"] == pytest.approx(max(sign * v["quality"] for v in keeping))
        else:
            assert best["latency_ms"] == pytest.approx(min(v["latency_ms"] for v in keeping))
