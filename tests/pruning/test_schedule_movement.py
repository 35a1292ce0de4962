"""Movement pruning keeps what moves away from zero."""

from __future__ import annotations

import pytest
import torch
from schedule_cases import accuracy, mlp, short, task, vectors, watched
from torch import nn

from shohin.errors import DataError
from shohin.pruning.schedules import Shares, cubic, hard_movement, one_shot, soft_movement
from shohin.training import TrainConfig
from shohin.training.schedule import learning_rate


def _regression(seed: int = 0) -> nn.Linear:
    """Pre-trained weights that are large where they are of no use any more, and small where they are needed."""
    torch.manual_seed(seed)
    layer = nn.Linear(12, 3, bias=False)
    with torch.no_grad():
        layer.weight[:, :4] = 0.02 * torch.randn(3, 4)
        layer.weight[:, 4:] = 0.5 + 0.5 * torch.rand(3, 8)
    return layer


def test_movement_keeps_what_the_new_task_needs_where_magnitude_does_not() -> None:
    model, data = _regression(), vectors(batches=12, size=32, useful=4)
    direction = torch.randn(4, 3, generator=torch.Generator().manual_seed(99)).T
    assert float(direction.abs().min()) > 0.1  # all of the four columns matter
    start = model.weight.detach().abs()
    by_size = start >= start.flatten().sort(descending=True).values[11]
    done = hard_movement(
        model, data, task, TrainConfig(epochs=10, lr=0.02, weight_decay=0.0), pattern={"weight": f"unstructured {24 / 36}"}
    )
    kept = done.masks["weight"]
    assert int(kept.sum()) == 12
    assert int(kept[:, :4].sum()) >= 10
    assert int(by_size[:, :4].sum()) == 0
    assert accuracy(model, data) > 0.9


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeros_are_exact_after_every_step_and_follow_the_schedule(optimizer: str) -> None:
    shares, seen = cubic(0.6, 1, 12), []
    model = mlp()
    done = hard_movement(
        model,
        vectors(),
        watched(lambda step, m: seen.append(float((m[2].weight == 0).double().mean()))),  # type: ignore[index]
        short(optimizer),
        pattern="unstructured 0.6",
        shares=shares,
    )
    assert seen == pytest.approx([shares(t) for t in range(24)], abs=0.5 / 256 + 1e-9)
    assert not bool(model[2].weight[~done.masks["2.weight"]].any())
    assert bool(model[2].weight[done.masks["2.weight"]].all())


@pytest.mark.parametrize("shares", [one_shot(0.5, 6), cubic(0.5, 0, 4), one_shot(0.5, 1)])
def test_scores_are_sums_of_minus_weight_times_gradient(shares: Shares) -> None:
    """The kept elements are those with the largest sums, computed apart: with the weight under the mask, and the gradient at it."""
    data, config = vectors(batches=6), TrainConfig(epochs=1, lr=0.05, optimizer="sgd", momentum=0.0, clip=None, weight_decay=0.0)
    done = hard_movement(mlp(), data, task, config, pattern={"0.weight": "unstructured 0.5"}, shares=shares)
    plain, totals, mask = mlp(), torch.zeros(16, 12), torch.ones(16, 12, dtype=torch.bool)
    under = plain[0].weight.detach().clone()
    for step, call in enumerate(data.calls("train")):
        loss, _ = task(plain, call, torch.Generator())
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        totals -= under * gradients[0]
        with torch.no_grad():
            for p, g in zip(plain.parameters(), gradients, strict=True):
                p -= learning_rate(config, 0, step, 6) * g
            under = torch.where(mask, plain[0].weight, under)
            gone = round(shares(step + 1) * 192)
            mask = totals > totals.flatten().sort().values[gone - 1] if gone else mask
            plain[0].weight.copy_(under * mask)
    assert torch.equal(done.masks["0.weight"], mask)


def test_what_is_off_comes_back_with_the_value_it_had() -> None:
    model, weights = mlp(), []
    shares = cubic(0.5, 0, 4)
    hard_movement(
        model,
        vectors(),
        watched(lambda step, m: weights.append(m[2].weight.detach().clone())),  # type: ignore[index]
        short(epochs=8),
        pattern="unstructured 0.5",
        shares=shares,
    )
    returns = [(t, (weights[t - 1] == 0) & (weights[t] != 0)) for t in range(2, len(weights))]
    back = [(t, tuple(place)) for t, mask in returns for place in mask.nonzero().tolist()]
    assert back
    for t, place in back[:20]:
        before = next(w[place] for w in reversed(weights[:t]) if w[place] != 0)
        step = float((weights[t][place] - before).abs())
        assert step <= 0.021  # one step of the optimizer (rate 0.02) at most, not a fresh start from zero
        assert float(weights[t][place].abs()) > 0


def test_the_penalty_of_soft_movement_sets_how_much_goes() -> None:
    data, shares = vectors(batches=12, size=32, useful=4), []
    for penalty in (0.0, 1.0, 30.0):
        model = mlp(hidden=24)
        done = soft_movement(model, data, task, TrainConfig(epochs=10, lr=0.01), penalty=penalty, threshold=0.3, rate=0.02)
        shares.append(done.share)
        assert not any(bool(dict(model.named_parameters())[n][~m].any()) for n, m in done.masks.items())
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.9


def test_values_outside_their_range_are_refused() -> None:
    for wrong in ({"penalty": -1.0}, {"penalty": 1.0, "threshold": 1.0}, {"penalty": 1.0, "rate": 0.0}):
        with pytest.raises(DataError, match="soft movement needs"):
            soft_movement(mlp(), vectors(), task, **wrong)
