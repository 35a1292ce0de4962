"""A small training with `Dot`; run as a script, one of two processes: rank, rendezvous file, folder."""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.distillation import Dot, distillation_objective
from shohin.training import TrainConfig, train


def model(seed: int, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


def batches(share: slice) -> list[tuple[Tensor, Tensor]]:
    """Batches of 8, 8 and 6 samples; ``share`` of each."""
    x = torch.randn(22, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [(b[share], b[share, :3].argmax(1)) for b in x.split(8)]


def run(share: slice) -> nn.Module:
    net, data = model(0), Data(batches(share))
    objective = distillation_objective(model(9), alpha=0.4, task_loss=data.batch_loss, apart=True)
    config = TrainConfig(epochs=3, lr=0.05, optimizer="sgd", clip=0.3)
    train(net, data, objective, config, optimizer=lambda named: Dot(named, 0.05, 0.9, 0.07))
    return net


if __name__ == "__main__":
    rank, meeting, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=25)
    )
    net = run(slice(0, 3) if rank == 0 else slice(3, 8))
    torch.save([p.detach() for p in net.parameters()], folder / f"{rank}.pt")
    (folder / f"{rank}.done").touch()
    until = time.monotonic() + 20
    while not (folder / f"{1 - rank}.done").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os._exit(0)  # gloo's threads may abort a process that takes the group down while the other one still talks
