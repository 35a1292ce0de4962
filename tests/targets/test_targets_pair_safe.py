"""Pair-safe scales on the real runtime: exact where full 8 bits saturate."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from shohin.targets import cpu
from shohin.targets.onnx.pair_safe import is_depthwise, may_saturate, pair_safe_scale
from shohin.targets.onnxruntime.session import open_session

torch.set_num_threads(1)
#: weight shape, groups, input shape without batch
CASES = {
    "conv 3x3": ((24, 16, 3, 3), 1, (16, 9, 9)),
    "conv 3x3, odd channels": ((24, 13, 3, 3), 1, (13, 9, 9)),
    "conv 1x1": ((32, 24, 1, 1), 1, (24, 6, 6)),
    "conv 1-d": ((16, 12, 5), 1, (12, 40)),
    "grouped": ((24, 8, 3, 3), 3, (24, 9, 9)),
    "grouped, odd": ((20, 5, 3, 3), 2, (10, 9, 9)),
    "depthwise": ((16, 1, 3, 3), 16, (16, 9, 9)),
    "linear": ((20, 96), 0, (96,)),
    "linear, odd": ((20, 33), 0, (33,)),
}
ZERO, OUT_ZERO = 3, 17


def codes_of(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.clamp(torch.round(weight.double() / scale.reshape(-1, *[1] * (weight.dim() - 1))), -127, 127).to(torch.int64)


def reference(x: Tensor, codes: Tensor, groups: int) -> Tensor:
    """Exact sums: float64 holds them all."""
    centred = x.double() - ZERO
    if groups == 0:
        return centred @ codes.double().T
    convolve = F.conv1d if codes.dim() == 3 else F.conv2d
    return convolve(centred, codes.double(), padding=codes.shape[-1] // 2, groups=groups)


def run(x: Tensor, codes: Tensor, groups: int, out_scale: float, folder: Path) -> tuple[Tensor, list[str]]:
    """QLinearConv, or QGemm with float output, by the operators that the lowering ends in."""
    weight = codes.numpy().astype(np.int8)
    constants = {
        "xs": np.float32(1.0),
        "xz": np.uint8(ZERO),
        "ws": np.ones(len(weight), np.float32),
        "wz": np.zeros(len(weight), np.int8),
        "w": weight,
    }
    constants |= {"ys": np.float32(out_scale), "yz": np.uint8(OUT_ZERO)}
    if groups:
        node = helper.make_node(
            "QLinearConv",
            ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"],
            ["y"],
            group=groups,
            pads=[weight.shape[-1] // 2] * 2 * (weight.ndim - 2),
        )
        kind = TensorProto.UINT8
    else:
        constants["w"] = np.ascontiguousarray(weight.T)
        node = helper.make_node("QGemm", ["x", "xs", "xz", "w", "ws", "wz"], ["y"], domain="com.microsoft")
        kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(x.shape))],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in node.input],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    onnx.save(model, str(folder / "m.onnx"))
    session = open_session(folder / "m.onnx")
    return torch.from_numpy(session.run(None, {"x": x.numpy().astype(np.uint8)})[0]), [n.op_type for n in graph.node]


def compare(case: str, scale: Tensor, weight: Tensor, folder: Path) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Inputs that drive pairs to their extremes, what exact sums give, and what the runtime gives."""
    _, groups, size = CASES[case]
    codes = codes_of(weight, scale)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (3, *size), generator=generator)
    x[1] = 255
    x[2] = torch.where(torch.rand(size, generator=generator) < 0.5, 255, 0)
    sums = reference(x, codes, groups)
    if not groups:
        return x, sums.numpy(), run(x, codes, groups, 1.0, folder)[0].numpy()
    out_scale = float(sums.abs().max() / 100)
    factor = np.float32(1.0) / np.float32(out_scale)
    wanted = np.clip(np.rint(sums.numpy().astype(np.float32) * factor) + OUT_ZERO, 0, 255)
    return x, wanted, run(x, codes, groups, out_scale, folder)[0].numpy()


def wrong(case: str, scale: Tensor, weight: Tensor, folder: Path) -> float:
    """Share of outputs of the runtime that differ from exact sums."""
    _, wanted, got = compare(case, scale, weight, folder)
    return float((got != wanted).mean())


def make_weight(case: str) -> Tensor:
    return torch.randn(CASES[case][0], generator=torch.Generator().manual_seed(11)) + 0.2


@pytest.mark.parametrize("case", CASES)
def test_runtime_is_exact_at_pair_safe_scales(case: str, tmp_path: Path) -> None:
    weight = make_weight(case)
    assert wrong(case, pair_safe_scale(weight, CASES[case][1]), weight, tmp_path) == 0.0


