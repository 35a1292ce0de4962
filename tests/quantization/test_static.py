"""Static quantization: sites, grids, weights, corrected biases, and the view against the integer file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import target_nets as nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import Call, Data
from shohin.errors import DataError, PlanError
from shohin.formats import INT8, Bits, named_format
from shohin.pipeline.ship import lower_quantized
from shohin.program import Program, ProgramModule, capture, family, fold
from shohin.program.fold import CONVOLUTIONS
from shohin.quantization import Quantized, find_sites, quantizable, quantize_program, weight_quantizer
from shohin.quantization.sites import MOVES, activated, base
from shohin.targets import get_target
from shohin.targets.onnx.pair_safe import may_saturate, pair_safe_scale

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: nets.Residual2d(), (3, 12, 12)),
    "2d norm": (lambda: nets.Residual2d(norm=True), (3, 12, 12)),
    "1d": (lambda: nets.Residual1d(), (6, 32)),
    "transformer": (lambda: nets.Transformer(), (8, 32)),
}


def case(name: str, seed: int = 0) -> tuple[Program, list[Call]]:
    make, shape = NETS[name]
    module = nets.randomize(make(), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    data = Data([torch.randn(16, *shape, generator=generator) for _ in range(2)])
    return capture(module, data.example()), list(data.calls("train"))


def layers_of(program: Program) -> dict[str, Any]:
    """Address -> node of each layer, in the folded program."""
    return {program.origins[n.name].address: n for n in program.graph.nodes if program.origins.get(n.name) and n.op == "call_function"}


@pytest.mark.parametrize("drop", [None, 0, -1])
@pytest.mark.parametrize("name", NETS)
def test_sites_obey_the_rules(name: str, drop: int | None) -> None:
    program = fold(case(name)[0]).program
    layers = quantizable(program)
    left_out = {layers[drop]} if drop is not None else set()
    sites = find_sites(program, set(layers) - left_out)
    nodes = {n.name: n for n in program.graph.nodes}
    by_address = layers_of(program)
    assert set(sites.layers) == set(layers) - left_out and set(sites.own) == {n for n, g in sites.grids.items() if n == g}
    for address in sites.layers:
        node = by_address[address]
        assert base(node.args[0]).name in sites.grids  # codes come in
        if family(node) in CONVOLUTIONS:  # and go out, behind a fused activation
            out = activated(node)
            assert out.name in sites.grids
            assert out is node or node.name not in sites.grids
            if family(out) == "relu":
                assert sites.low[out.name] == 0.0
    assert all(sites.grids[g] == g for g in sites.grids.values())
    for node_name in sites.grids:
        node = nodes[node_name]
        if node.op == "call_function" and family(node) in MOVES and base(node.args[0]).name in sites.grids:
            assert sites.grids[node_name] == sites.grids[base(node.args[0]).name]
        if node.op == "call_function" and family(node) == "add":
            operands = [base(a) for a in node.args[:2]]
            assert all(a.name in sites.grids for a in operands)
            sources = [a.args[0] if family(a) in ("relu", "relu6", "hardtanh") else a for a in operands]
            assert not [s for s in sources if s.name in program.origins and program.origins[s.name].address in left_out]


def test_a_linear_layer_leaves_floats_to_sums_and_normalization() -> None:
    program = fold(case("transformer")[0]).program
    sites = find_sites(program, set(quantizable(program)))
    nodes = {n.name: n for n in program.graph.nodes}
    assert len(sites.layers) == 7
    for name in sites.grids:
        node = nodes[name]
        assert node.op != "call_function" or family(node) not in ("linear", "add"), name
        assert not any(family(user) == "layer_norm" for user in node.users if user.op == "call_function"), name


def test_only_sums_of_integers_are_sums_of_integers() -> None:
    program = fold(case("2d")[0]).program
    layers = quantizable(program)
    total = next(n for n in program.graph.nodes if n.op == "call_function" and family(n) == "add")
    assert total.name in find_sites(program, set(layers)).grids
    point = next(a for a in layers if a.startswith("point/"))
    assert total.name not in find_sites(program, set(layers) - {point}).grids


def snr(reference: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum().clamp_min(1e-30)))


@pytest.mark.parametrize("name", NETS)
def test_the_view_is_the_integer_file(name: str, tmp_path: Path) -> None:
    """Codes are equal but for rounding ties in float32; the view simulates what this machine's kernels compute."""
    program, calls = case(name)
    target = get_target("onnxruntime")
    quantized = quantize_program(program, set(quantizable(program)), calls, least_scale=pair_safe_scale)
    x = calls[1].args[0]
    view, used, _ = lower_quantized(target, quantized, tmp_path / "m.onnx", (x,), {})
    found, file = view(x), target.runner(tmp_path / "m.onnx")(x)
    assert used and snr(file, found) > 38, snr(file, found)
    float_outputs = ProgramModule(program)(x)
    assert snr(float_outputs, found) > 15
    expected = dict.fromkeys(quantized.sites.layers.values(), "int8")
    assert target.check(tmp_path / "m.onnx", expected) == []


