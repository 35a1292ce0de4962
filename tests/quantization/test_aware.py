"""Quantization-aware training: gradients of grids, what ships is what was trained, freezing, resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import target_nets as nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.data import Call
from shohin.errors import DataError, ModelError, PlanError, RunError
from shohin.formats import Bits
from shohin.program import Program, capture
from shohin.quantization import QAT, AwareModule, Quantized, aware, quantizable, quantize_layers, quantize_program, static
from shohin.quantization.learned import rounded
from shohin.targets.onnx.pair_safe import may_saturate, pair_safe_scale
from shohin.training import TrainConfig


class Folds(nn.Module):
    """Batch normalization of either sign behind plain, grouped and depthwise convolutions and a linear layer, a residual sum, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.m = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8)
        self.c, self.o = nn.Conv2d(8, 12, 1, groups=2), nn.BatchNorm2d(12)
        self.l, self.k, self.h = nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Linear(10, 5)
        for norm in (self.n, self.m, self.o, self.k):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.n(self.a(x)))
        z = F.relu6(self.o(self.c(y + self.m(self.b(y)))))
        h: Tensor = self.h(F.relu(self.k(self.l(z.mean((2, 3))))))
        return h


class Tied(nn.Module):
    """Two layers with one weight, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.gelu(self.b(F.relu(self.a(F.relu(self.a(x)))))))
        return out


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "folds": (Folds, (3, 10, 10)),
    "tied": (Tied, (8,)),
    "1d": (lambda: nets.Residual1d(), (6, 32)),
    "2d norm": (lambda: nets.Residual2d(norm=True), (3, 12, 12)),
    "transformer": (lambda: nets.Transformer(), (8, 32)),
}


def begun(
    net: str, form: str, learn: Any = "lsq", passes: int | None = None
) -> tuple[nn.Module, Program, Quantized, AwareModule, list[Tensor]]:
    make, shape = NETS[net]
    torch.manual_seed(0)
    model = make().eval()
    batches = [torch.randn(8, *shape) for _ in range(3)]
    calls = [Call((x,), {}, None, x) for x in batches]
    program = capture(model, calls[0])
    formats = dict.fromkeys(quantizable(program), form)
    quantized = quantize_layers(program, calls, formats, least_scale=pair_safe_scale)
    return model, program, quantized, AwareModule(program, quantized, QAT(learn), passes, pair_safe_scale), batches


def steps(module: nn.Module, model: nn.Module, batches: list[Tensor], count: int) -> None:
    module.train()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 5e-3)
    for number in range(count):
        x = batches[number % len(batches)]
        optimizer.zero_grad()
        (module(x) - model(x)).square().mean().backward()
        optimizer.step()
    module.eval()


def decibels(found: Tensor, wanted: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum().clamp_min(1e-30)))


def plain_biases(program: Program, *_: Any) -> dict[str, Tensor]:
    return dict(program.tensors)


@pytest.mark.parametrize("form", ["int8", "w4a4", "w2a8", "weights uint3 group 4"])
@pytest.mark.parametrize("net", NETS)
def test_what_ships_is_what_was_trained(net: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module in evaluation equals the view of its harvest, before and after training, but for the grid of biases."""
    monkeypatch.setattr(aware, "on_the_grid_of_sums", plain_biases)
    model, program, _, module, batches = begun(net, form)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn_like(torch.cat(batches))
    for count in (0, 12):
        steps(module, model, batches, count)
        found = module.quantized()
        with torch.no_grad():
            assert decibels(found.view().eval()(x), module(x)) > 80
        for name, q in found.weights.items():
            weight = found.program.tensors[name]
            assert torch.equal(q.fake(weight), weight) and int(q.codes(weight).abs().max()) > 0
            if q.format.bits == 8 and name in found.sites.layers.values():
                layer = model.get_submodule(name.removesuffix(".weight"))
                assert not may_saturate(q.codes(weight), getattr(layer, "groups", 1))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert program.tensors[next(iter(program.tensors))].is_contiguous()


