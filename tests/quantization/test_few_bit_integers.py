"""Integer layers with weights of few bits: which bits activations get, and codes that make up for each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import target_nets as nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.data import Call
from shohin.errors import PlanError
from shohin.formats import INT8, Bits, is_bits
from shohin.program import capture
from shohin.quantization import quantizable, quantize_layers

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nets.Residual1d(), (6, 32)),
    "2d norm": (lambda: nets.Residual2d(norm=True), (3, 12, 12)),
    "transformer": (lambda: nets.Transformer(), (8, 32)),
}


@pytest.mark.parametrize("form", ["w3a8", "w4a8"])
@pytest.mark.parametrize("net", NETS)
def test_second_order_codes_lose_less_and_files_hold_them(net: str, form: str, tmp_path: Path) -> None:
    make, shape = NETS[net]
    torch.manual_seed(0)
    model = make().eval()
    data = shohin.Data(train=[torch.randn(16, *shape) for _ in range(8)])
    x, errors = torch.randn(512, *shape), {}
    for rounding in ("nearest", "auto"):
        found = shohin.quantize(model, data, form, rounding=rounding)
        assert found.view is not None
        with torch.no_grad():
            errors[rounding] = float((found.view.eval()(x) - model(x)).square().sum())
        bits = Bits.parse(form).weights
        weights = [q for name, q in found.evidence.items() if name.endswith("weight")]
        assert weights and all(q.format == bits for q in weights)
    assert errors["auto"] < (0.9 if form == "w3a8" else 1.0) * errors["nearest"]
    shipped = shohin.export(found, data, path=tmp_path / "m.onnx")
    assert shipped.notes["parity"]["departs"] == [] and shipped.notes["parity"]["boundaries"]["view_runtime"]["max_rel"] < 0.01


class Forks(nn.Module):
    """An activation that two layers read, a sum, and one that only a sum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        out: Tensor = self.d(F.relu(self.b(y) + self.c(y)))
        return out


def test_an_activation_has_the_bits_of_the_reader_that_asks_for_the_most() -> None:
    torch.manual_seed(0)
    calls = [Call((x,), {}, None, x) for x in torch.randn(3, 4, 4, 6, 6)]
    program = capture(Forks().eval(), calls[0])
    formats = {"a/conv2d.0": "w4a4", "b/conv2d.0": "w2a3", "c/conv2d.0": "w8a6", "d/conv2d.0": "w5a2"}
    found = quantize_layers(program, calls, formats)
    bits = {name: q.format.bits for name, q in found.by_address().items()}
    assert bits["x"] == 4 and bits["/relu.0"] == 6 and bits["/relu.1"] == 2
    assert bits["b/conv2d.0"] == bits["c/conv2d.0"] == 8  # a sum alone reads them
    assert [bits[f"{layer}.weight"] for layer in "abcd"] == [4, 2, 8, 5]
    assert set(quantizable(program)) == formats.keys()


@pytest.mark.parametrize("text", ["int8", "w2a8", "w8a2", "w5a3", "w8a8"])
def test_words_of_formats_are_read_back(text: str) -> None:
    assert str(Bits.parse(text)) == ("int8" if text == "w8a8" else text) and Bits.parse(str(Bits.parse(text))) == Bits.parse(text)
    assert is_bits(text) and (Bits.parse(text) == INT8) == (text in ("int8", "w8a8"))


@pytest.mark.parametrize("text", ["w1a8", "w9a8", "a8w4", "int4", "w4", "", "weights int8 channel"])
def test_other_words_are_refused(text: str) -> None:
    assert not is_bits(text)
    with pytest.raises(PlanError, match="wXaY"):
        Bits.parse(text)
