"""What is read both as codes and as floats, in many shapes: the view reads it as the file does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin


class Parts(nn.Module):
    """Layers that a function puts together."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.l, self.k, self.o, self.n = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def gate(y: Tensor) -> Tensor:
    return torch.sigmoid(y).mean((2, 3))


def sliced(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(x)
    return gate(m.a(m.b(h)[:, :, 1:-1] + h[:, :, 1:-1]))


def meaned(m: Any, x: Tensor) -> Tensor:
    y = m.n(x)
    return m.l(y.mean(1)) + torch.tanh(m.k(y)).mean(1)


def pooled(m: Any, x: Tensor) -> Tensor:
    f = F.silu(m.a(x)).mean((2, 3))
    return m.l(f) + F.normalize(f)


def mixed(m: Any, x: Tensor) -> Tensor:
    z = m.l(x)
    return m.k(z) + F.gelu(z)


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "gelu": (lambda m, x: gate(m.a(x)) + gate(m.b(F.gelu(x))), (8, 6, 6)),
    "silu": (lambda m, x: gate(m.a(x)) + gate(m.b(F.silu(x))), (8, 6, 6)),
    "norm": (lambda m, x: m.l(x) + torch.tanh(m.k(m.n(x))), (8,)),
    "slice": (sliced, (8, 6, 6)),
    "mean": (meaned, (7, 8)),
    "smoothed sum": (lambda m, x: m.o(m.k(m.l(x)) + x), (8,)),
    "pooled": (pooled, (8, 6, 6)),
    "mixed": (mixed, (8,)),
    "mixed sequence": (mixed, (5, 8)),
    "float operand": (lambda m, x: gate(m.a(F.relu(m.b(x) + 0.5 * F.silu(m.a(x))))), (8, 6, 6)),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", CASES)
def test_the_view_reads_what_the_file_reads(case: str, target: str, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    function, shape = CASES[case]
    torch.manual_seed(7)
    data = shohin.Data(train=[torch.randn(4, *shape) for _ in range(4)])
    shipped = shohin.export(shohin.quantize(Parts(function).eval(), data, "int8", target), data, target, tmp_path / "m.onnx")
    found = shipped.notes["parity"]
    assert found["boundaries"]["view_runtime"]["max_rel"] < 2e-4 and found["departs"] == []