@pytest.mark.skipif(
    not cpu.saturates_u8s8(cpu.flags()), reason="this CPU has VNNI (or is no x86): its uint8 x int8 kernels do not saturate"
)
@pytest.mark.parametrize("case", [case for case in CASES if case != "depthwise"])
def test_runtime_saturates_at_full_8_bits(case: str, tmp_path: Path) -> None:
    weight = make_weight(case)
    plain = weight.double().flatten(1).abs().amax(1) / 127
    assert may_saturate(codes_of(weight, plain))
    assert wrong(case, plain, weight, tmp_path) > 0.01


@pytest.mark.skipif(cpu.saturates_u8s8(cpu.flags()), reason="this CPU's uint8 x int8 kernels saturate")
def test_runtime_is_exact_at_full_8_bits_with_vnni(tmp_path: Path) -> None:
    for case in CASES:
        weight = make_weight(case)
        assert wrong(case, weight.double().flatten(1).abs().amax(1) / 127, weight, tmp_path) == 0.0


EMULATED = """
import json, sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
out = {}
for name in sys.argv[2:]:
    held = np.load(f"{sys.argv[1]}/{name}.npz")
    session = onnxruntime.InferenceSession(f"{sys.argv[1]}/{name}.onnx", options, providers=["CPUExecutionProvider"])
    out[name] = float((session.run(None, {"x": held["x"]})[0] != held["wanted"]).mean())
print(json.dumps(out))
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None,
    reason="needs qemu-x86_64 (Debian: qemu-user) to emulate a CPU without VNNI",
)
def test_emulated_cpu_without_vnni(tmp_path: Path) -> None:
    """The real runtime on an emulated AVX2 processor: full 8 bits saturate, pair-safe codes are exact, grouped or not."""
    names = []
    for number, (case, (_, groups, _)) in enumerate(CASES.items()):
        weight = make_weight(case)
        for kind, scale in (("safe", pair_safe_scale(weight, groups)), ("full", weight.double().flatten(1).abs().amax(1) / 127)):
            name = f"{number}-{kind}"
            x, wanted, _ = compare(case, scale, weight, tmp_path)
            (tmp_path / "m.onnx").rename(tmp_path / f"{name}.onnx")
            np.savez(tmp_path / f"{name}.npz", x=x.numpy().astype(np.uint8), wanted=wanted)
            names.append(name)
    packages = str(Path(np.__file__).parents[1])
    command = ["qemu-x86_64", "-cpu", "Haswell", str(Path(sys.executable).resolve()), "-c", EMULATED, str(tmp_path), *names]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": packages}, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for number, case in enumerate(CASES):
        assert found[f"{number}-safe"] == 0.0, case
        assert (found[f"{number}-full"] > 0.01) == (case != "depthwise"), case


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 17), st.sampled_from([(), (3,), (3, 3), (1, 1)]), st.floats(-2, 2))
@settings(max_examples=60)
def test_scale_is_safe_and_no_larger_than_needed(seed: int, out: int, inner: int, kernel: tuple[int, ...], shift: float) -> None:
    weight = torch.randn((out, inner, *kernel), generator=torch.Generator().manual_seed(seed)) + shift
    scale = pair_safe_scale(weight)
    codes = codes_of(weight, scale)
    assert scale.shape == (out,) and bool((scale > 0).all())
    assert not may_saturate(codes)
    plain, seven = (weight.double().flatten(1).abs().amax(1) / high for high in (127, 63))
    assert bool((scale >= plain * (1 - 1e-12)).all()) and bool((scale <= seven * 1.0001).all())
    smaller = torch.maximum(plain, scale * 0.95)  # a scale that is 5 % finer is either the plain one or may saturate
    finer = codes_of(weight, smaller)
    assert torch.equal(smaller, plain) or may_saturate(finer)


def test_saturation_law_by_brute_force() -> None:
    """`may_saturate` against all extreme inputs of one pair."""
    for a in range(-127, 128, 6):
        for b in range(-127, 128, 7):
            extreme = max(abs(x * a + y * b) for x in (0, 255) for y in (0, 255))
            exceeds = any(not -32768 <= x * a + y * b <= 32767 for x in (0, 255) for y in (0, 255))
            assert may_saturate(torch.tensor([[a, b]])) == exceeds, (a, b, extreme)
    assert not may_saturate(torch.tensor([[127, 0, 127, 0]])) and may_saturate(torch.tensor([[0, 0, 127, 127]]))
    assert not may_saturate(torch.tensor([[127, 127]]), largest=128)
    assert (
        is_depthwise(torch.zeros(8, 1, 3, 3), 8) and not is_depthwise(torch.zeros(8, 1), 1) and not is_depthwise(torch.zeros(8, 2, 3, 3), 8)
    )
    single = torch.full((4, 1, 3, 3), 127)  # depthwise, or a convolution over one channel
    assert not may_saturate(single, 4) and may_saturate(single, 1)


def test_all_zero_channels_have_a_scale() -> None:
    scale = pair_safe_scale(torch.zeros(2, 4))
    assert bool((scale > 0).all()) and bool((scale.float() > 0).all())
