"""Int8 files: integer kernels everywhere, and the codes of a simulation of the same sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import target_nets as nets
import torch
from torch import Tensor, nn

from shohin.formats import Quantizer, named_format
from shohin.targets import Lowered, Target, get_target
from shohin.targets.onnxruntime.inspect import check, counts, summary
from shohin.targets.onnxruntime.rules import inside
from shohin.targets.onnxruntime.session import Runner
from shohin.targets.parity import boundaries

torch.set_num_threads(1)
CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, int]]] = {
    "2d": (
        lambda: nets.Residual2d(),
        (3, 16, 16),
        {
            "QLinearConv": 4,
            "QLinearAdd": 1,
            "QLinearConcat": 1,
            "NhwcMaxPool": 1,
            "QLinearGlobalAveragePool": 1,
            "QGemm": 1,
            "QuantizeLinear": 1,
        },
    ),
    "1d": (
        lambda: nets.Residual1d(),
        (6, 32),
        {"QLinearConv": 2, "QLinearAdd": 1, "NhwcMaxPool": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    ),
    "transformer": (lambda: nets.Transformer(), (8, 32), {"QGemm": 6, "MatMulIntegerToFloat": 1, "LayerNormalization": 2, "Softmax": 1}),
}


def lowered_case(
    case: str, tmp_path: Path, seed: int = 1
) -> tuple[nn.Module, Lowered, dict[str, Quantizer], tuple[str, ...], tuple[int, ...]]:
    make, shape, _ = CASES[case]
    module = nets.randomize(make(), seed)
    taps = nets.TAPPED[type(module).__name__]
    activations, weights = nets.calibrated(module, torch.randn(16, *shape, generator=torch.Generator().manual_seed(seed)), taps)
    if case == "transformer":
        del activations["x"]  # read by float operators alone
    lowered = get_target("onnxruntime").lower(
        nets.tapped(module, taps), (torch.randn(1, *shape),), tmp_path / "q.onnx", taps=taps, activations=activations, weights=weights
    )
    return module, lowered, weights, taps, shape


@pytest.mark.parametrize("case", CASES)
def test_integer_kernels_and_codes(case: str, tmp_path: Path) -> None:
    module, lowered, weights, taps, shape = lowered_case(case, tmp_path)
    found = counts(get_target("onnxruntime").inspect(lowered.path))
    assert {op: found.get(op, 0) for op in CASES[case][2]} == CASES[case][2]
    assert not found.keys() & {"Conv", "FusedConv", "Gemm", "FusedGemm", "ReduceMean" if case != "transformer" else "Conv"}
    assert "DequantizeLinear" not in found  # nothing is dequantized at run time
    assert check(lowered.path, dict.fromkeys(weights, "int8")) == [] and lowered.notes == ()
    if case != "transformer":
        assert check(lowered.path, dict.fromkeys(taps, "int8")) == []
    assert len(check(lowered.path, dict.fromkeys(weights, "float32"))) == len(weights)
    assert summary(lowered.path)["float_layers"] == 0

    simulated = nets.Simulation(module, lowered.activations, weights)
    inputs = [(torch.randn(size, *shape, generator=torch.Generator().manual_seed(size)),) for size in (1, 8)]
    for boundary, report in boundaries(simulated, lowered.path, Target("onnxruntime"), inputs, 2e-2).items():
        assert report["passes"], (boundary, report)
    differ, far, total = code_differences(lowered, simulated, inputs[1][0], tmp_path)
    assert far <= 1e-3 * total and differ <= 2e-2 * total, (differ, far, total)


def code_differences(lowered: Lowered, simulated: nets.Simulation, x: Tensor, tmp_path: Path) -> tuple[int, int, int]:
    """Codes of all sites, runtime against simulation: how many differ, differ by more than one step, and all."""
    model = onnx.load(str(lowered.path))
    sites = [name for name in lowered.activations if name != "x"]
    for name in sites:
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}_quantized", onnx.TensorProto.UINT8, None))
    path = tmp_path / "codes.onnx"
    del model.metadata_props[:]
    onnx.save(model, str(path))
    codes = dict(zip(sites, Runner(path)(x)[1:], strict=True))
    simulated(x)
    differ = far = total = 0
    for name in sites:
        wanted = lowered.activations[name].codes(simulated.seen[name])
        distance = (codes[name].long() - wanted).abs()
        differ, far, total = differ + int((distance > 0).sum()), far + int((distance > 1).sum()), total + distance.numel()
    assert total > 1000
    return differ, far, total


def test_weights_in_the_file_are_the_quantizers_codes(tmp_path: Path) -> None:
    module, lowered, weights, _, _ = lowered_case("transformer", tmp_path)
    held = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(lowered.path)).graph.initializer}
    for name, quantizer in weights.items():
        codes = quantizer.codes(module.get_parameter(name)).numpy()
        assert held[name].dtype == "int8"
        assert np.array_equal(held[name], codes) or np.array_equal(held[name], codes.T)
    assert lowered.size_bytes < 1.1 * sum(p.numel() for p in module.parameters()) + 14_000


def test_float_layers_stay_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime quantizes a single float layer on its own: the file prevents it, and the check would see it."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
            return self.head(x.mean((2, 3)))

    module, x = nets.randomize(Chain(), 0), torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    taps = ("relu", "relu_1", "relu_2", "mean")
    activations, weights = nets.calibrated(module, x, taps)

    def lower(floats: set[str], without: set[str]) -> tuple[Lowered, list[str]]:
        chosen = {k: v for k, v in weights.items() if k not in floats}
        kept = {k: v for k, v in activations.items() if k not in without}
        made = get_target("onnxruntime").lower(
            nets.tapped(module, taps), (x,), tmp_path / "m.onnx", taps=taps, activations=kept, weights=chosen
        )
        expected = {name: "float32" if name in floats else "int8" for name in weights}
        return made, check(made.path, expected)

    made, wrong = lower({"b.weight"}, set())
    assert wrong == [] and any(note.startswith("b.weight") for note in made.notes)
    kept = {name: quantizer for name, quantizer in weights.items() if name != "b.weight"}
    assert boundaries(nets.Simulation(module, made.activations, kept), made.path, Target("onnxruntime"), [(x,)], 2e-2)["view_runtime"][
        "passes"
    ]
    with monkeypatch.context() as patch:
        patch.setattr("shohin.targets.onnx.lower.shield_float", lambda *_: None)
        _, wrong = lower({"b.weight"}, set())
    assert [line.split(":")[0] for line in wrong] == ["b.weight"] and "QLinearConv" in wrong[0]
    made, wrong = lower({"a.weight", "b.weight"}, {"x", "relu"})  # a float segment before the integer part
    assert wrong == [] and made.notes == ()
    made, wrong = lower({"c.weight", "head.weight"}, {"relu_2", "mean"})  # and behind it
    assert wrong == [] and made.notes == ()
    made, wrong = lower(set(), {"relu_1"})  # a site forgotten: two layers fall back to float, and both are named
    assert [line.split(":")[0] for line in wrong] == ["b.weight", "c.weight"] and len(made.notes) == 2


@pytest.mark.parametrize("high", [4.0, 6.0, 9.0])
def test_range_is_fitted_into_a_clip(high: float) -> None:
    fmt = named_format("uint8")
    quantizer = Quantizer(fmt, torch.tensor((high + 1.0) / 255, dtype=torch.float64), torch.tensor(round(255 / (high + 1.0))), None)
    fitted = inside(quantizer, 0.0, 6.0)
    assert int(fitted.zero_point) == 0
    top = float((fmt.high - quantizer.zero_point) * quantizer.scale)
    assert float(fitted.scale.float() * 255) <= 6.0
    assert float(fitted.scale) * 255 == pytest.approx(min(top, 6.0), rel=1e-6)
    assert inside(fitted, 0.0, 6.0) is fitted
    assert inside(quantizer, -1.0, 1.0) is quantizer


def test_quantizers_that_break_the_rules_are_fitted_and_named(tmp_path: Path) -> None:
    """Zero points behind ReLU, a range beyond ReLU6, and another scale behind MaxPool: still all integer."""
    module = nets.randomize(nets.Residual2d(), 2)
    taps = nets.TAPPED["Residual2d"]
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    activations, weights = nets.calibrated(module, x, taps)
    fmt = named_format("uint8")
    for name in ("relu6", "relu", "relu_1"):
        activations[name] = Quantizer(fmt, torch.tensor(9 / 255, dtype=torch.float64), torch.tensor(60), None)
    activations["pool"] = Quantizer(fmt, torch.tensor(0.05, dtype=torch.float64), torch.tensor(7), None)
    lowered = get_target("onnxruntime").lower(
        nets.tapped(module, taps), (x,), tmp_path / "m.onnx", taps=taps, activations=activations, weights=weights
    )
    assert set(lowered.adjusted) == {"relu6", "relu", "relu_1", "pool"}
    assert check(lowered.path, dict.fromkeys((*weights, *taps), "int8")) == []
    simulated = nets.Simulation(module, lowered.activations, weights)
    assert boundaries(simulated, lowered.path, Target("onnxruntime"), [(x,)], 2e-2)["view_runtime"]["passes"]


class Excited(nn.Module):
    """Squeeze-excite (keepdim mean), adaptive pooling and a strided, dilated convolution without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, stride=2, dilation=2, padding=2, bias=False)
        self.reduce, self.expand = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.average, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(self.average(x * gate).flatten(1))


def test_squeeze_excite_is_all_integer(tmp_path: Path) -> None:
    module, taps = nets.randomize(Excited(), 0), ("relu", "mean", "relu_1", "expand", "sigmoid", "mul", "flatten")
    x = torch.randn(8, 4, 15, 15, generator=torch.Generator().manual_seed(1))
    activations, weights = nets.calibrated(module, x, taps)
    lowered = get_target("onnxruntime").lower(
        nets.tapped(module, taps), (x,), tmp_path / "m.onnx", taps=taps, activations=activations, weights=weights
    )
    assert check(lowered.path, dict.fromkeys((*weights, *taps), "int8")) == []
    found = counts(get_target("onnxruntime").inspect(lowered.path))
    assert found["QLinearConv"] == 3 and found["QLinearMul"] == 1 and found["QLinearGlobalAveragePool"] == 2
    assert boundaries(nets.Simulation(module, lowered.activations, weights), lowered.path, Target("onnxruntime"), [(x,)], 2e-2)[
        "view_runtime"
    ]["passes"]
