"""Layers that go back to float so that quality holds: the worst first, no more than needed, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import target_nets as nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.data import Call
from shohin.errors import BudgetError, DataError
from shohin.formats import is_scheme
from shohin.program import ProgramModule, capture
from shohin.quantization import quantizable, quantize_layers
from shohin.quantization.causes import beyond_ranges, unlike_training
from shohin.quantization.damage import SAMPLES, Damage, damages


class Poisoned(nn.Module):
    """Four convolutions; of what the third one reads, one channel is a thousand times the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = F.relu(layer(x))
        return self.head(x.mean((2, 3)))


def poisoned(seed: int = 0) -> tuple[nn.Module, shohin.Data]:
    model = nets.randomize(Poisoned(), seed)
    with torch.no_grad():
        model.b.weight[0] *= 1000
        model.b.bias[0] *= 1000
        model.c.weight[:, 0] /= 1000
    x = torch.randn(256, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    return model, shohin.Data(train=list(zip(x.split(32), y.split(32), strict=True)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_poisoned_layer_and_what_makes_its_input_go_back(seed: int, tmp_path: Path) -> None:
    model, data = poisoned(seed)
    found = shohin.quantize(model, data, "int8", drop="8 %", equalize=False)
    quality = found.notes["quality"]
    assert quality["float"] == 1.0 and quality["all"] < 0.92 <= quality["kept"]
    returned = found.notes["returned"]
    assert list(returned) == ["c/conv2d.0", "b/conv2d.0"] and len(found.plan.formats) == 3
    assert "its input's channels differ" in returned["c/conv2d.0"] and returned["b/conv2d.0"] == "it makes the input of c/conv2d.0"
    if seed == 0:
        shipped = shohin.export(found, data, path=tmp_path / "m.onnx")
        assert shipped.metrics.quality is not None and shipped.metrics.quality.value == pytest.approx(quality["kept"], abs=0.02)


def test_nothing_goes_back_where_quality_holds_and_all_where_nothing_else_does() -> None:
    model, data = poisoned()
    easy = shohin.quantize(model, data, "int8", drop=1.0)
    assert easy.notes["returned"] == {} and easy.notes["quality"]["all"] == easy.notes["quality"]["kept"] and len(easy.plan.formats) == 5
    calls = []

    def metric(run: object) -> float:  # falls with anything but the float program
        calls.append(run)
        out = run(torch.ones(1, 3, 10, 10))  # type: ignore[operator]
        return float(torch.equal(out, wanted))

    wanted = ProgramModule(capture(model, data.example()))(torch.ones(1, 3, 10, 10)).detach()
    hard = shohin.quantize(model, shohin.Data(train=data.train, metric=metric), "int8", drop=0)
    assert hard.plan.formats == {} and len(hard.notes["returned"]) == 5 and len(calls) < 8
    assert hard.notes["quality"] == {"float": 1.0, "all": 0.0, "kept": 1.0}


def test_weights_of_few_bits_go_back_too() -> None:
    torch.manual_seed(0)
    model = nets.randomize(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5)), 0)
    x = torch.randn(256, 32)
    data = shohin.Data(train=list(zip(x.split(64), model(x).argmax(1).split(64), strict=True)))
    found = shohin.quantize(model, data, "weights int2 group 32", rounding="nearest", drop="10 %")
    assert 0 < len(found.notes["returned"]) <= 3 and found.notes["quality"]["kept"] >= 0.9
    assert all("weights" in why for why in found.notes["returned"].values())
    assert all(map(is_scheme, found.plan.formats.values()))


@pytest.mark.parametrize("name", ["2d", "transformer"])
def test_what_is_foretold_of_a_layer_is_what_it_does(name: str) -> None:
    """To first order, and with directions drawn at random: within a factor of a few."""
    make, shape = {"2d": (nets.Residual2d, (3, 12, 12)), "transformer": (nets.Transformer, (8, 32))}[name]
    model = nets.randomize(make(), 0)
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    program, calls = capture(model, (x,)), [Call((x,), {}, None, None)]
    layers = quantizable(program)
    whole = quantize_layers(program, calls, dict.fromkeys(layers, "int8"), smoothing=False)
    found = damages(program, whole, calls)
    assert set(found) == set(layers) and list(found) == sorted(found, key=lambda a: -found[a].moved)
    with torch.no_grad():
        wanted = model(x)
        for address in layers:
            alone = quantize_layers(program, calls, {address: "weights int4 channel"}, rounding="nearest")
            truth = float((alone.view()(x) - wanted).square().sum() / len(x))
            foretold = damages(program, alone, calls)[address].moved
            assert truth / 4 < foretold < truth * 4, address


def test_of_a_large_batch_the_first_samples_are_looked_at() -> None:
    model = nets.randomize(nets.Residual2d(), 0)
    x = torch.randn(3 * SAMPLES, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    large, small = (Call((part,), {}, None, part) for part in (x, x[:SAMPLES]))
    program = capture(model, large)
    quantized = quantize_layers(program, [large], dict.fromkeys(quantizable(program), "int8"))
    found, wanted = (damages(program, quantized, [call]) for call in (large, small))
    assert {a: d.moved for a, d in found.items()} == pytest.approx({a: d.moved for a, d in wanted.items()}, rel=1e-4)


def test_reasons() -> None:
    assert "weights" in Damage(1.0, 0.1, 0.9, 9.0, 0.5).reason
    assert Damage(1.0, 0.9, 0.1, 9.0, 0.05).reason == "its input saturates: 5.0% of the values lie beyond the range that was chosen"
    assert "outliers: the largest value is 9 times" in Damage(1.0, 0.9, 0.1, 9.0, 0.0).reason
    assert "finer steps" in Damage(1.0, 0.9, 0.1, 1.2, 0.0).reason


def test_a_bound_that_cannot_be_judged_is_refused() -> None:
    model, data = poisoned()
    with pytest.raises(DataError, match="drop needs a quality to keep"):
        shohin.quantize(model, shohin.Data(train=[x for x, _ in data.train or ()]), "int8", drop="1 %")
    with pytest.raises(BudgetError):
        shohin.quantize(model, data, "int8", drop="a little")


class Normalized(nn.Module):
    """Convolutions with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.b, self.bn = nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.b(F.relu(self.an(self.a(x))))))
        return self.head(x.mean((2, 3)))


def test_calibration_data_that_are_not_right_are_told() -> None:
    torch.manual_seed(0)
    model = Normalized()
    x = torch.randn(128, 3, 10, 10)
    for _ in range(60):
        model(x)
    model.eval()
    program = capture(model, x[:4])
    like, unlike, few = (list(shohin.Data(train=[batch]).calls("train")) for batch in (x[:64], x[:64] * 3 + 4, x[:64] * 0.1))
    assert unlike_training(program, like) == {}
    told = unlike_training(program, unlike)
    assert "a/conv2d.0" in told and "not like those that its batch normalization has seen" in told["a/conv2d.0"]
    layers = dict.fromkeys(quantizable(program), "int8")
    of_few, of_all = (quantize_layers(program, calls, layers) for calls in (few, like))
    assert beyond_ranges(program, of_all, like, list(shohin.Data(train=[x[64:]]).calls("train"))) == {}
    told = beyond_ranges(program, of_few, few, like)
    assert "a/conv2d.0" in told and told["a/conv2d.0"].startswith("too little calibration data: ")
    assert beyond_ranges(program, of_few, few, []) == {}


def test_a_layer_that_returns_says_that_calibration_saw_too_little() -> None:
    torch.manual_seed(0)
    model, x = Normalized().eval(), torch.randn(128, 3, 10, 10)
    with torch.no_grad():
        labels = model(x).argmax(1)
    small, full = ([(x[i : i + 32] * scale, labels[i : i + 32]) for i in range(0, 128, 32)] for scale in (0.02, 1.0))
    found = shohin.quantize(model, shohin.Data(train=small, validation=full), "int8", drop="1 %")
    assert found.notes["quality"]["all"] < 0.99 and found.notes["returned"]
    assert any("too little calibration data" in why for why in found.notes["returned"].values())
