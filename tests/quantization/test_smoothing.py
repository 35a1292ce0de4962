"""Smoothing: a scale for each channel of what floating operations make, taken back in the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import target_nets as nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.data import Call
from shohin.formats import INT8, Quantizer, named_format
from shohin.pipeline.ship import lower_quantized
from shohin.program import capture
from shohin.quantization import Quantized, quantizable, quantize_program, weight_quantizer
from shohin.quantization.smoothing import Channels, smoothed
from shohin.targets import get_target


def snr(reference: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum().clamp_min(1e-30)))


class Outlying(nn.Module):
    """A transformer's block, after its normalizations as in BERT, whose normalizations give some channels far larger values."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        h = self.norm2(h + self.out(a.squeeze(1)))
        h = h + self.down(F.gelu(self.up(h)))
        weights = mask[:, :, None].float()
        return self.head((h * weights).sum(1) / weights.sum(1))


def outlying(seed: int = 0) -> tuple[nn.Module, list[Call]]:
    model = nets.randomize(Outlying(), seed)
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight[:3] *= 25.0
        for layer in (model.q, model.k, model.v, model.up):
            layer.weight[:, :3] /= 25.0
    generator = torch.Generator().manual_seed(seed + 1)
    calls = []
    for _ in range(4):
        mask = (torch.arange(10) < torch.randint(3, 11, (16, 1), generator=generator)).long()
        calls.append(Call((torch.randn(16, 10, 32, generator=generator), mask), {}, None, None))
    return model, calls


def made(model: nn.Module, calls: list[Call], **options: object) -> Quantized:
    program = capture(model, calls[0])
    return quantize_program(program, set(quantizable(program)), calls, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outlying_channels_no_longer_take_the_codes_of_the_others(seed: int) -> None:
    model, calls = outlying(seed)
    plain, smooth = (made(model, calls, smoothing=on) for on in (False, True))
    assert [q.axis for q in plain.activations.values()] == [None] * len(plain.activations)
    assert {n for n, q in smooth.activations.items() if q.axis == -1} >= {"layer_norm", "layer_norm_1"}
    with torch.no_grad():
        wanted = model(*calls[0].args)
        errors = [snr(wanted, found.view()(*calls[0].args)) for found in (plain, smooth)]
    assert errors[1] > errors[0] + 6


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_file_equals_the_view_and_runs_on_integers(name: str, tmp_path: Path) -> None:
    model, calls = outlying()
    if name == "openvino":
        pytest.importorskip("openvino")
    target = get_target(name)
    found = made(model, calls, least_scale=target.least_scale())
    view, used, _ = lower_quantized(target, found, tmp_path / "m.onnx", calls[0].args, {})
    with torch.no_grad():
        simulated = view(*calls[1].args)
    assert snr(target.runner(tmp_path / "m.onnx")(*calls[1].args), simulated) > 50
    assert any(q.axis == -1 for q in used.values())
    assert target.check(tmp_path / "m.onnx", dict.fromkeys(found.sites.layers.values(), "int8")) == []


def test_what_padding_holds_does_not_matter() -> None:
    model, calls = outlying()
    wild = [Call((c.args[0] + 1000 * (1 - c.args[1][:, :, None]), c.args[1]), {}, None, None) for c in calls]
    first, second = (made(model, given) for given in (calls, wild))
    compared = [name for name, q in first.activations.items() if q.axis == -1]
    assert len(compared) >= 2
    for name in compared:
        torch.testing.assert_close(first.activations[name].scale, second.activations[name].scale, rtol=1e-5, atol=0)
    for name in ("q.bias", "up.bias"):  # means are of the words alone, too
        torch.testing.assert_close(first.program.tensors[name], second.program.tensors[name], rtol=1e-3, atol=1e-3)


def test_other_readers_go_on_with_floats() -> None:
    """The residual sums read the normalization's own values: with every layer exact, only they could still be rounded."""
    model, calls = outlying()
    found = made(model, calls)
    assert found.sites.readers["layer_norm"] == {"linear", "linear_1", "linear_2"}
    sums = {n.name for n in found.program.graph.nodes if str(n.target).startswith("aten.add")}
    assert sums and not any(sums & nodes for nodes in found.sites.readers.values())
    with torch.no_grad():
        for layer in (model.out, model.down):
            layer.weight.zero_()
            layer.bias.zero_()
        program = capture(model, calls[0])
        layers = {a for a in quantizable(program) if not a.startswith("head")}
        view = quantize_program(program, layers, calls).view()
        torch.testing.assert_close(view(*calls[0].args), model(*calls[0].args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_grid_is_no_worse_than_one_scale_on_the_layers_outputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 24, generator=generator) * torch.rand(24, generator=generator).mul(4).exp()
    weight = torch.randn(16, 24, generator=generator)
    seen = Channels(200)
    for part in x.split(200):
        seen.update(part)
    form = named_format("uint8")
    q = smoothed(seen, [weight], form, lambda w: weight_quantizer(w, INT8.weights))
    assert q is not None and q.axis == -1 and float(q.one_scale.scale) == float(q.scale.max())
    columns = q.factors
    own = weight_quantizer((weight / columns).float(), INT8.weights)
    held = Quantizer(own.format, own.scale, own.zero_point, 0, columns=columns)
    plain = nets.act_quantizer(x)
    error = (q.fake(x) @ held.fake(weight).T - x @ weight.T).square().sum()
    assert error < (plain.fake(x) @ weight_quantizer(weight, INT8.weights).fake(weight).T - x @ weight.T).square().sum()
    # codes of one scale times codes of one scale for each output are the same product
    codes = q.codes(x) - q.zero_point
    product = codes.double() * float(q.one_scale.scale) @ (own.codes((weight / columns).float()).double() * own.scale[:, None]).T
    torch.testing.assert_close(product.float(), q.fake(x) @ held.fake(weight).T, rtol=1e-4, atol=1e-3)
    again = Quantizer.from_json(json.loads(json.dumps(held.to_json())))
    assert torch.equal(again.fake(weight), held.fake(weight)) and torch.equal(held.fake(held.fake(weight)), held.fake(weight))


def test_even_channels_keep_one_scale_and_other_ranges_are_respected() -> None:
    torch.manual_seed(0)
    seen = Channels(500)
    seen.update(torch.rand(500, 8) * 2 - 1)
    assert smoothed(seen, [torch.randn(64, 8).sign()], named_format("uint8"), lambda w: weight_quantizer(w, INT8.weights)) is None
    model, calls = outlying()
    assert all(q.axis is None for q in made(model, calls, ranges="minmax").activations.values())
    empty = Channels(8)
    empty.update(torch.zeros(4, 8))
    assert smoothed(empty, [torch.randn(6, 8)], named_format("uint8"), lambda w: weight_quantizer(w, INT8.weights)) is None


def test_the_public_call_names_what_was_smoothed_and_exports(tmp_path: Path) -> None:
    model, calls = outlying()
    data = shohin.Data(train=[{"x": c.args[0], "mask": c.args[1]} for c in calls])
    found = shohin.quantize(model, data, "int8")
    assert "norm1/layer_norm.0" in found.notes["smoothed"]
    assert shohin.quantize(model, data, "int8", smoothing=False).notes["smoothed"] == []
    shipped = shohin.export(found, data, path=tmp_path / "m.onnx")
    assert shipped.notes["parity"]["departs"] == [] and shohin.verify(tmp_path / "m.onnx")["passes"]