@pytest.mark.parametrize("learn", ["lsq", "pact", "fixed"])
def test_training_starts_on_the_first_grids_and_gets_nearer(learn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (aware, static):
        monkeypatch.setattr(room, "on_the_grid_of_sums", plain_biases)
    model, program, _, _, batches = begun("folds", "w3a4")
    calls = [Call((x,), {}, None, x) for x in batches]
    first = quantize_program(program, set(quantizable(program)), calls, formats=Bits.parse("w3a4"), correct_bias=False)
    module = AwareModule(program, first, QAT(learn)).eval()  # type: ignore[arg-type]
    x = torch.cat(batches)
    with torch.no_grad():
        assert decibels(module(x), first.view().eval()(x)) > 80
        start = decibels(module(x), model(x))
    module.inner.settle(frozenset(["batch_norm"]))  # these few samples have other statistics than the random ones of the net
    scales = {n: q.scale.clone() for n, q in module.quantized().activations.items()}
    steps(module, model, batches, 60)
    with torch.no_grad():
        assert decibels(module.quantized().view().eval()(x), model(x)) > start + 2
    moved = [n for n, q in module.quantized().activations.items() if not torch.equal(q.scale, scales[n])]
    assert bool(moved) == (learn != "fixed")


def reference(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Rounding by the definition of its gradients: a clamp, then a rounding that gradients do not see."""
    y = torch.clamp(x / scale + zero, low, high)
    return (y + (torch.round(x / scale).add(zero).clamp(low, high) - y).detach() - zero) * scale


@pytest.mark.parametrize("shape", [(), (4, 1), (4, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_those_of_the_papers(seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    given = 2 * torch.randn(4, 6), torch.rand(shape) + 0.1, torch.randint(0, 9, shape).float()
    seen, found = torch.randn(4, 6), []
    for function in (rounded, reference):
        x, scale, zero = (t.clone().requires_grad_() for t in given)
        value = function(x, scale, zero, 0, 12)
        (value * seen).sum().backward()
        found.append((value, x.grad, scale.grad, zero.grad))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_pact_learns_from_clipped_values_alone() -> None:
    x = torch.tensor([-1.0, 0.3, 0.9, 4.0, 5.0])
    seen = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    scale = torch.tensor(0.2, requires_grad=True)
    (rounded(x, scale, torch.tensor(0.0), 0, 15, clips=True) * seen).sum().backward()
    assert scale.grad is not None and float(scale.grad) == pytest.approx(15 * (5 + 7))  # the bound is 15 scales; PACT, equation 3


def test_statistics_settle_and_then_grids() -> None:
    model, _, _, module, batches = begun("folds", "w4a4", passes=10)
    norms, grids = "inner.n.running_mean", "inner.grids.activation_relu.growth"
    seen = []
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for number in range(10):
        optimizer.zero_grad()
        (module(batches[number % 3]) - model(batches[number % 3])).square().mean().backward()
        optimizer.step()
        seen.append({n: module.state_dict()[n].clone() for n in (norms, grids, "inner.a.weight")})
    changed = {n: [not torch.equal(a[n], b[n]) for a, b in pairwise(seen)] for n in seen[0]}
    assert changed[norms] == [True] * 5 + [False] * 4  # step 7, the first after 60 %, leaves what step 6 left
    assert changed[grids] == [True] * 7 + [False] * 2
    assert all(changed["inner.a.weight"])


def labelled(count: int, ends: int | None = None) -> shohin.Data:
    """Batches whose class a small net can learn; the training loader fails after so many passes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, 10, 10, generator=generator)
    x += 2 * torch.randn(count, 3, 1, 1, generator=generator)
    y = x.mean((2, 3)).argmax(1)

    class Loader:
        passes = 0

        def __len__(self) -> int:
            return count // 32

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            if self.passes == ends:
                raise OSError("the disk is gone")
            parts = torch.arange(count).split(32)  # of the same samples: a teacher's answers differ in the last bits with the batch
            for number in torch.randperm(len(parts)).tolist():
                yield x[parts[number]], y[parts[number]]
            self.passes += 1

    return shohin.Data(train=Loader(), validation=[(x, y)])


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(1)
    model, data = Folds(), labelled(512)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(12):
        for x, y in data.train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def test_a_classifier_of_few_bits_recovers_and_the_users_model_stays(classifier: nn.Module) -> None:
    data, before = labelled(512), copy.deepcopy(classifier.state_dict())
    plain = shohin.quantize(classifier, data, "w2a2", None)
    trained = shohin.quantize(classifier, data, "w2a2", None, recover="qat", config=TrainConfig(epochs=10, lr=5e-3))
    assert trained.view is not None and plain.view is not None
    assert data.quality(trained.view) > data.quality(plain.view) + 0.05
    assert all(torch.equal(t, before[name]) for name, t in classifier.state_dict().items())
    assert trained.notes["learn"] == "lsq" and trained.model is not None and not trained.model.training
    assert set(trained.plan.formats.values()) == {"w2a2"}


@pytest.mark.parametrize(("form", "target"), [("int8", "onnxruntime"), ("w4a8", "onnxruntime"), ("w4a8", "openvino")])
def test_a_trained_file_equals_its_view(classifier: nn.Module, form: str, target: str, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    data = labelled(256)
    trained = shohin.quantize(classifier, data, form, target, recover="qat", epochs=1)
    shipped = shohin.export(trained, data, target, tmp_path / "m.onnx")
    assert shipped.notes["parity"]["boundaries"]["view_runtime"]["max_rel"] < 1e-3 and shipped.notes["parity"]["departs"] == []


def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(classifier: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recover": "qat", "config": TrainConfig(epochs=4, lr=3e-3, seed=2)}
    whole = shohin.quantize(classifier, labelled(128), "w4a4", None, **options)
    with pytest.raises(OSError, match="the disk is gone"):
        shohin.quantize(classifier, labelled(128, ends=3), "w4a4", None, out=tmp_path, **options)
    assert (tmp_path / "training.safetensors").exists()
    again = shohin.quantize(classifier, labelled(128), "w4a4", None, out=tmp_path, **options)
    assert whole.model is not None and again.model is not None
    assert all(torch.equal(t, whole.model.state_dict()[name]) for name, t in again.model.state_dict().items())
    assert {a: q.to_json() for a, q in again.evidence.items()} == {a: q.to_json() for a, q in whole.evidence.items()}
    with pytest.raises(RunError, match="another training"):
        shohin.quantize(classifier, labelled(128), "w4a4", None, out=tmp_path, recover="qat", config=TrainConfig(epochs=9))
    for other in (QAT("pact"), QAT(settle=(0.1, 0.2))):
        with pytest.raises(RunError, match=r"learn|settle"):
            shohin.quantize(classifier, labelled(128), "w4a4", None, out=tmp_path, recover=other, config=options["config"])


class Scalars(nn.Module):
    """An activation without dimensions beside a layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.h = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.c(x))
        out: Tensor = self.h(y) * y.mean()
        return out


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "scalar": (Scalars, [torch.ones(4, 3, 6, 6), torch.zeros(4, 3, 6, 6)]),
    "sparse gradients": (lambda: nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 4)), [torch.arange(8).reshape(4, 2)] * 3),
    "one sample left": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
        [torch.arange(16.0).reshape(4, 4), torch.ones(1, 4)],
    ),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_models_and_batches_are_trained(case: str) -> None:
    make, batches = UNUSUAL[case]
    torch.manual_seed(0)
    found = shohin.quantize(make().eval(), shohin.Data(train=batches), recover="qat", epochs=3)
    assert found.notes["training"]["stopped"] == "finished" and found.view is not None


def test_what_cannot_be_trained_says_so(classifier: nn.Module) -> None:
    frozen = copy.deepcopy(classifier).requires_grad_(False)
    with pytest.raises(ModelError, match="requires gradients"):
        shohin.quantize(frozen, labelled(64), recover="qat", epochs=1)

    data = shohin.Data(train=[torch.randn(8, 3, 10, 10)])
    with pytest.raises(DataError, match="no gradient"):
        shohin.quantize(nets.Decided(copy.deepcopy(classifier)), data, recover="qat", epochs=1)


def test_bad_wishes_are_refused_before_the_work(classifier: nn.Module, tmp_path: Path) -> None:
    data = labelled(64)
    with pytest.raises(PlanError, match=r"activations of 8 bits: ask for 'int8' or 'w4a8'.*target=None"):
        shohin.quantize(classifier, data, "w4a4")
    with pytest.raises(PlanError, match="w4a8"):
        shohin.quantize(classifier, data, "w9a8")
    with pytest.raises(PlanError, match="recover='train'"):
        shohin.quantize(classifier, data, recover="train")
    with pytest.raises(PlanError, match="learn='steps'"):
        QAT("steps")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="settle"):
        QAT(settle=(0.5, 2))
    with pytest.raises(PlanError, match="not both"):
        shohin.quantize(classifier, data, recover="qat", drop="1 %")
    with pytest.raises(PlanError, match="recover='qat'"):
        shohin.quantize(classifier, data, epochs=9)
    with pytest.raises(PlanError, match="TrainConfig"):
        shohin.quantize(classifier, data, recover="qat", config=3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="nothing to quantize"):
        shohin.quantize(nn.ReLU(), data)
    with pytest.raises(PlanError, match=r"model.float\(\)"):
        shohin.quantize(nn.Linear(4, 2).double(), shohin.Data(train=[torch.randn(4, 4).double()]))
    with pytest.raises(RunError, match="out="):
        shohin.quantize(classifier, data, out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        shohin.quantize(classifier, data, recover="qat", out=tmp_path / "file")
    with pytest.raises(DataError, match="batches"):
        shohin.quantize(classifier, shohin.Data(example=(torch.randn(2, 3, 10, 10),)), "weights int4", None, recover="qat")
