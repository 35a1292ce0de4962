"""Scores of single elements, and how a total is shared between weights."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import PlanError
from shohin.pruning.sparse import allocation, scores


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g) * k for n, s, k in (("a", (4, 3, 3, 3), 0.1), ("b", (20, 30), 1.0), ("c", (2, 5), 5.0))}


def measured(seed: int) -> dict[str, list[tuple[float, float]]]:
    g = torch.Generator().manual_seed(seed)
    return {n: [(z, float(torch.rand(1, generator=g)) * z * z) for z in (0.3, 0.6)] for n in weights()}


RULES = {
    "uniform": lambda w, keep: allocation.uniform({n: t.numel() for n, t in w.items()}, keep),
    "global": lambda w, keep: allocation.globally({n: scores.magnitude(t) for n, t in w.items()}, keep),
    "lamp": allocation.lamp,
    "erk": lambda w, keep: allocation.erk({n: t.shape for n, t in w.items()}, keep),
    "sensitive": lambda w, keep: allocation.sensitive({n: t.numel() for n, t in w.items()}, measured(1), keep),
}


@pytest.mark.parametrize("rule", RULES)
@given(keep=st.floats(0, 1), seed=st.integers(0, 5))
def test_the_total_is_exact_and_something_of_each_stays(rule: str, keep: float, seed: int) -> None:
    w = weights(seed)
    kept = RULES[rule](w, keep)
    sizes = {n: t.numel() for n, t in w.items()}
    assert sum(kept.values()) == max(round(keep * sum(sizes.values())), 3)
    assert all(1 <= kept[n] <= sizes[n] for n in sizes)
    patterns = allocation.patterns_of(kept, sizes)
    assert all(sizes[n] - p.dropped(sizes[n]) == kept[n] for n, p in patterns.items())


def test_global_is_one_threshold() -> None:
    w = {n: t for n, t in weights(2).items() if n != "a"}
    kept = allocation.globally({n: t.abs() for n, t in w.items()}, 0.3)
    bound = torch.cat([t.abs().flatten() for t in w.values()]).sort().values[-sum(kept.values())]
    assert kept == {n: int((t.abs() >= bound).sum()) for n, t in w.items()}


def test_erk_gives_small_layers_more() -> None:
    w = weights()
    kept = allocation.erk({n: t.shape for n, t in w.items()}, 0.2)
    share = {n: kept[n] / t.numel() for n, t in w.items()}
    assert share["b"] < share["a"] and share["b"] < share["c"]
    # where nothing is whole, densities are as the sums of sides over their products
    free = allocation.erk({"x": (100, 200), "y": (50, 400)}, 0.1)
    assert free["x"] / free["y"] == pytest.approx(300 / 450, rel=1e-2)


def test_sensitive_is_the_best_of_all_shares() -> None:
    """Against brute force over a grid, on the model of the loss that it states."""
    sizes, losses = {"a": 40, "b": 60, "c": 100}, {"a": [(0.5, 3.0)], "b": [(0.5, 0.2)], "c": [(0.5, 1.0)]}

    def predicted(kept: dict[str, int]) -> float:
        share = {n: 1 - kept[n] / sizes[n] for n in sizes}
        return sum(losses[n][0][1] * (z / (1 - z)) ** 2 for n, z in share.items())

    for keep in (0.3, 0.5, 0.8):
        found = allocation.sensitive(sizes, losses, keep)
        total = sum(found.values())
        options = ({"a": a, "b": b, "c": total - a - b} for a, b in itertools.product(range(1, 41), range(1, 61)))
        best = min(predicted(o) for o in options if 1 <= o["c"] <= 100)
        assert predicted(found) <= best * 1.02
        assert found["a"] / 40 > found["b"] / 60


@pytest.mark.parametrize("bad", [{"a": []}, {}, {"a": [(1.0, 2.0)]}, {"a": [(0.5, float("nan"))]}])
def test_measurements_that_say_nothing_are_refused(bad: dict[str, list[tuple[float, float]]]) -> None:
    with pytest.raises(PlanError):
        allocation.sensitive({"a": 10}, bad, 0.5)


def test_keep_out_of_range_is_refused() -> None:
    with pytest.raises(PlanError, match="keep"):
        allocation.uniform({"a": 4}, 1.5)


def test_lamp_as_written() -> None:
    w = weights(3)["b"]
    squares = w.double().square().flatten()
    slow = torch.stack([s / squares[squares >= s].sum() for s in squares]).reshape(w.shape)
    assert torch.allclose(scores.lamp(w), slow)
    assert float(scores.lamp(w).max()) == pytest.approx(1.0)
    assert torch.equal(scores.lamp(torch.zeros(2, 2)), torch.zeros(2, 2, dtype=torch.float64))


def test_lamp_is_blind_to_the_scale_of_a_layer() -> None:
    w = weights(4)["a"]
    assert torch.allclose(scores.lamp(w), scores.lamp(100 * w))


def test_wanda_is_the_norm_of_what_each_weight_gives() -> None:
    x, w = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    gives = (x.unsqueeze(1) * w).square().sum(0).sqrt()
    assert torch.allclose(scores.wanda(w, x.square().sum(0)), gives)
    grouped = scores.wanda(torch.ones(4, 3), torch.arange(6.0).reshape(2, 3).square(), 2)
    assert grouped.tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


def test_first_and_second_order() -> None:
    w, g = torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, 1.0]])
    assert scores.taylor(w, g).tolist() == [[1.0, 3.0]]
    assert scores.fisher(w, g).tolist() == [[1.0, 4.5]]
    assert torch.equal(scores.random(w, 1), scores.random(w, 1)) and not torch.equal(scores.random(w, 1), scores.random(w, 2))
