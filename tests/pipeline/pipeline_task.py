"""A small residual net and a task that it learns in seconds. Run as a script it is a job that another process may kill."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from shohin.data import Data

CLASSES, CHANNELS, LENGTH = 4, 4, 64


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(width, width, 5, padding=2, bias=False), nn.BatchNorm1d(width)
        self.conv2, self.norm2 = nn.Conv1d(width, width, 5, padding=2, bias=False), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Watch(nn.Module):
    """Residual Conv1d: a stem, blocks, a mean over time and a head."""

    def __init__(self, width: int = 48, blocks: int = 2) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(CHANNELS, width, 5, padding=2, bias=False), nn.BatchNorm1d(width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean(-1))


def signals(count: int, seed: int) -> TensorDataset:
    """Waves of one of four frequencies with random phases on all channels, in noise: (count, 4, 64) and labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=g)
    phase = 6.2832 * torch.rand(count, CHANNELS, 1, generator=g)
    time = torch.arange(LENGTH) * 6.2832 / LENGTH
    waves = torch.sin((3 + 2 * labels).reshape(-1, 1, 1) * time + phase)
    return TensorDataset(waves + 1.2 * torch.randn(count, CHANNELS, LENGTH, generator=g), labels)


def trained(width: int = 48, blocks: int = 2, epochs: int = 3) -> nn.Module:
    """The net after a short training, in evaluation mode; the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        net = Watch(width, blocks)
        optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
        for _ in range(epochs):
            for x, y in DataLoader(signals(512, 1), 64, shuffle=True):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
    return net.eval()


def data(train: int = 512) -> Data:
    return Data(
        DataLoader(signals(train, 1), 64, shuffle=True),
        DataLoader(signals(256, 2), 128),
        test=DataLoader(signals(256, 3), 128),
    )


#: what the killed job asks; without a time limit each candidate's share of the time, and so the number of epochs, is fixed
ASKED = {"budget": "size <= 25 %, drop <= 0.2", "finalists": 1, "seed": 5, "methods": ("prune", "quantize", "distill"), "progress": False}


def job(out: Path) -> Any:
    """The job that is killed and resumed: cut, compensated, distilled and quantized."""
    import shohin

    torch.set_num_threads(1)
    return shohin.optimize(trained(48, 1, 1), data(256), out=out, **ASKED)  # type: ignore[arg-type]


def die_at_replacement(number: int) -> None:
    """The process ends itself by SIGKILL just before it renames its ``number``-th finished temporary file."""
    replace, seen = os.replace, 0

    def fragile(source: Any, target: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = fragile


if __name__ == "__main__":
    if sys.argv[2:]:
        die_at_replacement(int(sys.argv[2]))
    job(Path(sys.argv[1]))
