"""One of two processes that train together. Run as a script: rank, rendezvous file, folder, kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from shohin.data import Call, Data
from shohin.errors import DataError
from shohin.training import TrainConfig, TrainResult, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from two_processes import meet, part


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def batches(share: slice) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [(b[share], b[share, :1] * 2) for b in x.split(8)]


def run(net: nn.Module, share: slice, poison: int = -1, path: Path | None = None) -> TrainResult:
    calls = 0

    def objective(m: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        loss = (m(*call.args) - call.target).square().mean()
        loss = loss * float("nan") if calls == poison else loss
        return loss, {"task": loss.item()}

    def evaluate(m: nn.Module) -> float:
        return float((m(torch.ones(2, 4, dtype=torch.float64)) - 2).square().mean())

    config = TrainConfig(epochs=4, lr=0.01, ema=0.9)
    return train(net, Data(batches(share)), objective, config, evaluate=evaluate, lower_is_better=True, checkpoint=path)


if __name__ == "__main__":
    rank, meeting, folder, kind = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    meet(rank, meeting)
    net, out = model(rank), {}
    share = slice(0, 3) if rank == 0 else slice(3, 8)  # unequal shares weigh by their samples
    try:
        result = run(net, share, 5 if kind == "nan" and rank == 1 else -1, folder / "c.safetensors")
        out = {"losses": [r.loss for r in result.history], "quality": [r.quality for r in result.history]}
    except DataError as error:
        out = {"error": str(error)}
    out["weights"] = [p.tolist() for p in net.parameters()]
    (folder / f"{rank}.json").write_text(json.dumps(out))
    part(rank, folder, kind)
