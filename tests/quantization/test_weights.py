"""Weights of whole programs on grids: every weight on its own, errors in the right order, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from target_nets import Residual1d, Residual2d, Transformer, randomize
from torch import Tensor, nn

import shohin
from shohin.data import Call, Data
from shohin.errors import DataError, PlanError
from shohin.evidence.layers import layer_weights
from shohin.formats import Scheme
from shohin.program import ProgramModule, capture, fold
from shohin.quantization import ROUNDINGS, quantize_layers, quantize_weights, weights_by_address

NETS = {
    "Residual1d": (Residual1d, (6, 20)),
    "Residual2d": (lambda: Residual2d(norm=True), (3, 12, 12)),
    "Transformer": (Transformer, (6, 32)),
}


def net(name: str, seed: int = 0) -> tuple[nn.Module, Data, list[Call]]:
    make, shape = NETS[name]
    generator = torch.Generator().manual_seed(seed)
    data = Data(train=[torch.randn(16, *shape, generator=generator) for _ in range(4)])
    return randomize(make(), seed), data, list(data.calls("train"))


def error(model: nn.Module, changed: nn.Module, calls: list[Call]) -> float:
    with torch.no_grad():
        pairs = [(model(*c.args), changed(*c.args)) for c in calls]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r != "auto"])
@pytest.mark.parametrize("text", ["weights uint4 group 16", "weights int3 channel"])
def test_every_weight_is_on_its_grid_and_the_view_is_the_program(name: str, rounding: str, text: str) -> None:
    model, data, calls = net(name)
    program = capture(model, data.example())
    addresses = weights_by_address(program)
    found = quantize_weights(program, calls, dict.fromkeys(addresses, Scheme.parse(text)), rounding=rounding)
    assert set(found.weights) == {w.name for w in addresses.values()} and not found.activations
    for weight, q in found.weights.items():
        value = found.program.tensors[weight]
        torch.testing.assert_close(q.decoded(q.codes(value)), value, rtol=0, atol=1e-6)
        assert len(torch.unique(q.codes(value))) <= 2**q.format.bits
    assert set(found.weight_formats().values()) == {text}
    assert error(model, found.view(), calls) < 0.2
    unchanged = fold(program).program
    assert all(torch.equal(unchanged.tensors[n], t) for n, t in found.program.tensors.items() if n not in found.weights and "bias" not in n)


@pytest.mark.parametrize("name", NETS)
def test_more_work_leaves_less_error(name: str) -> None:
    sums = dict.fromkeys(("nearest", "gptq", "descent"), 0.0)
    for seed in range(2):
        model, data, calls = net(name, seed)
        program = capture(model, data.example())
        for rounding in sums:
            schemes = dict.fromkeys(weights_by_address(program), Scheme.parse("weights uint3 group 16"))
            sums[rounding] += error(model, quantize_weights(program, calls, schemes, rounding=rounding).view(), calls)
    assert sums["descent"] < 1.05 * sums["gptq"] and sums["gptq"] < sums["nearest"]


def test_divided_inputs_make_layers_more_exact() -> None:
    sums = {True: 0.0, False: 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.rand(64) ** 3 * 5 + 0.02)
        calls = list(Data(train=[torch.randn(64, 64) for _ in range(8)]).calls("train"))
        program = capture(model, calls[0])
        schemes = {"1/linear.0": Scheme.parse("weights uint4 group 16")}
        for scaled in sums:
            found = quantize_weights(program, calls, schemes, scaled=schemes if scaled else ())
            assert (found.weights["1.weight"].columns is not None) == scaled
            sums[scaled] += error(model, found.view(), calls)
    assert sums[True] < 0.97 * sums[False]


def test_later_layers_correct_what_earlier_ones_left() -> None:
    model, data, calls = net("Transformer")
    program = capture(model, data.example())
    schemes = dict.fromkeys(weights_by_address(program), Scheme.parse("weights uint3 group 16"))
    own, followed = (
        error(model, quantize_weights(program, calls, schemes, rounding="gptq", follow=f).view(), calls) for f in (False, True)
    )
    assert followed < own


def test_eight_bits_change_next_to_nothing() -> None:
    model, data, calls = net("Transformer")
    program = capture(model, data.example())
    found = quantize_weights(program, calls, dict.fromkeys(weights_by_address(program), Scheme.parse("weights uint8 group 16")))
    assert error(model, found.view(), calls) < 1e-4


def test_integer_layers_and_few_bits_go_together_and_normalization_is_folded_once() -> None:
    model, data, calls = net("Residual2d")
    program = capture(model, data.example())
    found = quantize_layers(
        program, calls, {**dict.fromkeys(weights_by_address(program), "int8"), "head/linear.0": "weights uint4 group 32"}
    )
    assert found.weight_formats()["head.weight"] == "weights uint4 group 32" and found.weight_formats()["stem.weight"] == "int8"
    assert set(found.folded.folded) == {"group.weight"} and "head.weight" not in found.sites.layers.values()
    assert error(model, found.view(), calls) < 0.05


def test_a_candidate_holds_what_its_view_computes() -> None:
    model, data, calls = net("Residual2d")
    before = copy.deepcopy(model.state_dict())
    found = shohin.quantize(model, data, {"head*": "weights uint4 group 32"})
    assert found.view is not None and found.model is not None
    x = calls[0].args[0]
    torch.testing.assert_close(found.model(x), found.view(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert type(found.model) is type(model) and found.notes["rounding"] == "auto"


def test_the_same_seed_gives_the_same_codes() -> None:
    model, data, _ = net("Transformer")
    first, again = (shohin.quantize(model, data, "weights uint4 group 32", seed=3) for _ in range(2))
    assert all(torch.equal(first.evidence[n].scale, again.evidence[n].scale) for n in first.evidence)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))  # type: ignore[union-attr]


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("rounding", ["nearest", "descent"])
def test_a_shared_weight_has_one_grid(rounding: str) -> None:
    model, data = Shared().eval(), Data(train=[torch.randn(32, 16)])
    program = capture(model, data.example())
    scheme = Scheme.parse("weights uint4 group 16")
    found = quantize_weights(program, list(data.calls("train")), {"a/linear.0": scheme, "b/linear.0": scheme}, rounding=rounding)
    ((name, q),) = found.weights.items()
    assert torch.equal(q.decoded(q.codes(found.program.tensors[name])), found.program.tensors[name])
    candidate = shohin.quantize(model, data, "weights uint4 group 16", rounding=rounding)
    assert candidate.model is not None and candidate.model.a.weight is candidate.model.b.weight
    torch.testing.assert_close(candidate.model(torch.ones(2, 16)), candidate.view(torch.ones(2, 16)))  # type: ignore[misc]
    with pytest.raises(PlanError, match="shares the weight"):
        quantize_weights(program, [], {"a/linear.0": scheme, "b/linear.0": Scheme.parse("weights int8 channel")})


def test_what_is_refused() -> None:
    model, data, calls = net("Transformer")
    program = capture(model, data.example())
    scheme = Scheme.parse("weights uint4 group 16")
    with pytest.raises(PlanError, match=r"'head/linear.1' is no layer with a weight of its own; did you mean 'head/linear.0'"):
        quantize_weights(program, calls, {"head/linear.1": scheme})
    with pytest.raises(PlanError, match=r"rounding='gpt' is not known.*did you mean 'gptq'"):
        quantize_weights(program, calls, {"head/linear.0": scheme}, rounding="gpt")
    for rounding in ("gptq", "descent"):
        with pytest.raises(DataError, match="needs calibration batches"):
            quantize_weights(program, [], {"head/linear.0": scheme}, rounding=rounding)
    broken = [Call((torch.full_like(calls[0].args[0], torch.nan),), {}, None, None)]
    with pytest.raises(DataError, match="NaN"):
        quantize_weights(program, broken, {"head/linear.0": scheme}, rounding="gptq")
    assert ProgramModule(program) is not None and layer_weights(program)[1] == {}


@pytest.mark.parametrize("samples", [2, 24, 200])
def test_few_samples_do_little_harm(samples: int) -> None:
    """Of inputs without correlations there is nothing to learn: chance must not be taken for it."""
    errors = dict.fromkeys(("nearest", "descent"), 0.0)
    for seed in range(3):
        torch.manual_seed(seed)
        model = randomize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), seed)
        calls = list(Data(train=[torch.randn(samples, 64)]).calls("train"))
        program = capture(model, Data(train=[torch.randn(4, 64)]).example())
        fresh = [Call((torch.randn(512, 64),), {}, None, None)]
        for rounding in errors:
            schemes = dict.fromkeys(weights_by_address(program), Scheme.parse("weights uint4 group 32"))
            errors[rounding] += error(model, quantize_weights(program, calls, schemes, rounding=rounding).view(), fresh)
    assert errors["descent"] < 1.5 * errors["nearest"]
