"""A training that prunes, killed at any step and called again, ends in the same bits as one that was left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from schedule_cases import Killed, ResidualNet, images, killed_at, mlp, same, short, task, vectors
from torch import nn

from shohin.data import Data
from shohin.errors import RunError
from shohin.pruning.schedules import (
    cubic,
    forget,
    gradual,
    group_lasso,
    hard_movement,
    random_masks,
    rigl,
    soft_movement,
    weights_of,
)
from shohin.surgery import understand
from shohin.training import Objective, TrainConfig, train

Run = Callable[[nn.Module, Data, Objective, TrainConfig, Path | None], Any]


def _rigl(m: nn.Module, d: Data, o: Objective, c: TrainConfig, p: Path | None) -> Any:
    return rigl(m, d, o, c, masks=random_masks(weights_of(m), 0.4), every=3, checkpoint=p)


METHODS: dict[str, Run] = {
    "gradual": lambda m, d, o, c, p: gradual(m, d, o, c, pattern="unstructured 0.8", checkpoint=p),
    "gradual 2:4": lambda m, d, o, c, p: gradual(m, d, o, c, pattern="2:4", checkpoint=p),
    "hard movement": lambda m, d, o, c, p: hard_movement(m, d, o, c, pattern="unstructured 0.7", checkpoint=p),
    "soft movement": lambda m, d, o, c, p: soft_movement(m, d, o, c, penalty=0.1, threshold=0.45, rate=0.05, checkpoint=p),
    "rigl": _rigl,
    "group lasso": lambda m, d, o, c, p: group_lasso(m, understand(m, d.example()), d, o, c, strength=0.3, checkpoint=p),
    "forget": lambda m, d, o, c, p: forget(m, understand(m, d.example()), d, o, c, keep=0.6, warmup=4, periods=2, length=5, checkpoint=p),
}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_equals_uninterrupted(method: str, optimizer: str, tmp_path: Path) -> None:
    """Kills fall into the second and the last epoch: of growing and of final masks."""
    make, source = (ResidualNet, images) if optimizer == "adamw" else (mlp, vectors)
    run, config, path = METHODS[method], short(optimizer, ema=0.9 if optimizer == "sgd" else None), tmp_path / "c.safetensors"
    for step in (8, 5):
        with pytest.raises(Killed):
            run(make(), source(), killed_at(step), config, path)
    resumed, whole, dense = make(), make(), make()
    again = run(resumed, source(), task, config, path)
    straight = run(whole, source(), task, config, None)
    assert same(resumed, whole)
    assert [r.loss for r in again.training.history] == [r.loss for r in straight.training.history]
    kept = "masks" if hasattr(again, "masks") else "plan"
    first, second = getattr(again, kept), getattr(straight, kept)
    assert all(torch.equal(first[n], second[n]) for n in second) if kept == "masks" else first == second
    train(dense, source(), task, config)
    assert not same(dense, whole)
    done = make()  # a finished training returns at once, with its masks
    repeated = run(done, source(), killed_at(0), config, path)
    assert same(done, whole)
    assert all(torch.equal(repeated.masks[n], second[n]) for n in second) if kept == "masks" else repeated.plan == second


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    gradual(mlp(), vectors(), task, short(), pattern="unstructured 0.5", checkpoint=path)
    with pytest.raises(RunError, match="another pruning: patterns is"):
        gradual(mlp(), vectors(), task, short(), pattern="unstructured 0.6", shares=cubic(0.5, 0, 16), checkpoint=path)
    with pytest.raises(RunError, match="another pruning: shares is"):
        gradual(mlp(), vectors(), task, short(), pattern="unstructured 0.5", shares=cubic(0.5, 0, 20), checkpoint=path)
    with pytest.raises(RunError, match="another pruning"):
        hard_movement(mlp(), vectors(), task, short(), pattern="unstructured 0.5", checkpoint=path)
    with pytest.raises(RunError, match="another training"):
        train(mlp(), vectors(), task, short(), checkpoint=path)


def test_the_users_own_optimizer_is_used_and_resumed(tmp_path: Path) -> None:
    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(named, lr=0.01, momentum=0.5)

    def run(model: nn.Module, objective: Objective, path: Path | None) -> None:
        gradual(model, vectors(), objective, short(), pattern="unstructured 0.8", optimizer=make, checkpoint=path)

    resumed, whole = mlp(), mlp()
    with pytest.raises(Killed):
        run(mlp(), killed_at(15), tmp_path / "c")
    run(resumed, task, tmp_path / "c")
    run(whole, task, None)
    assert same(resumed, whole)
