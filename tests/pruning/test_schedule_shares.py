"""Shares as functions of the step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import DataError
from shohin.pruning.schedules import cubic, geometric, linear, one_shot
from shohin.pruning.schedules.cubic import Ramp

RAMPS = st.builds(
    lambda kind, start, more, begin, span, every: kind(start + (0.99 - start) * more, begin, begin + span, start=start, every=every),
    st.sampled_from([cubic, linear]),
    st.floats(0, 0.9),
    st.floats(0, 1),
    st.integers(0, 20),
    st.integers(0, 200),
    st.integers(1, 30),
)


@given(RAMPS)
def test_a_ramp_begins_and_ends_exactly_and_never_falls(ramp: Ramp) -> None:
    values = [ramp(step) for step in range(ramp.end + 10)]
    assert values[-10:] == [ramp.final] * 10
    if ramp.end > ramp.begin:
        assert values[: ramp.begin + 1] == [ramp.start] * (ramp.begin + 1)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    changed = [step for step in range(1, ramp.end) if values[step] != values[step - 1]]
    assert all((step - ramp.begin) % ramp.every == 0 for step in changed)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (100, 0.0), (150, 0.7875), (200, 0.9), (125, 0.9 * (1 - 0.75**3))])
def test_cubic_has_the_values_of_the_formula(step: int, share: float) -> None:
    assert cubic(0.9, 100, 200)(step) == pytest.approx(share)
    assert linear(0.9, 100, 200)(150) == pytest.approx(0.45)


def test_most_goes_early() -> None:
    ramp = cubic(0.8, 0, 90)
    parts = [ramp(30), ramp(60) - ramp(30), ramp(90) - ramp(60)]
    assert parts[0] > 2 * parts[1] > 8 * parts[2]


@pytest.mark.parametrize("at", [0, 1, 7])
def test_one_shot_is_a_step(at: int) -> None:
    shares = one_shot(0.5, at)
    assert [shares(t) for t in range(10)] == [0.0] * at + [0.5] * (10 - at)


@given(st.floats(0.01, 0.999), st.integers(1, 12))
def test_geometric_rounds_take_equal_shares_of_what_is_left(final: float, rounds: int) -> None:
    shares = (0.0, *geometric(final, rounds))
    taken = [(b - a) / (1 - a) for a, b in itertools.pairwise(shares)]
    assert len(taken) == rounds
    assert shares[-1] == final
    assert max(taken) - min(taken) < 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: cubic(1.0, 0, 10),
        lambda: cubic(0.5, 10, 5),
        lambda: linear(0.5, 0, 5, start=0.6),
        lambda: linear(0.5, 0, 5, every=0),
        lambda: geometric(1.0, 3),
        lambda: geometric(0.5, 0),
    ],
)
def test_values_outside_their_range_are_refused(wrong: object) -> None:
    with pytest.raises(DataError, match="need"):
        wrong()  # type: ignore[operator]
