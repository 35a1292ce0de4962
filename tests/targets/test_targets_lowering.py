"""Float files: the same numbers as torch, our names, a free batch, and the model's own call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import target_nets as nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.errors import TargetError
from shohin.targets import Target, get_target
from shohin.targets.onnxruntime.inspect import check, counts
from shohin.targets.onnxruntime.session import Runner
from shohin.targets.parity import boundaries, parity

torch.set_num_threads(1)
CASES = {
    "2d": (lambda: nets.Residual2d(), (3, 16, 16)),
    "2d-norm": (lambda: nets.Residual2d(norm=True), (3, 16, 16)),
    "1d": (lambda: nets.Residual1d(), (6, 32)),
    "transformer": (lambda: nets.Transformer(), (8, 32)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("captured", [False, True], ids=["module", "exported"])
def test_float_file_equals_torch(case: str, captured: bool, tmp_path: Path) -> None:
    make, shape = CASES[case]
    module = nets.randomize(make(), 3)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(1, *shape, generator=generator)
    given: nn.Module = module
    if captured:  # what the pipeline hands over: a graph module of aten operators
        batch = ({0: torch.export.Dim.AUTO},)
        given = torch.export.export(module, (example.repeat(2, *[1] * len(shape)),), dynamic_shapes=batch).module()
    lowered = get_target("onnxruntime").lower(given, (example,), tmp_path / "m.onnx")
    inputs = [(torch.randn(size, *shape, generator=generator),) for size in (1, 2, 5)]
    for found in boundaries(module, lowered.path, Target("onnxruntime"), inputs, 1e-5).values():
        assert found["passes"], found
        assert found["argmax_agree"] == found["argmax_total"] == 8
    weights = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))}
    assert set(lowered.layers) == weights
    assert check(lowered.path, dict.fromkeys(weights, "float32")) == []
    assert len(check(lowered.path, dict.fromkeys(weights, "int8"))) == len(weights)
    assert lowered.size_bytes == lowered.path.stat().st_size and not lowered.path.with_suffix(".onnx.data").exists()


def test_file_holds_no_paths_and_no_batch_norm(tmp_path: Path) -> None:
    module = nets.randomize(nets.Residual2d(norm=True), 0)
    lowered = get_target("onnxruntime").lower(module, (torch.randn(1, 3, 16, 16),), tmp_path / "m.onnx")
    data = lowered.path.read_bytes()
    assert b".py" not in data
    operators = [node.op_type for node in onnx.load_from_string(data).graph.node]
    assert "BatchNormalization" not in operators and "ReduceMean" not in operators and "GlobalAveragePool" in operators
    assert lowered.size_bytes < 1.25 * sum(p.numel() * 4 for p in module.parameters())


class Twins(nn.Module):
    """Two layers of equal weights (an optimizer that merges initializers loses one), and two that are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            self.b.weight.copy_(self.a.weight)
            self.b.bias.copy_(self.a.bias)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


def test_equal_weights_stay_apart_and_tied_weights_are_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Twins().eval()
    example = torch.randn(4, 8)
    names = [f"{n}.weight" for n in "abcd"]
    plain = get_target("onnxruntime").lower(module, (example,), tmp_path / "m.onnx")
    assert {"a.weight", "b.weight", "c.weight"} <= set(plain.layers)
    taps = ("relu", "relu_1", "relu_2")
    activations, weights = nets.calibrated(module, example, taps)
    assert set(weights) == set(names)
    lowered = get_target("onnxruntime").lower(
        nets.tapped(module, taps), (example,), tmp_path / "q.onnx", taps=taps, activations=activations, weights=weights
    )
    found = counts(get_target("onnxruntime").inspect(lowered.path))
    assert found["QGemm"] == 4 and "Gemm" not in found
    simulated = nets.Simulation(module, lowered.activations, weights)
    assert parity(simulated, Runner(lowered.path), [(example,)], 2e-2)["passes"]


class Structured(nn.Module):
    """Several outputs in a dict, one of them twice and one an input; a keyword argument and one that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor, unused: Tensor | None = None) -> dict[str, Any]:
        y = self.layer(x) * scale
        return {"logits": y, "again": (y, [x]), "size": 3, "twice": y * 2}


def test_runner_has_the_models_call_and_structure(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Structured().eval()
    x, scale = torch.randn(2, 4), torch.rand(2, 1)
    path = tmp_path / "m.onnx"
    get_target("onnxruntime").lower(module, (x,), path, kwargs={"scale": scale})
    run = Runner(path)
    x, scale = torch.randn(5, 4), torch.rand(5, 1)
    for found in (run(x, scale), run(x, scale=scale), run(scale=scale, x=x)):
        wanted = module(x, scale)
        assert set(found) == set(wanted) and found["size"] == 3
        torch.testing.assert_close(found["logits"], wanted["logits"])
        torch.testing.assert_close(found["again"][0], wanted["logits"])
        assert torch.equal(found["again"][1][0], x)
        torch.testing.assert_close(found["twice"], wanted["twice"])
    with pytest.raises(TargetError, match="scale is missing"):
        run(x)
    with pytest.raises(TargetError, match="unused cannot be given"):
        run(x, scale, torch.zeros(1))
    with pytest.raises(TargetError, match=r"shapes \{'x': \[5, 3\]"):
        run(x[:, :3], scale)


class Aliased(nn.Module):
    """Taps that are an input, an output, each other, or equal computations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(self.layer(x))
        z = y * 3.0
        return z, x, y, z, y, y.exp(), y.exp(), y.contiguous()


