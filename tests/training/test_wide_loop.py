"""Accumulation, precision, the user's optimizer, replay and callbacks of the one loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shohin.data import Call, Data
from shohin.errors import DataError, RunError
from shohin.training import EpochRecord, TrainConfig, train
from shohin.training.loggers import jsonl, mlflow, tensorboard

torch.set_num_threads(1)


def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    loss = (model(*call.args) - call.target).square().mean()
    return loss, {"task": loss.item()}


def task(size: int, n: int = 24) -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    x = torch.randn(n, 4, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    return net, Data(list(zip(x.split(size), (x[:, :1] * 2).split(size), strict=True)))


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_accumulated_batches_equal_whole_ones(size: int) -> None:
    """Also where the last group is smaller, and the last batch of a group too."""
    whole, data = task(size * 3)
    small, parts = task(size)
    one = train(whole, data, objective, TrainConfig(epochs=3, lr=0.01))
    many = train(small, parts, objective, TrainConfig(epochs=3, lr=0.01, accumulate=3))
    assert torch.allclose(weights(whole), weights(small), atol=1e-9, rtol=0)
    assert [r.steps for r in one.history] == [r.steps for r in many.history]
    assert [r.lr for r in one.history] == [r.lr for r in many.history]


def test_precision() -> None:
    net, data = task(8)
    seen: list[torch.dtype] = []

    def spy(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        out = model(call.args[0].float())
        seen.append(out.dtype)
        return (out.float() - call.target).square().mean(), {}

    def evaluate(model: nn.Module) -> float:
        seen.append(model(torch.ones(1, 4)).dtype)
        return 0.0

    train(net.float(), data, spy, TrainConfig(epochs=1, precision="bfloat16"), evaluate=evaluate)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(p.dtype == torch.float32 for p in net.parameters())
    with pytest.raises(DataError, match=r"float16.*needs a CUDA device"):
        train(net, data, objective, TrainConfig(precision="float16"))


class Counting(torch.optim.SGD):
    """Keeps numbers, None and a bool in its state and in its groups."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                own = self.state[p]
                own.update(seen=own.get("seen", 0) + 1, mean=own.get("mean", 0.0) + 0.1, none=None, flag=True)
                p.data.add_(p.grad, alpha=-group["lr"] / (own["seen"] + group["k"]) * (1 + own["mean"]))


class Stop(Exception):
    pass


@pytest.mark.parametrize("make", [Counting, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adafactor])
def test_the_users_optimizer_resumes_to_the_same_bits(make: Any, tmp_path: Path) -> None:
    config = TrainConfig(epochs=5)
    arguments: dict[str, Any] = {"optimizer": lambda named: make(named, lr=0.02), "schedule": lambda progress: 1 - progress / 2}
    whole, data = task(6)
    reference = train(whole, data, objective, config, **arguments)
    assert reference.history[0].lr == pytest.approx(0.02 * (1 - 3.5 / 4 / 5 / 2))
    calls = 0

    def dies(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise Stop
        return objective(model, call, generator)

    net, _ = task(6)
    with pytest.raises(Stop):
        train(net, data, dies, config, checkpoint=tmp_path / "c", **arguments)
    net, _ = task(6)
    result = train(net, data, objective, config, checkpoint=tmp_path / "c", **arguments)
    assert torch.equal(weights(net), weights(whole))
    assert [(r.epoch, r.loss) for r in result.history] == [(r.epoch, r.loss) for r in reference.history]
    with pytest.raises(RunError, match="its learning rates"):
        train(task(6)[0], data, objective, config, checkpoint=tmp_path / "c", **{**arguments, "optimizer": lambda n: make(n, lr=0.03)})


def test_state_that_cannot_be_stored_matters_only_with_a_checkpoint(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                self.state[p]["thing"] = object()

    net, data = task(6)
    train(net, data, objective, TrainConfig(epochs=1), optimizer=Odd)
    with pytest.raises(RunError, match="cannot be stored exactly"):
        train(net, data, objective, TrainConfig(epochs=1), optimizer=Odd, checkpoint=tmp_path / "c")
    with pytest.raises(DataError, match=r"must return a torch\.optim\.Optimizer; got int"):
        train(net, data, objective, TrainConfig(), optimizer=lambda named: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(DataError, match="schedule returned nan"):
        train(net, data, objective, TrainConfig(), schedule=lambda progress: float("nan"))


def test_replay_repeats_augmentation() -> None:
    net, data = task(6)
    seen: list[float] = []

    def noisy(call: Call, generator: torch.Generator) -> Call:
        seen.append(float(torch.rand((), generator=generator)))
        return call

    train(net, data, objective, TrainConfig(epochs=4, replay=2, augment=noisy))
    assert seen[:8] == seen[8:] and len(set(seen)) == 8
    with pytest.raises(DataError, match="replay"):
        TrainConfig(replay=0)


def test_jsonl_holds_each_epoch_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    net, data = task(6)
    result = train(net, data, objective, TrainConfig(epochs=3), callbacks=[jsonl(path)])
    assert [EpochRecord(**json.loads(line)) for line in path.read_text().splitlines()] == list(result.history)
    path.write_text(path.read_text() + '{"epoch": 3, "lo')  # cut short by a kill
    again = EpochRecord(2, 0.5, {}, None, 0.1, 4, 1.0)
    jsonl(path)(again)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_a_failing_callback_is_named() -> None:
    def recorder(record: EpochRecord) -> None:
        raise ValueError("disk full")

    net, data = task(6)
    with pytest.raises(RunError, match=r"recorder raised ValueError: disk full after epoch 0"):
        train(net, data, objective, TrainConfig(epochs=2), callbacks=[recorder])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match="pip install mlflow"):
        mlflow()
    with pytest.raises(RunError, match="pip install tensorboard"):
        tensorboard(tmp_path)


def test_nan_tells_where_the_last_good_checkpoint_is(tmp_path: Path) -> None:
    net, data = task(6)
    calls = 0

    def poisoned(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        loss, terms = objective(model, call, generator)
        return (loss * float("nan") if calls == 6 else loss), terms

    with pytest.raises(DataError, match=r"step 5 \(epoch 1, batch 1\).*after epoch 0 in .*good\.safetensors"):
        train(net, data, poisoned, TrainConfig(epochs=3), checkpoint=tmp_path / "good.safetensors")
