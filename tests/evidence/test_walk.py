"""Layers changed in turn: what a mask hides counts nowhere, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.formats import Scheme
from shohin.program import capture
from shohin.pruning.sparse import sparsify
from shohin.quantization import quantize_weights, weights_by_address
from shohin.surgery import understand


class Encoder(nn.Module):
    """Words to the mean of those that the mask shows; a layer whose weight is changed, one whose bias alone may move, an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.out(torch.relu(self.second(torch.relu(self.first(x)))))
        return (y * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]


def batches(hidden: float) -> Data:
    """Two words of ten are seen; the others hold noise of this size and mean."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(64, 10)
    mask[:, :2] = 1.0
    x = torch.randn(64, 10, 16, generator=generator)
    noise = hidden * (1 + torch.randn(64, 10, 16, generator=generator))
    return Data(train=[{"x": torch.where(mask[:, :, None] > 0, x, noise), "mask": mask}])


def quantized(model: nn.Module, data: Data) -> Mapping[str, Tensor]:
    program = capture(model, data.example())
    scheme = Scheme.parse("weights uint3 group 16")
    chosen = {a: scheme for a in weights_by_address(program) if not a.startswith("second")}
    return quantize_weights(program, list(data.calls("train")), chosen).program.tensors


def nearest(model: nn.Module, data: Data) -> Mapping[str, Tensor]:
    program = capture(model, data.example())
    scheme = Scheme.parse("weights uint3 group 16")
    return quantize_weights(program, list(data.calls("train")), {"first/linear.0": scheme}, rounding="nearest").program.tensors


def sparse(model: nn.Module, data: Data) -> Mapping[str, Tensor]:
    graph = understand(model, data.example())
    return sparsify(graph, list(data.calls("train")), {"first.weight": "2:4", "out.weight": "unstructured 0.5"})


@pytest.mark.parametrize("change", [quantized, nearest, sparse])
def test_what_a_mask_hides_counts_nowhere(change: Callable[[nn.Module, Data], Mapping[str, Tensor]]) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    few, many = change(model, batches(0.0)), change(model, batches(5.0))
    assert few.keys() == many.keys()
    for name, value in few.items():
        torch.testing.assert_close(many[name], value, rtol=1e-5, atol=1e-6)
    moved = {n for n, p in model.named_parameters() if n in few and not torch.equal(few[n], p)}
    assert {"first.weight", "first.bias", "second.bias"} <= moved
