"""The loop: what it returns, when it stops, and what it says when a loss is not a number."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import Call, Data
from shohin.errors import DataError, ModelError
from shohin.training import TrainConfig, copy_state, load_state, train
from shohin.training.ema import Ema
from shohin.training.schedule import learning_rate

torch.set_num_threads(1)


def task(seed: int = 0, n: int = 64) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    x = torch.randn(n, 5)
    y = (x[:, 0] > x[:, 1]).long()
    net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    return net, list(zip(x.split(16), y.split(16), strict=True))


def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    loss = F.cross_entropy(model(*call.args), call.target)
    return loss, {"task": loss.item()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_learns_and_returns_the_best_state(optimizer: str, ema: float | None) -> None:
    net, batches = task()
    data = Data(batches)
    before = data.quality(net.eval())
    result = train(net, data, objective, TrainConfig(epochs=20, lr=0.02, optimizer=optimizer, ema=ema), evaluate=data.quality)  # type: ignore[arg-type]
    assert result.best_quality is not None and result.best_quality > max(before, 0.9)
    assert result.best_quality == max(r.quality for r in result.history if r.quality is not None)
    assert data.quality(net.eval()) == result.best_quality
    assert result.stopped == "finished" and len(result.history) == 21
    assert all(torch.equal(t, result.state[n]) for n, t in net.state_dict().items())
    losses = [r.loss for r in result.history if r.loss is not None]
    assert losses[-1] < losses[0] and result.history[1].terms["task"] == pytest.approx(losses[0])


@pytest.mark.parametrize("lower", [False, True])
def test_never_worse_than_the_start(lower: bool) -> None:
    """With an objective that destroys the model, the starting state comes back bit for bit."""
    net, batches = task()
    data = Data(batches)
    start = copy_state(net)

    def harm(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss, terms = objective(model, call, generator)
        return -loss, terms

    def evaluate(model: nn.Module) -> float:
        loss = sum(F.cross_entropy(model(x), y).item() for x, y in batches)
        return loss if lower else -loss

    result = train(net, data, harm, TrainConfig(epochs=3, lr=0.05), evaluate=evaluate, lower_is_better=lower)
    assert result.best_epoch == -1 and result.best_quality == result.history[0].quality
    assert all(torch.equal(t, start[n]) for n, t in copy_state(net).items())


def test_modes_are_given_back_and_used() -> None:
    net, batches = task()
    net[3].eval()
    seen: list[bool] = []

    def spy(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        seen.append(model.training)
        return objective(model, call, generator)

    def evaluate(model: nn.Module) -> float:
        seen.append(model[1].training)  # type: ignore[index]
        return 0.0

    train(net, Data(batches[:1]), spy, TrainConfig(epochs=1), evaluate=evaluate)
    assert seen == [False, True, False]
    assert net.training and not net[3].training
    assert all(p.grad is None for p in net.parameters())


def test_patience() -> None:
    net, batches = task()
    values = iter([0.5, 0.6, 0.7, 0.7, 0.6, 0.9])
    result = train(net, Data(batches), objective, TrainConfig(epochs=5, patience=2), evaluate=lambda m: next(values))
    assert result.stopped == "patience" and result.best_epoch == 1 and result.best_quality == 0.7
    assert [r.quality for r in result.history] == [0.5, 0.6, 0.7, 0.7, 0.6]


@pytest.mark.parametrize(
    ("values", "losses", "best"), [([0.5, 0.5, 0.5], [2.0, 1.0], -1), ([0.5, 0.7, 0.7], [2.0, 1.0], 1), ([0.5, 0.7, 0.7], [1.0, 2.0], 0)]
)
def test_ties_go_to_the_smaller_training_loss_but_never_replace_the_start(values: list[float], losses: list[float], best: int) -> None:
    net, batches = task()
    given, qualities = iter(losses), iter(values)
    objective = lambda m, c, g: (m(*c.args).square().mean() * 0 + next(given), {})  # noqa: E731
    result = train(net, Data(batches[:1]), objective, TrainConfig(epochs=2), evaluate=lambda m: next(qualities))
    assert result.best_epoch == best and result.best_quality == max(values)


def test_deadline_in_the_middle_of_an_epoch() -> None:
    net, batches = task()
    deadline = time.monotonic() + 0.3

    def slow(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        time.sleep(0.2)
        return objective(model, call, generator)

    result = train(net, Data(batches), slow, TrainConfig(epochs=50), evaluate=Data(batches).quality, deadline=deadline)
    assert result.stopped == "deadline" and result.history[-1].partial and 1 <= result.history[-1].steps < 4
    assert time.monotonic() - deadline < 2


def test_deadline_already_past_changes_nothing() -> None:
    net, batches = task()
    start = copy_state(net)
    result = train(net, Data(batches), objective, TrainConfig(), evaluate=Data(batches).quality, deadline=time.monotonic() - 1)
    assert result.stopped == "deadline" and result.history == ()
    assert all(torch.equal(t, start[n]) for n, t in copy_state(net).items())


def test_nan_loss_names_step_batch_and_term_and_restores() -> None:
    net, batches = task()
    data = Data(batches)

    def poisoned(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss, terms = objective(model, call, generator)
        poisoned.calls += 1  # type: ignore[attr-defined]
        bad = torch.tensor(float("nan") if poisoned.calls == 7 else 0.0)  # type: ignore[attr-defined]
        return loss + bad, {**terms, "kd": float(bad)}

    poisoned.calls = 0  # type: ignore[attr-defined]
    quality = []

    def evaluate(model: nn.Module) -> float:
        quality.append(data.quality(model))
        return quality[-1]

    with pytest.raises(DataError, match=r"step 6 \(epoch 1, batch 2\).*kd=nan"):
        train(net, data, poisoned, TrainConfig(epochs=3, lr=0.02), evaluate=evaluate)
    assert all(bool(torch.isfinite(t).all()) for t in copy_state(net).values())
    assert data.quality(net.eval()) == max(quality)


def test_nan_gradient_names_the_parameter() -> None:
    net, batches = task()

    def root(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return (model(*call.args) * 0).square().sum().sqrt(), {}

    with pytest.raises(DataError, match=r"gradient of 0\.weight became NaN"):
        train(net, Data(batches), root, TrainConfig())


def test_bad_input() -> None:
    net, batches = task()
    with pytest.raises(DataError, match="loader is empty"):
        train(net, Data([]), objective, TrainConfig())
    with pytest.raises(DataError, match="validation value became nan"):
        train(net, Data(batches), objective, TrainConfig(), evaluate=lambda m: float("nan"))
    with pytest.raises(DataError, match="no gradient to any"):
        train(net, Data(batches), lambda m, c, g: (torch.ones((), requires_grad=True) * 2, {}), TrainConfig())
    with pytest.raises(DataError, match="lr must be"):
        TrainConfig(lr=-1)
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"parameter 0\.weight holds NaN"):
        train(net, Data(batches), objective, TrainConfig())
    with pytest.raises(ModelError, match="nothing to train"):
        train(net.requires_grad_(False), Data(batches), objective, TrainConfig())


def test_schedule_is_continuous_and_ends_low() -> None:
    config = TrainConfig(epochs=10, lr=0.1, warmup=0.2, final_lr=0.01)
    rates = [learning_rate(config, e, b, 20) for e in range(10) for b in range(20)]
    assert rates[0] < 0.002 and max(rates) == pytest.approx(0.1, rel=0.02) and rates[-1] == pytest.approx(0.001, rel=0.05)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.004
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_ema_is_the_recursive_average() -> None:
    net = nn.Linear(1, 1, bias=False)
    ema = Ema(net, 0.8)
    expected = net.weight.item()
    for step in range(30):
        with torch.no_grad():
            net.weight.fill_(float(step))
        ema.update(net, step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.state["weight"]) == pytest.approx(expected, rel=1e-5)
    with ema.applied(net):
        assert net.weight.item() == float(ema.state["weight"])
    assert net.weight.item() == 29.0


def test_weights_shared_by_two_layers_stay_shared() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    batches = [(torch.randn(8, 4), torch.randint(0, 4, (8,))) for _ in range(3)]
    before = net[0].weight.detach().clone()
    train(net, Data(batches), objective, TrainConfig(epochs=2))
    assert net[1].weight is net[0].weight and not torch.equal(before, net[0].weight)


def test_load_state_refuses_another_model() -> None:
    with pytest.raises(ModelError, match="another model"):
        load_state(nn.Linear(2, 3), copy_state(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="another model"):
        load_state(nn.Linear(2, 3, bias=False), copy_state(nn.Linear(2, 3)))
