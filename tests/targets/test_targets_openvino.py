"""OpenVINO: files equal their views and the other runtime, integer kernels are used, weights of few bits stay few bits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from target_nets import Residual1d, Residual2d, Transformer, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.errors import TargetError
from shohin.pipeline.ship import lower_program, lower_quantized
from shohin.program import capture
from shohin.quantization import Quantized, quantizable, quantize_program
from shohin.targets import Target, cpu, get_target
from shohin.targets.onnxruntime.session import Runner

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra openvino")


class Shortcuts(nn.Module):
    """Sums of two convolutions, of one that another operation reads too, of one behind its own ReLU, and a strided padding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 1)
        self.c, self.d, self.e = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x) + self.b(x))
        y = self.c(x)
        x = F.relu(x + y) + F.relu(self.d(y))
        return self.head(F.avg_pool2d(F.relu(self.e(x)), 6).flatten(1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: Residual2d(), (3, 12, 12)),
    "2d norm": (lambda: Residual2d(norm=True), (3, 12, 12)),
    "1d": (lambda: Residual1d(), (6, 32)),
    "shortcuts": (lambda: Shortcuts(), (3, 12, 12)),
    "transformer": (lambda: Transformer(), (8, 32)),
}


def quantized(name: str, target: Target, seed: int = 0) -> tuple[Quantized, Tensor]:
    make, shape = NETS[name]
    generator = torch.Generator().manual_seed(seed + 1)
    data = shohin.Data([torch.randn(32, *shape, generator=generator) for _ in range(2)])
    program = capture(randomize(make(), seed), data.example())
    calls = list(data.calls("train"))
    return quantize_program(program, set(quantizable(program)), calls, least_scale=target.least_scale()), calls[1].args[0]


def snr(reference: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum().clamp_min(1e-30)))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETS)
def test_the_view_is_what_openvino_computes(name: str, seed: int, tmp_path: Path) -> None:
    target = get_target("openvino")
    made, x = quantized(name, target, seed)
    view, used, _ = lower_quantized(target, made, tmp_path / "m.onnx", (x,), {})
    with torch.no_grad():
        found = view(x)
    assert used and snr(target.runner(tmp_path / "m.onnx")(x), found) > 45
    assert target.check(tmp_path / "m.onnx", dict.fromkeys(made.sites.layers.values(), "int8")) == []


@pytest.mark.parametrize("name", NETS)
def test_codes_agree_between_runtimes_and_the_file_s_own_meaning(name: str, tmp_path: Path) -> None:
    """At every grid: at most one step on 99.9 % of the codes, and never more than two."""
    target = get_target("openvino")
    made, x = quantized(name, target)
    lower_quantized(target, made, tmp_path / "m.onnx", (x,), {})
    names = [n.output[0] for n in onnx.load(str(tmp_path / "m.onnx")).graph.node if n.op_type == "QuantizeLinear"]
    assert len(names) > 4
    for number, tensor in enumerate(names):
        model = onnx.load(str(tmp_path / "m.onnx"))
        del model.graph.output[:]
        model.graph.output.append(onnx.ValueInfoProto(name=tensor))
        del model.metadata_props[:]
        path = tmp_path / f"{number}.onnx"
        onnx.save(model, str(path))
        wanted = Runner(path, level="none")(x).int()
        for run in (Runner(path), target.runner(path)):
            apart = (run(x).int() - wanted).abs()
            assert int(apart.max()) <= 2 and float((apart > 1).float().mean()) <= 1e-3, (tensor, run)


def test_a_grid_between_a_convolution_and_its_sum_is_named(tmp_path: Path) -> None:
    """The file that was placed for ONNX Runtime runs, but not exactly: the check says where, and the rules of OpenVINO avoid it."""
    target = get_target("openvino")
    made, x = quantized("2d", target)
    lower_quantized(get_target("onnxruntime"), made, tmp_path / "other.onnx", (x,), {})
    assert any("does not round here" in text for text in target.check(tmp_path / "other.onnx", {}))
    _, _, notes = lower_quantized(target, made, tmp_path / "m.onnx", (x,), {})
    assert any("adds inside the convolution" in text for text in notes) and target.check(tmp_path / "m.onnx", {}) == []


ANSWER = """
import sys
import numpy as np
from shohin.targets import timing
np.save(sys.argv[3], np.concatenate([timing.compiled(path, 1)(np.load(sys.argv[1]))[0] for path in sys.argv[4:]]), allow_pickle=False)
"""


@pytest.mark.skipif("avx2" not in cpu.flags(), reason="needs AVX2")
@pytest.mark.parametrize("channels", [3, 16])
def test_a_file_gives_the_same_answers_on_a_cpu_without_vnni(channels: int, tmp_path: Path) -> None:
    """The kernels for AVX2, asked for by oneDNN's own switch: at our scales they give the same; at full 8 bits they saturate."""
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4)
    ).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):  # neighbours of one sign and size
            layer.weight.copy_(torch.rand_like(layer.weight) * 0.2 + 0.9)
            layer.bias.fill_(-float(layer.weight[0].sum()) / 3)
    x = torch.rand(16, channels, 8, 8)
    program, calls = capture(model, (x,)), list(shohin.Data(train=[x]).calls("train"))
    target, files = get_target("openvino"), []
    for name, rule in (("safe", target.least_scale()), ("full", None)):
        made = quantize_program(program, set(quantizable(program)), calls, least_scale=rule)
        lower_quantized(target, made, tmp_path / f"{name}.onnx", (x,), {})
        files.append(str(tmp_path / f"{name}.onnx"))
    np.save(tmp_path / "x.npy", x.numpy())
    found = {}
    for isa in ("AVX2", "ALL"):
        command = [sys.executable, "-c", ANSWER, str(tmp_path / "x.npy"), "-", str(tmp_path / f"{isa}.npy"), *files]
        subprocess.run(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa}, check=True, capture_output=True)
        found[isa] = np.split(np.load(tmp_path / f"{isa}.npy"), 2)
    assert np.array_equal(found["AVX2"][0], found["ALL"][0])
    assert np.abs(found["AVX2"][1] - found["ALL"][1]).max() > 0.01 or cpu.saturates_u8s8(cpu.flags())


