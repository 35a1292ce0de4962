"""A small training with `Dot`; run as a script, one of two processes: rank, rendezvous file, folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.distillation import Dot, distillation_objective
from shohin.training import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from two_processes import meet, part


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
    meet(rank, meeting)
    net = run(slice(0, 3) if rank == 0 else slice(3, 8))
    torch.save([p.detach() for p in net.parameters()], folder / f"{rank}.pt")
    part(rank, folder)
