"""How ranges of activations are chosen for a network: methods, patterns of addresses, and data that cannot calibrate."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable

import pytest
import target_nets as nets
import torch
from torch import Tensor, nn

import shohin
from shohin.data import Call, Data
from shohin.errors import DataError, PlanError
from shohin.evidence.calibration import METHODS, Ranges
from shohin.formats import Quantizer
from shohin.program import Program, ProgramModule, capture
from shohin.quantization import Quantized, observation, quantizable, quantize_program

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d norm": (lambda: nets.Residual2d(norm=True), (3, 12, 12)),
    "1d": (lambda: nets.Residual1d(), (6, 32)),
    "transformer": (lambda: nets.Transformer(), (8, 32)),
}
ALL = (*METHODS, "percentile 99.9")


@functools.cache
def case(name: str, seed: int = 0) -> tuple[nn.Module, Program, list[Call]]:
    make, shape = NETS[name]
    module = nets.randomize(make(), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    data = Data([torch.randn(12, *shape, generator=generator) for _ in range(3)])
    return module, capture(module, data.example()), list(data.calls("train"))


@functools.cache
def quantized(name: str, method: str) -> Quantized:
    _, program, calls = case(name)
    return quantize_program(program, set(quantizable(program)), calls, ranges=method)


def with_ranges(name: str, ranges: Ranges) -> dict[str, Quantizer]:
    """Activation quantizers by address."""
    _, program, calls = case(name)
    found = quantize_program(program, set(quantizable(program)), calls, ranges=ranges, correct_bias=False)
    return {address: q for address, q in found.by_address().items() if address not in found.weights}


def same(one: Quantizer, other: Quantizer) -> bool:
    return torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)


def relative_error(reference: Tensor, other: Tensor) -> float:
    return float(((reference - other).square().sum() / reference.square().sum()).sqrt())


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", NETS)
def test_every_method_gives_a_view_near_the_model(name: str, method: str) -> None:
    _, program, calls = case(name)
    view, plain = quantized(name, method).view(), ProgramModule(program)
    with torch.no_grad():
        errors = [relative_error(plain(c.args[0]), view(c.args[0])) for c in calls]
    assert all(math.isfinite(e) for e in errors) and max(errors) < 0.05, errors


@pytest.mark.parametrize("name", NETS)
def test_the_grids_are_those_of_the_method(name: str) -> None:
    """Of minimum and maximum by hand; the others clip, none is wider."""
    calls = case(name)[2]
    widest = quantized(name, "minmax")
    if "x" in widest.activations:
        x = torch.cat([c.args[0] for c in calls]).double()
        assert float(widest.activations["x"].scale) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-12)
    narrower = set()
    for method in ALL:
        for site, q in quantized(name, method).activations.items():
            if q.axis is not None:  # smoothed: its scales are of another tensor
                continue
            full = float(widest.activations[site].scale)
            assert float(q.scale) <= full * (1 + 1e-12), (method, site)
            if float(q.scale) < full * 0.999:
                narrower.add(method)
    assert narrower | {"percentile"} == set(ALL) - {"minmax"}  # of a few thousand values it cuts none


def test_patterns_of_addresses_choose_the_method() -> None:
    plain = {method: with_ranges("1d", method) for method in ("mse", "minmax", "moving", "percentile 90")}
    sites = list(plain["mse"])
    assert {"x", "/relu.0", "/relu.1", "body/conv1d.0", "pool/max_pool1d.0"} < set(sites)
    found = with_ranges("1d", {"*": "minmax", "*relu*": "percentile 90", "/relu.1": "moving"})
    expected = dict.fromkeys(sites, "minmax") | {"/relu.0": "percentile 90", "pool/max_pool1d.0": "percentile 90", "/relu.1": "moving"}
    for site in sites:
        assert same(found[site], plain[expected[site]][site]), site
    found = with_ranges("1d", {"x": "moving"})  # where no pattern matches, as if nothing was given
    assert all(same(found[site], plain["moving" if site == "x" else "mse"][site]) for site in sites)
    found = with_ranges("1d", {"x": "moving", "?": "minmax"})
    assert same(found["x"], plain["minmax"]["x"]) and not same(plain["minmax"]["x"], plain["moving"]["x"])


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(PlanError, match=r"the pattern 'bodi/\*' matches none of \d+ names"):
        with_ranges("1d", {"*": "mse", "bodi/*": "minmax"})
    with pytest.raises(PlanError, match=r"'pool/max_pool1d\.0' has the range of '/relu\.0'"):
        with_ranges("1d", {"pool/*": "minmax"})
    with pytest.raises(PlanError, match=r"unknown range method 'entropi'; known: .*; did you mean 'entropy'"):
        with_ranges("1d", {"x": "entropi"})
    with pytest.raises(PlanError, match="range method 'percentile 101': write the per cent"):
        with_ranges("1d", "percentile 101")


def quantize_on(x: Tensor, method: str) -> Quantized:
    _, program, _ = case("1d")
    return quantize_program(program, set(quantizable(program)), [Call((x,), {}, None, x)], ranges=method)


@pytest.mark.parametrize("method", ALL)
def test_data_that_cannot_calibrate(method: str) -> None:
    _, program, _ = case("1d")
    with pytest.raises(DataError, match=r"needs calibration batches: give Data\(train=loader\)"):
        quantize_program(program, set(quantizable(program)), [], ranges=method)
    with pytest.raises(DataError, match=r"no calibration data reached 'x': give Data\(train=loader\)"):
        quantize_on(torch.zeros(0, 6, 32), method)
    x = torch.randn(4, 6, 32)
    x[2, 3, 4] = float("nan")
    with pytest.raises(DataError, match=r"an activation is NaN or Inf on the calibration data at 'x': check the data and the model"):
        quantize_on(x, method)
    with pytest.raises(DataError, match=r"NaN or Inf on the calibration data at '/relu\.0'"):
        quantize_on(torch.full((4, 6, 32), 3e38), method)  # a finite input whose sums overflow


@pytest.mark.parametrize("method", ALL)
def test_activations_that_never_change(method: str) -> None:
    _, program, _ = case("1d")
    for value in (0.0, 3.0, -2.0):
        x = torch.full((4, 6, 32), value)
        found = quantize_on(x, method)
        assert all(float(q.scale) > 0 for q in found.activations.values())
        q = found.activations["x"]
        torch.testing.assert_close(q.fake(x), x, rtol=1e-6, atol=0.0)
        with torch.no_grad():
            assert relative_error(ProgramModule(program)(x), found.view()(x)) < 0.15


def test_the_verb_takes_methods_and_patterns() -> None:
    module, _, calls = case("1d")
    data = Data([c.args[0] for c in calls])
    patterns = {"*": "entropy", "x": "minmax"}
    found = shohin.quantize(module, data, ranges=patterns)
    assert found.notes["ranges"] == patterns and json.loads(json.dumps(found.notes))["ranges"] == patterns
    every = {method: shohin.quantize(module, data, ranges=method) for method in ("entropy", "minmax")}
    assert every["entropy"].notes["ranges"] == "entropy"
    for site in ("x", "/relu.0", "/relu.1"):
        assert same(found.evidence[site], every["minmax" if site == "x" else "entropy"].evidence[site]), site
    with pytest.raises(PlanError, match="unknown range method 'kl'"):
        shohin.quantize(module, data, ranges="kl")
    with pytest.raises(PlanError, match=r"the pattern 'head/\*' matches none"):  # a linear layer's output stays float
        shohin.quantize(module, data, ranges={"head/*": "minmax"})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_nothing_depends_on_how_many_samples_go_through_at_once(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = case(name)[1]
    generator = torch.Generator().manual_seed(0)
    data = Data([torch.randn(size, *NETS[name][1], generator=generator) for size in (7, 7, 5)])
    calls, found = list(data.calls("train")), []
    monkeypatch.setattr(observation, "NUMBERS", 0)
    monkeypatch.setattr(observation, "LEAST", 9)  # means are of nine samples, of two batches
    for cached in (1, 2**40):
        monkeypatch.setattr(observation, "CACHED", cached)
        found.append(quantize_program(program, set(quantizable(program)), calls, ranges=method, smoothing=False))
    alone, together = found
    for node, q in alone.activations.items():
        assert torch.allclose(q.scale, together.activations[node].scale, rtol=1e-2)  # sums in another order
        assert int((q.zero_point - together.activations[node].zero_point).abs()) <= 1
    for tensor, value in alone.program.tensors.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, together.program.tensors[tensor], rtol=2e-3, atol=2e-2)


class Mixing(nn.Module):
    """Each sample is divided by what all of the batch show."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, stride=4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = torch.relu(h / h.abs().amax((0, 2, 3), keepdim=True))
        out: Tensor = self.c(torch.relu(self.b(h)).mean((2, 3)))
        return out


def test_batches_whose_samples_act_on_each_other_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3, 16, 16) * torch.logspace(-1.5, 1, 12).reshape(-1, 1, 1, 1)
    model = Mixing().eval()
    monkeypatch.setattr(observation, "CACHED", 1)
    view = shohin.quantize(model, Data(train=[x])).view
    assert view is not None
    with torch.no_grad():
        assert relative_error(model(x), view(x)) < 0.02
