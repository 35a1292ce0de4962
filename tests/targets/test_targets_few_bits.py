"""Weights of few bits in ONNX Runtime: the runtime's own kernel, the view's numbers, and what it has no kernel for."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
import torch
from target_nets import Residual2d, Transformer, randomize
from torch import Tensor, nn

import shohin
from shohin.errors import PlanError, TargetError
from shohin.targets import get_target


class Odd(nn.Module):
    """Inputs that fill no group, a product on three dimensions without bias, one on two with, and a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(40, 24, bias=False), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(torch.relu(self.first(x))))
        return self.last(torch.relu(self.shared(x)).mean(1))


def data_of(shape: tuple[int, ...], count: int = 3) -> shohin.Data:
    generator = torch.Generator().manual_seed(0)
    return shohin.Data(train=[torch.randn(8, *shape, generator=generator) for _ in range(count)])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["int", "uint"])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_the_kernel_computes_what_the_view_does(bits: int, kind: str, group: int, tmp_path: Path) -> None:
    model, data = randomize(Odd(), bits), data_of((5, 40))
    text = f"weights {kind}{bits} group {group}"
    found = shohin.quantize(model, data, text, rounding="nearest")
    assert found.view is not None and set(found.plan.formats.values()) == {text} and len(found.plan.formats) == 4
    made = shohin.export(found, data, path=tmp_path / "m.onnx")
    assert made.notes["parity"]["departs"] == []
    kernels = [row for row in get_target("onnxruntime").inspect(tmp_path / "m.onnx") if row.op == "MatMulNBits"]
    assert len(kernels) == 4
    x = data_of((5, 40)).example().args[0]
    got = get_target("onnxruntime").runner(tmp_path / "m.onnx")(x)
    torch.testing.assert_close(got, found.view(x), rtol=1e-4, atol=1e-5)
    assert shohin.verify(tmp_path / "m.onnx")["passes"]
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    held = sum(len(i.raw_data) for i in graph.initializer if i.name.endswith(("_codes", "_scale", "_zero_point")))
    sizes = {"first": (24, 40), "shared": (24, 24), "last": (3, 24)}
    codes = sum(math.ceil(i / group) * group * bits // 8 * o for o, i in sizes.values())
    scales = sum(math.ceil(i / group) * o for o, i in sizes.values())
    zeros = 0 if kind == "int" else sum(math.ceil(math.ceil(i / group) * bits / 8) * o for o, i in sizes.values())
    assert held == codes + 4 * scales + zeros


@pytest.mark.parametrize("rounding", ["nearest", "hqq", "gptq", "adaround", "descent", "blocks"])
def test_a_transformer_keeps_its_answers(rounding: str, tmp_path: Path) -> None:
    model, data = randomize(Transformer(), 0), data_of((6, 32), 8)
    found = shohin.quantize(model, data, "weights uint4 group 16", rounding=rounding)
    made = shohin.export(found, data, path=tmp_path / "m.onnx")
    assert made.artifact is not None and made.notes["parity"]["boundaries"]["view_runtime"]["max_rel"] < 1e-4
    x = data.example().args[0]
    wanted = model(x)
    assert float((get_target("onnxruntime").runner(made.artifact)(x) - wanted).norm() / wanted.norm()) < 0.2


class Uneven(nn.Module):
    """Two layers and a third in integers read one activation, of which some channels are far larger."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.c, self.last = nn.LayerNorm(64), *(nn.Linear(64, 32) for _ in range(3)), nn.Linear(32, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(64) ** 3 * 5 + 0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        out: Tensor = self.last(torch.tanh(self.a(h) * self.b(h)) + self.c(h))
        return out


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("third", ["weights uint4 group 16", "int8", "weights uint2 group 32"])
def test_inputs_are_divided_once_and_weights_take_the_factor(third: str, target: str, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, data = Uneven().eval(), data_of((6, 64), 16)
    forms = {"*": "weights uint4 group 16", "c*": third}
    found, plain = (shohin.quantize(model, data, forms, target, smoothing=smoothing) for smoothing in (True, False))
    assert {"a.weight", "b.weight"} <= set(found.notes["scaled"]) and not plain.notes["scaled"]
    grids = [found.evidence[name] for name in ("a.weight", "b.weight")]
    assert grids[0].columns is not None and grids[1].columns is not None and torch.equal(grids[0].columns, grids[1].columns)
    x = torch.cat(list(data.train))  # type: ignore[arg-type]
    assert found.view is not None
    made = shohin.export(found, data, target, tmp_path / "m.onnx")
    assert made.notes["parity"]["departs"] == [] and made.artifact is not None
    graph = onnx.load(str(made.artifact)).graph
    inputs = {node.name: node.input[0] for node in graph.node if node.op_type == "MatMulNBits"}
    assert inputs["a.weight"] == inputs["b.weight"] and ".scaled" in inputs["a.weight"]
    assert (inputs.get("c.weight") == inputs["a.weight"]) == (third == "weights uint4 group 16")
    torch.testing.assert_close(get_target(target).runner(made.artifact)(x), found.view(x), rtol=2e-2, atol=2e-2)


def test_convolutions_stay_float_and_are_named_or_become_int8(tmp_path: Path) -> None:
    model, data = randomize(Residual2d(norm=True), 0), data_of((3, 12, 12))
    found = shohin.quantize(model, data, "weights int4 group 32")
    assert set(found.plan.formats) == {"head/linear.0"} and len(found.notes["float"]) == 4
    assert all("no convolution with weights of few bits" in why and "int8" in why for why in found.notes["float"].values())
    both = shohin.quantize(model, data, {"*": "int8", "head*": "weights int4 group 32"})
    assert sorted(both.plan.formats.values()) == ["int8"] * 4 + ["weights int4 group 32"]
    made = shohin.export(both, data, path=tmp_path / "both.onnx")
    ops = [row.op for row in get_target("onnxruntime").inspect(tmp_path / "both.onnx")]
    assert ops.count("QLinearConv") == 4 and ops.count("MatMulNBits") == 1 and made.notes["parity"]["departs"] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weights int3 group 32", "no kernel for 'weights int3 group 32'; it has linear layers"),
        ("weights int4 group 24", "groups of 16, 32, 64, 128 or 256"),
        ("weights int4", "no kernel for 'weights int4 channel'"),
        ({"stem*": "weights int4 group 32"}, r"no layer that 'stem\*' matches can be .*: stem/conv2d.0: the target 'onnxruntime'"),
        ({"body*": "weights int4 group 32"}, "matches none"),
        ("weights int4 group", "is no weight format"),
        ("int4", "format='int4' is not known"),
    ],
)
def test_what_no_kernel_can_run_is_refused(text: str | dict[str, str], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        shohin.quantize(randomize(Residual2d(), 0), data_of((3, 12, 12)), text)


def test_weights_alone_need_no_batches() -> None:
    model = randomize(Odd(), 1)
    found = shohin.quantize(model, shohin.Data(example=(torch.randn(2, 5, 40),)), "weights uint4 group 32")
    assert found.view is not None and not torch.equal(found.view(torch.ones(2, 5, 40)), model(torch.ones(2, 5, 40)))
    with pytest.raises(shohin.errors.DataError, match="rounding='gptq' needs calibration batches"):
        shohin.quantize(model, shohin.Data(example=(torch.randn(2, 5, 40),)), "weights uint4 group 32", rounding="gptq")
    with pytest.raises(PlanError, match="rounding='up' is not known; one of 'auto'"):
        shohin.quantize(model, data_of((5, 40)), "weights uint4 group 32", rounding="up")


def test_a_file_that_departs_is_told(tmp_path: Path) -> None:
    model, target = randomize(Odd(), 1), get_target("onnxruntime")
    target.lower(model, (torch.randn(2, 5, 40),), tmp_path / "m.onnx")
    said = target.check(tmp_path / "m.onnx", {"first.weight": "weights int4 group 32"})
    assert said == ["first.weight: should be weights int4 group 32, but the runtime executes MatMul"]
    with pytest.raises(TargetError, match="or a weight scheme; got 'int4'"):
        target.check(tmp_path / "m.onnx", {"first.weight": "int4"})


def test_a_weight_that_is_read_otherwise_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(x))

    model, ids = Tied().eval(), torch.arange(6).reshape(2, 3)
    with pytest.raises(PlanError, match="an operation that is no layer reads its weight too"):
        shohin.quantize(model, shohin.Data(example=(ids,)), "weights int4 group 32")


@pytest.mark.parametrize("other", ["int8", "float32", "weights int4 group 32"])
def test_layers_with_one_weight_have_one_format(other: str) -> None:
    with pytest.raises(PlanError, match=r"share the weight 'shared.weight'.*give both one format"):
        shohin.quantize(randomize(Odd(), 0), data_of((5, 40)), {"*": "weights uint4 group 32", "shared/linear.1": other})


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_types_are_refused_before_the_work(kind: torch.dtype) -> None:
    model = randomize(Odd(), 0).to(kind)
    data = shohin.Data(train=[torch.randn(8, 5, 40, dtype=kind)])
    with pytest.raises(PlanError, match=r"its weight is .*float.*quantize model.float\(\)"):
        shohin.quantize(model, data, "weights uint4 group 32", rounding="nearest")


@pytest.mark.parametrize("rounding", ["nearest", "hqq", "descent"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_with_nan_makes_no_model(rounding: str, bad: float) -> None:
    data = data_of((5, 40))
    next(iter(data.train or ()))[0, 0, 0] = bad
    with pytest.raises(shohin.errors.DataError, match="NaN or Inf"):
        shohin.quantize(randomize(Odd(), 0), data, "weights uint4 group 32", rounding=rounding)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": None}, "format is a text, or patterns"),
        ({"format": {}}, "format is a text, or patterns"),
        ({"format": {3: "int8"}}, "format is a text, or patterns"),
        ({"format": "weights uint4 group ²"}, "no weight format"),
        ({"ranges": None}, "ranges is a text, or patterns"),
        ({"ranges": {"*": 3}}, "3"),
        ({"samples": 0}, "samples must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"rounding": None}, "rounding=None is not known"),
    ],
)
def test_wrong_arguments_are_told(options: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        shohin.quantize(randomize(Odd(), 0), data_of((5, 40)), **options)  # type: ignore[arg-type]
