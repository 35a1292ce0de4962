"""Layers that round their input in the range that it has itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.errors import PlanError
from shohin.formats import FORMATS, Bits, is_bits, is_dynamic
from shohin.quantization import Dynamic

torch.set_num_threads(1)


class Reader(nn.Module):
    """Two layers that read one tensor, one behind a convolution, one tied to another, one without a bias; sequences and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 16, 3, padding=1)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 5)
        self.k.weight = self.q.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x)).transpose(1, 2)
        scores = torch.softmax(self.q(h) @ self.k(h * 0.5).transpose(1, 2) / 4, -1)
        h = self.norm(h + scores @ self.v(h))
        h = h + self.b(nn.functional.gelu(self.a(h)))
        out: Tensor = self.head(h.mean(1))
        return out


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval()


@pytest.fixture
def data() -> shohin.Data:
    torch.manual_seed(1)
    return shohin.Data(train=[torch.randn(6, 8, 12) for _ in range(4)])


def snr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum().clamp_min(1e-30)))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0, 30.0])
def test_codes_are_those_of_the_operator(bits: int, shift: float) -> None:
    """The operator's own definition, in NumPy."""
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) + np.float32(shift)
    most = 2**bits - 1
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = (high - low) / np.float32(most)
    zero = np.rint(np.clip(-low / scale, 0, most))
    wanted = (np.clip(np.rint(x / scale) + zero, 0, most) - zero) * scale
    found = Dynamic(FORMATS[f"uint{bits}"])(torch.from_numpy(x))
    assert np.allclose(found.numpy(), wanted, atol=1e-6 * float(np.abs(x).max()))
    assert np.abs(found.numpy() - x).max() <= float(scale) * 0.5001 + 1e-6


def test_nothing_and_zeros_are_exact_and_gradients_pass() -> None:
    rounding = Dynamic(FORMATS["uint8"])
    assert rounding(torch.zeros(0, 3)).shape == (0, 3) and not bool(rounding(torch.zeros(4)).any())
    x = torch.randn(5, requires_grad=True)
    rounding(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and bool((x.grad == 1).all())


def test_texts_round_trip() -> None:
    for text in ("int8 dynamic", "w4a8 dynamic", "w4a4 dynamic", "int8", "w4a8"):
        assert str(Bits.parse(text)) == text and is_bits(text) and is_dynamic(text) == text.endswith("dynamic")
    assert not is_bits("dynamic") and not is_bits("float32 dynamic") and str(Bits.parse("w8a8 dynamic")) == "int8 dynamic"


@pytest.mark.parametrize("form", ["int8 dynamic", "w4a8 dynamic"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_view_is_the_file(model: nn.Module, data: shohin.Data, form: str, calibrated: bool, tmp_path: Path) -> None:
    given = data if calibrated else shohin.Data(example=(torch.randn(6, 8, 12),))
    found = shohin.quantize(model, given, form)
    linear = {"q/linear.0", "k/linear.0", "v/linear.0", "a/linear.0", "b/linear.0", "head/linear.0"}
    assert set(found.plan.formats) == linear and set(found.plan.formats.values()) == {form}
    assert "convolutions" in found.notes["float"]["stem/conv1d.0"]
    shipped = shohin.export(found, given, "onnxruntime", tmp_path / "m.onnx")
    assert shipped.artifact is not None and shipped.view is not None and found.view is not None
    assert shipped.notes["parity"]["departs"] == [] and shipped.notes["parity"]["boundaries"]["view_runtime"]["max_rel"] < 1e-2
    graph = onnx.load(str(shipped.artifact)).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == 6 and kinds.count("DynamicQuantizeLinear") == 5  # q and v read one tensor
    assert sum(i.name.endswith("_codes") for i in graph.initializer) == 5  # q and k share a weight
    runner = shohin.targets.get_target("onnxruntime").runner(shipped.artifact)
    with torch.no_grad():
        for size in (1, 2, 9):
            x = torch.randn(size, 8, 12)
            assert snr(found.view(x), runner(x)) > 40 and snr(model(x), runner(x)) > (25 if form == "int8 dynamic" else 8)
    assert shohin.verify(shipped.artifact)["passes"]


def test_beside_other_formats(model: nn.Module, data: shohin.Data, tmp_path: Path) -> None:
    forms = {"*": "int8", "a*": "int8 dynamic", "b*": "weights uint4 group 16", "v*": "float32"}
    found = shohin.quantize(model, data, forms)
    assert found.plan.formats["a/linear.0"] == "int8 dynamic" and found.plan.formats["stem/conv1d.0"] == "int8"
    shipped = shohin.export(found, data, "onnxruntime", tmp_path / "m.onnx")
    assert shipped.notes["parity"]["departs"] == [] and shipped.artifact is not None
    runner = shohin.targets.get_target("onnxruntime").runner(shipped.artifact)
    with torch.no_grad():
        assert found.view is not None
        x = torch.randn(5, 8, 12)
        assert snr(found.view(x), runner(x)) > 35


def test_each_input_has_the_range_of_its_own_values(model: nn.Module) -> None:
    """What a grid from data would clip comes through."""
    small = shohin.Data(train=[torch.randn(6, 8, 12) * 0.01 for _ in range(4)])
    static, moving = (shohin.quantize(model, small, {"v*": form}).view for form in ("int8", "int8 dynamic"))
    assert static is not None and moving is not None
    x = torch.randn(6, 8, 12) * 3
    with torch.no_grad():
        assert snr(model(x), moving(x)) > snr(model(x), static(x)) + 10


def test_a_bound_on_accuracy_and_a_budget(model: nn.Module, data: shohin.Data) -> None:
    x = torch.cat(list(data.train))  # type: ignore[arg-type]
    with torch.no_grad():
        labels = model(x).argmax(1)
    pairs = [(x[i : i + 6], labels[i : i + 6]) for i in range(0, 24, 6)]
    labelled = shohin.Data(train=pairs, validation=pairs)
    kept = shohin.quantize(model, labelled, "w2a2 dynamic", None, drop=0.3)
    assert 0 < len(kept.notes["returned"]) <= 6 and kept.notes["quality"]["kept"] >= 0.7
    planned = shohin.quantize(model, data, ("int8", "int8 dynamic", "weights uint4 group 16"), budget="size <= 75 %")
    assert set(planned.plan.formats.values()) <= {"int8", "int8 dynamic", "weights uint4 group 16"}


def test_refusals_name_what_there_is(model: nn.Module, data: shohin.Data) -> None:
    with pytest.raises(PlanError, match="ask for 'int8', or for the target 'onnxruntime'"):
        shohin.quantize(model, data, "int8 dynamic", "openvino")
    with pytest.raises(PlanError, match="only linear layers round their input"):
        shohin.quantize(model, data, {"stem*": "int8 dynamic"})
    with pytest.raises(PlanError, match="read activations of 8 bits"):
        shohin.quantize(model, data, "w4a4 dynamic")
    with pytest.raises(PlanError, match="no ranges that could be trained: ask for 'int8'"):
        shohin.quantize(model, data, "int8 dynamic", recover="qat")
    with pytest.raises(PlanError, match="share the weight 'q\\.weight'"):
        shohin.quantize(model, data, {"*": "int8", "q*": "int8 dynamic"})
    assert shohin.quantize(model, data, "w4a4 dynamic", None).view is not None