def output_shift(quantized: Quantized, program: Program, calls: list[Call]) -> float:
    """Mean shift of each output channel over the calibration data, root of the mean square."""
    x = torch.cat([c.args[0] for c in calls])
    with torch.no_grad():
        return float((quantized.view()(x) - ProgramModule(program)(x)).mean(0).square().mean().sqrt())


@pytest.mark.parametrize("name", ["2d norm", "1d", "transformer"])
def test_corrected_biases_take_the_mean_error_away(name: str) -> None:
    ratios = []
    for seed in range(3):
        program, calls = case(name, seed)
        layers = set(quantizable(program))
        kinds = [
            quantize_program(program, layers, calls, formats=Bits.parse("w7a8"), correct_bias=correct, ranges="minmax")
            for correct in (False, True)
        ]
        before, after = (output_shift(q, program, calls) for q in kinds)
        ratios.append(after / before)
    assert sorted(ratios)[1] < 0.5, ratios


@pytest.mark.parametrize("name", ["int8", "int7"])
@pytest.mark.parametrize("shape", [(8, 6), (8, 3, 5), (8, 4, 3, 3)])
def test_weight_grids(name: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    weight[1] = 0.0
    weight[2] *= 100
    q = weight_quantizer(weight, named_format(name))
    plain = weight.abs().flatten(1).amax(1).double().clamp_min(1e-12) / q.format.high
    assert bool((q.scale > 0).all()) and bool((q.scale <= plain * 1.0001).all())
    error = (q.fake(weight) - weight).square().flatten(1).sum(1)
    naive = torch.fake_quantize_per_channel_affine(weight, plain.float(), torch.zeros(8), 0, -q.format.high, q.format.high) - weight
    assert bool((error <= naive.square().flatten(1).sum(1) * 1.001 + 1e-12).all())
    assert torch.equal(q.fake(weight)[1], torch.zeros(shape[1:]))


@pytest.mark.parametrize("name", NETS)
def test_no_weight_is_finer_than_the_target_allows(name: str) -> None:
    program, calls = case(name)
    quantized = quantize_program(program, set(quantizable(program)), calls, least_scale=pair_safe_scale)
    folded = fold(program).program
    groups = {folded.names[n.args[1].name]: n.args[6] for n in folded.graph.nodes if "conv" in n.name and len(n.args) > 6}
    fine = 0
    for weight, q in quantized.weights.items():
        original = folded.tensors[weight].detach()
        over = original if q.columns is None else (original / q.columns).float()
        assert bool((q.scale >= pair_safe_scale(over, groups.get(weight, 1)) * (1 - 1e-9)).all())
        assert not may_saturate(q.codes(original), groups.get(weight, 1))
        assert torch.equal(quantized.program.tensors[weight], q.fake(original))
        fine += may_saturate(weight_quantizer(original, INT8.weights).codes(original), groups.get(weight, 1))
    assert fine  # without the rule some would saturate


@pytest.mark.parametrize("ranges", ["mse", "percentile", "minmax"])
def test_seven_bits_and_ranges(ranges: str) -> None:
    program, calls = case("1d")
    quantized = quantize_program(program, set(quantizable(program)), calls, formats=Bits.parse("w7a8"), ranges=ranges)
    for weight, q in quantized.weights.items():
        codes = q.codes(quantized.program.tensors[weight])
        assert int(codes.abs().max()) <= 63 and not may_saturate(codes)
    x = calls[0].args[0]
    assert snr(ProgramModule(program)(x), quantized.view()(x)) > 15
    assert not quantized.view()(x).isnan().any()


def test_evidence_is_by_address() -> None:
    program, calls = case("2d norm")
    quantized = quantize_program(program, set(quantizable(program)), calls)
    found = quantized.by_address()
    assert set(quantized.weights) <= found.keys() and "x" in found
    assert len(found) == len(quantized.weights) + len(quantized.activations)
    assert all("/" in name or name == "x" for name in found.keys() - quantized.weights.keys())


def test_errors() -> None:
    program, calls = case("1d")
    layers = set(quantizable(program))
    with pytest.raises(DataError, match=r"needs calibration batches: give Data\(train=loader\)"):
        quantize_program(program, layers, [])
    with pytest.raises(PlanError, match=r"'nowhere/conv1d\.0' is not a convolution or linear layer"):
        quantize_program(program, {*layers, "nowhere/conv1d.0"}, calls)
    with pytest.raises(PlanError, match="unknown range method 'best'; known: mse"):
        quantize_program(program, layers, calls, ranges="best")
    with pytest.raises(PlanError, match="'w9a8' is no format"):
        quantize_program(program, layers, calls, formats=Bits.parse("w9a8"))
    bad = torch.full((4, 6, 32), float("nan"))
    with pytest.raises(DataError, match="an activation is NaN or Inf on the calibration data"):
        quantize_program(program, layers, [*calls, Call((bad,), {}, None, bad)])
    other = torch.randn(4, 5, 32)
    with pytest.raises(DataError, match=r"shape \(4, 5, 32\)"):
        quantize_program(program, layers, [Call((other,), {}, None, other)])


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_activations_that_never_change_stay_what_they_are(value: float) -> None:
    program, _ = case("1d")
    x = torch.full((4, 6, 32), value)
    quantized = quantize_program(program, set(quantizable(program)), [Call((x,), {}, None, x)])
    assert all(float(q.scale) > 0 for q in quantized.activations.values())
    found, wanted = quantized.view()(x), ProgramModule(program)(x)
    assert snr(wanted, found) > 15


def test_biases_are_corrected_by_the_samples_that_their_means_are_of() -> None:
    """Batches drift: the first 256 samples have another mean than those that follow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    calls = [Call((torch.randn(64, 16) + shift,), {}, None, None) for shift in (0.0,) * 4 + (2.0,) * 12]
    program = capture(model, Call((torch.randn(4, 16),), {}, None, None))
    found = quantize_program(program, set(quantizable(program)), calls)
    with torch.no_grad():
        errors = [float((found.view()(*c.args) - model(*c.args)).norm() / model(*c.args).norm()) for c in calls]
    assert max(errors) < 0.05


class Sliced(nn.Module):
    """Floats that are moved and read as codes and as floats: slices, a selected token, padding, a transposed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.time, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        g = F.gelu(self.a(x))
        y = self.b(F.pad(g, (1, 1, 1, 1))) + g
        y = self.b(y) + y[:, :, 1:-1, 1:-1]
        h = self.norm(y.flatten(2).transpose(1, 2))
        h = h + self.mix(h)
        t = self.time(h.transpose(1, 2))
        return self.head(h[:, 0]) + torch.tanh(t).mean(2)[:, :5]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("smoothing", [False, True])
def test_what_is_moved_and_read_in_both_ways_is_so_in_the_file_too(name: str, smoothing: bool, tmp_path: Path) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(2)  # of some seeds a tie is rounded otherwise in one sample
    program = capture(nets.randomize(Sliced(), 0), (torch.randn(4, 3, 9, 9),))
    calls = list(Data([torch.randn(16, 3, 9, 9) for _ in range(2)]).calls("train"))
    target, x = get_target(name), calls[1].args[0]
    quantized = quantize_program(program, set(quantizable(program)), calls, least_scale=target.least_scale(), smoothing=smoothing)
    view, _, _ = lower_quantized(target, quantized, tmp_path / "m.onnx", (x,), {})
    with torch.no_grad():
        assert snr(target.runner(tmp_path / "m.onnx")(x), view(x)) > 55