def test_float_files_and_the_check_of_them(tmp_path: Path) -> None:
    target, other = get_target("openvino"), get_target("onnxruntime")
    program = capture(randomize(Residual2d(norm=True), 0), (torch.randn(4, 3, 12, 12),))
    x = torch.randn(3, 3, 12, 12)
    view, _ = lower_program(target, program, tmp_path / "m.onnx", (x,), {})
    torch.testing.assert_close(target.runner(tmp_path / "m.onnx")(x), view(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.runner(tmp_path / "m.onnx")(x), view(x), rtol=1e-4, atol=1e-5)
    (text,) = target.check(tmp_path / "m.onnx", {"stem.weight": "int8", "head.weight": "float32"})
    assert text.startswith("stem.weight: should be int8, but the runtime executes Convolution (float)")
    with pytest.raises(TargetError, match=r"knows no layer.*did you mean 'stem.weight'"):
        target.check(tmp_path / "m.onnx", {"stem.weigth": "int8"})


@pytest.mark.parametrize("text", ["weights uint4 group 32", "weights int4 group 16", "weights uint8 group 32", "weights int2 group 32"])
def test_weights_of_few_bits_stay_so_in_the_kernel(text: str, tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 8)), 0)
    data = shohin.Data(train=[torch.randn(16, 64) for _ in range(2)])
    found = shohin.quantize(model, data, text, target="openvino", rounding="nearest")
    made = shohin.export(found, data, target="openvino", path=tmp_path / "m.onnx")
    assert made.notes["parity"]["departs"] == [] and made.notes["parity"]["boundaries"]["view_runtime"]["max_rel"] < 1e-5
    assert sum("few bits" in row.op for row in get_target("openvino").inspect(tmp_path / "m.onnx")) == 2


def test_a_file_is_verified_in_the_runtime_it_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = randomize(Residual1d(), 0), shohin.Data(train=[torch.randn(16, 6, 32) for _ in range(2)])
    found = shohin.export(shohin.quantize(model, data, "int8", "openvino"), data, "openvino", tmp_path / "m.onnx")
    assert found.metrics.latency_ms is not None and found.metrics.latency_ms.conditions["runtime"].startswith("openvino 20")
    assert shohin.verify(tmp_path / "m.onnx")["passes"]
    from shohin.targets.openvino import target as room

    monkeypatch.setattr(room.OpenVINOTarget, "runner", lambda self, path: lambda x: torch.zeros(len(x), 7))
    assert not shohin.verify(tmp_path / "m.onnx")["passes"]


def test_times_and_memory_in_fresh_processes(tmp_path: Path) -> None:
    target = get_target("openvino", batch=4)
    x = torch.randn(2, 64)
    files = {}
    for name, width in (("small", 64), ("large", 2048)):
        net = randomize(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 4)), 0)
        lower_program(target, capture(net, (x,)), tmp_path / f"{name}.onnx", (x,), {})
        files[name] = tmp_path / f"{name}.onnx"
    found = target.compare(files, (x,), processes=2, rounds=50)
    assert found["small"].ratio == 1.0 and found["large"].ratio > 1.5
    assert found["large"].timing.conditions["batch"] == 4
    assert 2e5 < target.memory(files["large"], (x,)).value < 2e8


def test_what_cannot_be_loaded_or_given_is_said(tmp_path: Path) -> None:
    target = get_target("openvino")
    with pytest.raises(TargetError, match="there is no file"):
        target.runner(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(TargetError, match="OpenVINO cannot load"):
        target.runner(tmp_path / "bad.onnx")
    x = torch.randn(2, 6, 32)
    lower_program(target, capture(randomize(Residual1d(), 0), (x,)), tmp_path / "m.onnx", (x,), {})
    with pytest.raises(TargetError, match="x is missing"):
        target.runner(tmp_path / "m.onnx")()
    with pytest.raises(TargetError, match=r"cannot run on inputs of shapes .*\[2, 5, 32\]"):
        target.runner(tmp_path / "m.onnx")(torch.randn(2, 5, 32))
    assert np.isfinite(target.runner(tmp_path / "m.onnx")(x).numpy()).all()


def test_grids_are_fused_into_what_comes_before_them(tmp_path: Path) -> None:
    """On sequences, too: a reshape between a linear layer's activation and its grid would keep the two apart."""
    generator = torch.Generator().manual_seed(0)
    data = shohin.Data(train=[torch.randn(8, 6, 32, generator=generator) for _ in range(4)])
    found = shohin.quantize(randomize(Transformer(), 0), data, "int8", "openvino")
    made = shohin.export(found, data, "openvino", tmp_path / "m.onnx")
    assert made.notes["parity"]["departs"] == []
    rows = get_target("openvino").inspect(tmp_path / "m.onnx")
    assert sum(row.op == "FullyConnected" and row.integer for row in rows) == len(found.plan.formats)
    assert [row.name for row in rows if row.op == "FakeQuantize"] == []