def test_taps_that_are_other_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Aliased().eval()
    taps = ("m/input", "m/relu.0", "m/out", "m/relu.again", "m/exp.0", "m/exp.1", "m/contiguous")
    x = torch.randn(3, 4)
    lowered = get_target("onnxruntime").lower(
        module, (x,), tmp_path / "m.onnx", taps=taps, activations={"m/relu.again": nets.act_quantizer(x)}
    )
    graph = onnx.load(str(lowered.path)).graph
    assert [o.name for o in graph.output] == ["output"]
    assert lowered.aliases["m/input"] == "x" and lowered.aliases["m/out"] == "output"
    assert lowered.aliases["m/relu.again"] == "m/relu.0" == lowered.aliases["m/contiguous"]
    assert "m/relu.again" in lowered.activations and any("m/relu.0_quantized" in node.output for node in graph.node)
    quantizer = lowered.activations["m/relu.again"]
    torch.testing.assert_close(Runner(lowered.path)(x), quantizer.fake(F.relu(module.layer(x))) * 3.0)


def test_reports_what_cannot_be_lowered(tmp_path: Path) -> None:
    target, x = get_target("onnxruntime"), torch.randn(2, 8)
    module = Twins().eval()
    quantizer = nets.act_quantizer(x)
    with pytest.raises(TargetError, match="no tap or input is named 'rely'"):
        target.lower(nets.tapped(module, ("relu",)), (x,), tmp_path / "m.onnx", taps=("relu",), activations={"rely": quantizer})
    with pytest.raises(TargetError, match=r"no parameter 'a.wait'.*did you mean 'a.weight'"):
        target.lower(module, (x,), tmp_path / "m.onnx", weights={"a.wait": quantizer})
    with pytest.raises(TargetError, match="needs one scale"):
        target.lower(module, (x,), tmp_path / "m.onnx", activations={"x": nets.weight_quantizer(x)})
    with pytest.raises(TargetError, match=r"3 scales for 8 channels"):
        target.lower(module, (x,), tmp_path / "m.onnx", weights={"a.weight": nets.weight_quantizer(module.a.weight[:3])})
    with pytest.raises(TargetError, match="the example does not fit"):
        target.lower(module, (x, x), tmp_path / "m.onnx")
    with pytest.raises(TargetError, match="must return a tuple"):
        target.lower(module, (x,), tmp_path / "m.onnx", taps=("t",))

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TargetError, match="cannot be exported"):
        target.lower(Branch().eval(), (x,), tmp_path / "m.onnx")

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row * 2 for row in x])

    with pytest.raises(TargetError, match="fixes its batch: input 'x' must have 2"):
        target.lower(Fixed().eval(), (x[:1],), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(TargetError, match="cannot load"):
        Runner(tmp_path / "bad.onnx")
    with pytest.raises(TargetError, match="there is no file"):
        Runner(tmp_path / "none.onnx")


def test_parity_sees_differences() -> None:
    x = [(torch.randn(4, 5),)]
    same = parity(lambda a: a, lambda a: a, x, 0.0)
    assert same["passes"] and same["max_abs"] == 0 and same["snr_db"] is None and same["argmax_agree"] == 4
    off = parity(lambda a: a, lambda a: a * 1.01, x, 1e-3)
    assert not off["passes"] and off["max_rel"] == pytest.approx(0.01, rel=1e-3) and off["snr_db"] == pytest.approx(40, abs=0.1)
    assert parity(lambda a: a, lambda a: a * 1.01, x, 0.02)["passes"]
    assert not parity(lambda a: a, lambda a: a * float("nan"), x, 1.0)["passes"]
    json.dumps([same, off])
    with pytest.raises(TargetError, match="differ in shape"):
        parity(lambda a: a, lambda a: a[:2], x, 1.0)


def test_conv_bias_is_kept_when_it_exceeds_its_scale(tmp_path: Path) -> None:
    """A channel with almost no weight and a large bias: its int32 bias must not overflow."""
    layer = nn.Conv1d(4, 4, 1)
    with torch.no_grad():
        layer.weight[1] = 1e-12
        layer.bias.copy_(torch.tensor([0.5, 3.0, -0.25, 0.0]))
    module = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.rand(2, 4, 9)
    taps = ("_1",)
    activations, weights = nets.calibrated(module, x, taps)
    activations = {"input_1" if k == "x" else k: v for k, v in activations.items()}

    lowered = get_target("onnxruntime").lower(
        nets.tapped(nn.Sequential(module, nn.Flatten(), nn.Identity()).eval(), ("_0_1",)), (x,), tmp_path / "m.onnx",
        taps=("t",), activations={"input": activations["input_1"], "t": activations["_1"]}, weights={f"0.{k}": v for k, v in weights.items()},
    )  # fmt: skip
    assert check(lowered.path, {"0.0.weight": "int8"}) == []
    got = Runner(lowered.path)(x).reshape(2, 4, 9)
    assert np.allclose(got.numpy(), module(x).detach().numpy(), atol=3 * float(activations["_1"].scale))
