"""A small training that ends its own process with SIGKILL at a chosen event. Run as a script, or imported for the reference run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from shohin import training
from shohin.data import Call, Data
from shohin.training import checkpoint


class Noisy(Dataset):  # type: ignore[type-arg]
    """Draws noise from NumPy's global generator, as many transforms do."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(40, 3, 8, generator=g)
        self.y = (self.x.mean((1, 2)) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.from_numpy(np.random.randn(3, 8).astype(np.float32)), self.y[i]


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 2))


def mirror(call: Call, generator: torch.Generator) -> Call:
    flip = bool(torch.rand((), generator=generator) < 0.5)
    return Call((call.args[0].flip(-1) if flip else call.args[0],), {}, call.target, call.batch)


def config(optimizer: str, **changes: object) -> training.TrainConfig:
    return training.TrainConfig(epochs=5, lr=0.02, optimizer=optimizer, ema=0.9, augment=mirror, **{"seed": 3, **changes})  # type: ignore[arg-type]


def run(
    optimizer: str, path: Path | None, die_at: str = "never", net: nn.Module | None = None, **changes: object
) -> tuple[nn.Module, training.TrainResult]:
    """``die_at``: "step:N", "evaluate:N" or "save:N": the N-th such event is the last thing that the process does."""
    torch.set_num_threads(1)
    kind, _, number = die_at.partition(":")
    seen = {"step": 0, "evaluate": 0, "save": 0}

    def event(name: str) -> None:
        seen[name] += 1
        if name == kind and seen[name] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace

    def fragile_replace(source: object, target: object) -> None:
        event("save")
        replace(source, target)  # type: ignore[arg-type]

    own = torch.Generator().manual_seed(
        int.from_bytes(os.urandom(4), "little")
    )  # the caller's generator may stand anywhere when a run resumes
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, generator=own)
    seen_data = Noisy()

    def objective(m: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss = F.cross_entropy(m(call.args[0]), call.target)
        event("step")
        return loss, {"task": loss.item()}

    def evaluate(m: nn.Module) -> float:
        event("evaluate")
        return float(F.cross_entropy(m(seen_data.x), seen_data.y))

    net = net or model()
    checkpoint.os.replace = fragile_replace  # type: ignore[attr-defined]
    try:
        result = training.train(
            net, Data(loader), objective, config(optimizer, **changes), checkpoint=path, evaluate=evaluate, lower_is_better=True
        )
    finally:
        checkpoint.os.replace = replace  # type: ignore[attr-defined]
    return net, result


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
