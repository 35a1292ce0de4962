"""A training that is killed at any moment and called again ends in the same bits as one that was left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shohin.errors import RunError
from shohin.training import TrainConfig, train
from shohin.training.checkpoint import Position, load_checkpoint, save_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import killable

KILLS = {"adamw": ["step:8", "save:2"], "sgd": ["evaluate:3"]}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_killed_and_resumed_equals_uninterrupted(optimizer: str, tmp_path: Path) -> None:
    path = tmp_path / "work" / "training.safetensors"
    for die_at in KILLS[optimizer]:
        done = subprocess.run([sys.executable, killable.__file__, optimizer, str(path), die_at], check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    net, resumed = killable.run(optimizer, path)
    reference, whole = killable.run(optimizer, None)
    assert [r.epoch for r in resumed.history] == [-1, 0, 1, 2, 3, 4]
    assert [(r.loss, r.quality, r.lr) for r in resumed.history] == [(r.loss, r.quality, r.lr) for r in whole.history]
    assert resumed.best_epoch == whole.best_epoch >= 0
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written is left
    again, repeated = killable.run(optimizer, path)  # a finished training returns at once
    assert repeated.history == resumed.history
    assert torch.equal(again.state_dict()["0.weight"], net.state_dict()["0.weight"])


def test_only_the_seed_decides() -> None:
    """Neither the caller's global state nor where the loader's generator stands matters; the configured seed does."""
    torch.manual_seed(1)
    first, _ = killable.run("adamw", None)
    torch.manual_seed(5)
    second, _ = killable.run("adamw", None)
    third, _ = killable.run("adamw", None, seed=4)
    assert torch.equal(first.state_dict()["0.weight"], second.state_dict()["0.weight"])
    assert not torch.equal(first.state_dict()["0.weight"], third.state_dict()["0.weight"])


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    killable.run("adamw", path)
    with pytest.raises(RunError, match="optimizer is 'adamw' there, 'sgd' here"):
        killable.run("sgd", path)
    other = killable.model()
    with torch.no_grad():
        other[0].weight.mul_(1.01)
    with pytest.raises(RunError, match=r"other weights: the norm of 0\.weight"):
        killable.run("adamw", path, net=other)
    wide = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(RunError, match="belongs to another training: tensor"):
        killable.run("adamw", path, net=wide)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    killable.run("adamw", path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="is damaged"):
        killable.run("adamw", path)


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    (tmp_path / ".c.safetensors.123.tmp").write_bytes(b"half")
    assert load_checkpoint(path, {}) is None
    assert list(tmp_path.iterdir()) == []


def test_position_round_trip(tmp_path: Path) -> None:
    sign = {"config": TrainConfig().to_json(), "lower_is_better": False, "shapes": {}, "norms": {}}
    position = Position(3, 30, 10, 1, 0.1 + 0.2, 0.7, 2, None, [])
    tensors = {"model": {"a/b": torch.arange(6).reshape(2, 3).t()}, "best": {"s": torch.tensor(2.5, dtype=torch.float64)}}
    save_checkpoint(tmp_path / "p", position, tensors, sign)
    found = load_checkpoint(tmp_path / "p", sign)
    assert found is not None and found[0] == position
    assert torch.equal(found[1]["model"]["a/b"], tensors["model"]["a/b"])
    assert torch.equal(found[1]["best"]["s"], tensors["best"]["s"])


def test_caller_random_state_is_given_back() -> None:
    data = killable.Data([(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))])
    net = nn.Linear(3, 2)
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    train(net, data, lambda m, c, g: (m(*c.args).square().mean() + torch.rand(()), {}), TrainConfig(epochs=1))
    assert torch.equal(torch.rand(3), expected)
