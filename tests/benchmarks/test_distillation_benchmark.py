"""The benchmark of distillation on a task that takes seconds: every method of its own runs, equal in all but what it teaches."""

import math

import pytest
import torch
from torch import nn

import shohin
from distilling import learning
from distilling.learning import learn
from distilling.summary import FRESH, OURS, PLAIN, by_seed, figures, gain, mean_and_interval, table
from distilling.tasks import Task
from fashion_mnist import Batches, views
from models import ResNet
from shohin.training import TrainConfig, train


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes: where a bright square stands."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 10
    x = torch.randint(0, 60, (count, 1, 28, 28), generator=g, dtype=torch.uint8)
    for i, k in enumerate(y.tolist()):
        x[i, 0, 2 + 12 * (k // 5) : 12 + 12 * (k // 5), 5 * (k % 5) : 5 * (k % 5) + 5] += 60
    return x, y


@pytest.fixture(scope="module")
def task() -> Task:
    (x, y), (vx, vy), (tx, ty) = (images(n, i) for i, n in enumerate((320, 100, 100)))
    data = shohin.Data(train=Batches(x[None], y, 64, shuffle=True), validation=Batches(vx[None], vy, 50), test=Batches(tx[None], ty, 50))
    torch.manual_seed(0)
    teacher = ResNet((12, 16, 24), 1)
    train(teacher, data, learning.task_loss, TrainConfig(epochs=4, lr=1e-2))
    config = TrainConfig(epochs=2, lr=1e-2)
    return Task("squares", lambda: teacher.eval(), {"small": lambda: ResNet((4, 6, 8), 1)}, lambda: data, config, 10)


def test_every_method_takes_the_same_steps(task: Task, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "CACHE", tmp_path)
    records = [learn(task, "small", method, seed) for method in (PLAIN, "hinton", OURS, FRESH) for seed in (0, 1)]
    assert {r["steps"] for r in records} == {10} and len({r["parameters"] for r in records}) == 1
    longer = learn(task, "small", learning.SCRATCH, 0)
    assert longer["steps"] == 30
    text = table(records, {"squares": 0.9})
    assert all(f"| {method} |" in text for method in (PLAIN, "hinton", OURS, FRESH))
    found = figures(records, {"squares": 0.9})["squares small"]
    assert found["best_peer"] == "hinton"
    assert found["gain"] == list(gain(records, "squares", "small", OURS))
    assert learn(task, "small", "hinton", 1)["test"] == by_seed(records, "squares", "small", "hinton")[1]  # the same bits


def test_intervals() -> None:
    mean, low, high = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and math.isclose(high - mean, 4.302652729911275 / math.sqrt(3)) and math.isclose(mean - low, high - mean)
    assert math.isnan(mean_and_interval([1.0])[1]) and math.isnan(mean_and_interval([])[0])
    pairs = [{"task": "t", "student": "s", "method": m, "seed": s, "test": v} for m, v in ((PLAIN, 0.0), (OURS, 0.5)) for s in range(4)]
    assert gain(pairs, "t", "s", OURS) == (0.5, 0.5, 0.5)


def test_views_are_shifts_and_mirrors() -> None:
    x, _ = images(40, 3)
    made = views(x, 3)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    for view in made:
        for i, image in enumerate(view):
            shifts = [padded[i, :, d : d + 28, r : r + 28] for d in range(5) for r in range(5)]
            assert any(torch.equal(image, s) or torch.equal(image, s.flip(-1)) for s in shifts)
    assert torch.equal(made, views(x, 3)) and not torch.equal(made[0], made[1])
