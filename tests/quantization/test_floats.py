"""Floating-point and block formats of layers, in simulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.errors import DataError, PlanError, TargetError
from shohin.formats import BLOCK_FORMATS, FLOAT_FORMATS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 40, 3, padding=1, groups=1), nn.BatchNorm2d(40)
        self.body, self.head = nn.Linear(40, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.gelu(self.body(F.relu(self.norm(self.stem(x))).mean((2, 3)))))
        return out


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data() -> shohin.Data:
    torch.manual_seed(1)
    return shohin.Data(train=[torch.randn(8, 3, 6, 6) for _ in range(3)])


def rounded(x: Tensor, name: str, largest: Tensor | float, axis: int) -> Tensor:
    if name in BLOCK_FORMATS:
        return BLOCK_FORMATS[name].rounded(x, axis)
    form = FLOAT_FORMATS[name]
    scale = torch.as_tensor(largest) / form.largest if form.bits <= 8 else torch.ones(())
    return form.rounded(x / scale) * scale


@pytest.mark.parametrize("name", [*FLOAT_FORMATS, *BLOCK_FORMATS])
def test_views_round_what_each_layer_reads_and_holds(model: Net, name: str) -> None:
    known, before = data(), {n: t.clone() for n, t in model.state_dict().items()}
    found = shohin.quantize(model, known, name, None)
    assert found.view is not None and set(found.plan.formats.values()) == {name} and len(found.plan.formats) == 3
    calls = [call.args[0] for call in known.calls("train")]
    scale = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)  # type: ignore[operator]
    folded = model.stem.weight * scale[:, None, None, None]
    bias = (model.stem.bias - model.norm.running_mean) * scale + model.norm.bias  # type: ignore[operator]

    def layer(x: Tensor, weight: Tensor, bias: Tensor, largest: float) -> Tensor:
        most = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.dim() - 1))
        w, axis = rounded(weight, name, most, 1), 1 if weight.dim() == 4 else -1
        y = rounded(x, name, largest, axis)
        return F.conv2d(y, w, bias, padding=1) if weight.dim() == 4 else F.linear(y, w, bias)

    with torch.no_grad():
        inner = [F.relu(model.norm(model.stem(x))).mean((2, 3)) for x in calls]
        outer = [F.gelu(model.body(x)) for x in inner]
        most = [max(float(x.abs().max()) for x in part) for part in (calls, inner, outer)]
        x = torch.randn(5, 3, 6, 6)
        y = F.relu(layer(x, folded, bias, most[0])).mean((2, 3))
        wanted = layer(F.gelu(layer(y, model.body.weight, model.body.bias, most[1])), model.head.weight, model.head.bias, most[2])
        error = (found.view.eval()(x) - wanted).square().sum() / wanted.square().sum()
        plain = (model(x) - wanted).square().sum() / wanted.square().sum()
    assert error < 1e-3 * plain + 1e-9  # a value between two others may fall to either side
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_fewer_bits_lose_more(model: Net) -> None:
    known = data()
    x = torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        errors = {
            n: float((shohin.quantize(model, known, n, None).view.eval()(x) - model(x)).square().sum())
            for n in ("fp16", "bf16", "e4m3", "e2m1")
        }  # type: ignore[union-attr]
    assert errors["fp16"] < errors["bf16"] < errors["e4m3"] < errors["e2m1"]


def test_formats_go_together_and_weights_are_of_the_format(model: Net) -> None:
    found = shohin.quantize(model, data(), {"*": "int8", "head*": "bf16"}, None)
    assert found.model is not None and found.view is not None
    head = found.model.head.weight  # type: ignore[union-attr]
    assert isinstance(head, Tensor) and torch.equal(head.bfloat16().float(), head) and not torch.equal(head, model.head.weight)
    assert "head.weight" not in found.evidence and "body.weight" in found.evidence
    table = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3)).eval()
    tokens = shohin.Data(example=(torch.randint(0, 9, (2, 5)),))
    held = shohin.quantize(table, tokens, "mxfp4", None)
    assert held.model is not None and held.plan.formats["0/embedding.0"] == "mxfp4"
    rows = held.model[0].weight  # type: ignore[index]
    torch.testing.assert_close(rows, BLOCK_FORMATS["mxfp4"].rounded(table[0].weight, 1))  # type: ignore[arg-type]


def test_what_is_only_simulated_says_so(model: Net, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no kernels for 'e4m3'.*'w4a8'.*target=None"):
        shohin.quantize(model, data(), "e4m3")
    with pytest.raises(TargetError, match=r"'bf16'.*only simulated"):
        shohin.export(shohin.quantize(model, data(), "bf16", None), data(), path=tmp_path / "m.onnx")
    with pytest.raises(DataError, match=r"'e5m2' needs calibration"):
        shohin.quantize(model, shohin.Data(example=(torch.randn(2, 3, 6, 6),)), "e5m2", None)
    with pytest.raises(DataError, match="NaN or infinity"):
        shohin.quantize(model, shohin.Data(train=[torch.full((2, 3, 6, 6), float("nan"))]), "e5m2", None)
    with pytest.raises(PlanError, match="only simulated: neither"):
        shohin.quantize(model, data(), "bf16", None, recover="qat")
    with pytest.raises(PlanError, match="mxfp5"):
        shohin.quantize(model, data(), "mxfp5", None)
