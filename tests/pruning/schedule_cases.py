"""Small trainings for the tests of pruning schedules."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from shohin.data import Call, Data
from shohin.training import Objective, TrainConfig


class Killed(BaseException):
    """Ends a training as a kill would: nothing after the last checkpoint counts."""


def mlp(seed: int = 0, inputs: int = 12, hidden: int = 16, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class ResidualNet(nn.Module):
    """Convolutions with batch normalization, a residual stream and a depthwise layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.n0 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.n1 = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.dw, self.n2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.b, self.n3 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n0(self.stem(x)))
        y = F.relu(self.n2(self.dw(F.relu(self.n1(self.a(x))))))
        return self.fc(F.relu(x + self.n3(self.b(y))).mean((2, 3)))


def vectors(seed: int = 1, batches: int = 6, size: int = 16, inputs: int = 12, useful: int = 12) -> Data:
    """Three classes that the first ``useful`` inputs decide, linearly; the others are noise."""
    g = torch.Generator().manual_seed(seed)
    direction = torch.randn(useful, 3, generator=torch.Generator().manual_seed(99))
    xs = [torch.randn(size, inputs, generator=g) for _ in range(batches)]
    return Data([(x, (x[:, :useful] @ direction).argmax(1)) for x in xs])


def shuffled(data: Data, size: int = 8) -> Data:
    """The same samples in an order that a generator draws, which stands anywhere."""
    xs, ys = (torch.cat([batch[i] for batch in data.train or ()]) for i in (0, 1))
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    return Data(DataLoader(TensorDataset(xs, ys), batch_size=size, shuffle=True, generator=generator))


def images(seed: int = 1, batches: int = 5, size: int = 8) -> Data:
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randn(size, 2, 6, 6, generator=g) for _ in range(batches)]
    return Data([(x, (x[:, 0].mean((1, 2)) > 0).long() + (x[:, 1].mean((1, 2)) > 0).long()) for x in xs])


def task(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    return F.cross_entropy(model(*call.args), call.target), {}


def watched(look: Callable[[int, nn.Module], None]) -> Objective:
    """The task; before each step ``look(steps done in this call, model)``."""
    steps = [0]

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        look(steps[0], model)
        steps[0] += 1
        return task(model, call, generator)

    return objective


def killed_at(step: int) -> Objective:
    def look(steps: int, model: nn.Module) -> None:
        if steps == step:
            raise Killed

    return watched(look)


def short(optimizer: str = "adamw", **changes: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 4, "lr": 0.02, "optimizer": optimizer, **changes})


def same(a: nn.Module, b: nn.Module) -> bool:
    """True if all tensors have equal bits."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    return data.quality(model)
