"""Channels of an activation made alike: floats compute the same, grids become more exact, and what cannot be moved is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from target_nets import Residual2d, Transformer, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.program import Program, ProgramModule, capture
from shohin.quantization import equalized, quantizable

torch.set_num_threads(1)


class Chain(nn.Module):
    """A depthwise pair, leaky and plain ReLUs, poolings, zero padding, rows after a picture, and layers side by side."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        make: Callable[[int], nn.Module] = nn.BatchNorm2d if norm else lambda _: nn.Identity()
        self.a, self.an = nn.Conv2d(3, 12, 3, padding=1, bias=not norm), make(12)
        self.b, self.bn = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=not norm), make(12)
        self.c, self.d = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 3)
        self.e, self.f = nn.Linear(16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.an(self.a(x))), 2)
        x = F.leaky_relu(self.bn(self.b(x)), 0.1)
        x = torch.cat([F.relu(self.c(x)).mean((2, 3)), F.relu(self.d(F.pad(x, (1, 1, 1, 1)))).mean((2, 3))], 1)
        out: Tensor = self.f(F.relu(self.e(x)))
        return out


class Vgg(nn.Module):
    """1 x 1 convolutions and linear layers whose channels never go below a number: biases can be absorbed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 3)
        with torch.no_grad():
            assert self.a.bias is not None and self.c.bias is not None
            self.a.bias[:4] += 40
            self.c.bias[2:6] += 60

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.b(F.relu(self.a(x))))).mean((2, 3))
        out: Tensor = self.d(F.relu(self.c(x)))
        return out


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "chain": (lambda: Chain(False), (3, 12, 12), 2),
    "chain, norms": (lambda: Chain(True), (3, 12, 12), 2),
    "absorbing": (Vgg, (3, 6, 6), 3),
    "1d": (lambda: nn.Sequential(nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 3)), (6, 20), 1),
    "2d": (lambda: Residual2d(norm=True), (3, 12, 12), 1),
}


def net(name: str, seed: int = 0) -> tuple[nn.Module, shohin.Data, Program]:
    make, shape, _ = NETS[name]
    torch.manual_seed(seed)
    model = randomize(make(), seed)
    if isinstance(model, Vgg):
        with torch.no_grad():
            model.a.bias[:4] += 40  # type: ignore[index, union-attr]
            model.c.bias[2:6] += 60  # type: ignore[index]
    generator = torch.Generator().manual_seed(seed)
    data = shohin.Data(train=[torch.randn(80, *shape, generator=generator) for _ in range(4)])
    return model, data, capture(model, data.example())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_floats_compute_the_same(name: str, seed: int) -> None:
    _, data, program = net(name, seed)
    made, changed = equalized(program, quantizable(program), list(data.calls("train")))
    assert len(changed) == NETS[name][2]
    assert any(not torch.equal(made.tensors[n], t) for n, t in program.tensors.items())
    double = [ProgramModule(p).double().eval() for p in (program, made)]
    for call in data.calls("train"):
        x = call.args[0].double()
        with torch.no_grad():
            a, b = (module(x) for module in double)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def uneven(model: nn.Module, seed: int) -> None:
    """Scales channels against each other, in floats without effect."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.exp(2 * torch.randn(12, generator=generator)).reshape(-1, 1, 1, 1)
    assert isinstance(model, Chain) and model.a.bias is not None and model.b.bias is not None
    with torch.no_grad():
        model.a.weight *= s
        model.a.bias *= s.flatten()
        model.b.weight /= s


@pytest.mark.parametrize("seed", range(3))
def test_grids_become_more_exact_and_files_are_as_seen(seed: int, tmp_path: object) -> None:
    model, data, _ = net("chain", seed)
    uneven(model, seed)
    x = torch.cat(list(data.train))  # type: ignore[arg-type]
    errors = []
    for equalize in (False, True):
        found = shohin.quantize(model, data, "int8", equalize=equalize)
        assert found.view is not None and bool(found.notes["equalized"]) == equalize
        with torch.no_grad():
            errors.append(float((found.view(x) - model(x)).square().mean()))
    assert errors[1] < 0.6 * errors[0]
    made = shohin.export(found, data, path=f"{tmp_path}/m.onnx")
    assert made.notes["parity"]["departs"] == [] and made.artifact is not None
    assert found.model is not None
    with torch.no_grad():  # the user's own class holds the same values
        assert float((found.model(x) - model(x)).square().mean()) < 2 * errors[1] + 1e-6


def test_what_a_channel_always_exceeds_goes_to_the_next_bias() -> None:
    _, data, program = net("absorbing")
    made, _ = equalized(program, quantizable(program), list(data.calls("train")))
    before, after = (p.tensors["a.bias"] / p.tensors["a.weight"].flatten(1).norm(dim=1) for p in (program, made))
    assert bool((after[:4] < 0.5 * before[:4]).all())
    torch.testing.assert_close(after[4:], before[4:], rtol=1e-4, atol=1e-4)
    assert not torch.equal(made.tensors["bn.running_mean"], program.tensors["bn.running_mean"])
    assert not torch.equal(made.tensors["d.bias"], program.tensors["d.bias"])


def test_what_others_read_is_left_alone() -> None:
    for model, shape in ((Transformer(), (6, 32)), (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)), (3, 8, 8))):
        randomize(model, 0)
        data = shohin.Data(train=[torch.randn(4, *shape) for _ in range(2)])
        program = capture(model, data.example())
        made, changed = equalized(program, quantizable(program), list(data.calls("train")))
        assert changed == {} and made is program
    _, data, program = net("chain")
    first = quantizable(program)[0]
    made, changed = equalized(program, {first}, list(data.calls("train")))
    assert changed == {} and made is program


class Turned(nn.Module):
    """A mean over channels, or over rows of a picture, before a layer whose inputs happen to be as many."""

    def __init__(self, dim: int, reader: nn.Module) -> None:
        super().__init__()
        self.dim, self.conv, self.reader = dim, nn.Conv2d(3, 8, 3, padding=1), reader

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reader(F.relu(self.conv(x)).mean(self.dim))
        return out


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 4)), (3, 8, 8)),
        (nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(), nn.Linear(16, 4)), (16, 16)),
        (nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Conv1d(8, 4, 1)), (8, 16)),
        (Turned(1, nn.Linear(8, 4)), (3, 8, 8)),
        (Turned(2, nn.Linear(8, 4)), (3, 8, 8)),
        (Turned(1, nn.Conv1d(8, 4, 1)), (3, 8, 8)),
    ],
)
def test_other_axes_of_equal_length_are_no_channels(model: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, *shape)
    program = capture(model.eval(), x)
    made, changed = equalized(program, quantizable(program), list(shohin.Data(train=[x]).calls("train")))
    assert changed == {} and made is not None
    with torch.no_grad():
        torch.testing.assert_close(ProgramModule(made)(x), model(x))


def test_rare_channels_do_not_take_the_range_of_all_others() -> None:
    """A unit that fires in ten samples of 512; many that seldom do, of which new data show more; and few samples."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    many = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    x = torch.randn(512, 16)
    x[:, 0].clamp_(max=0.9)
    x[300:310, 0] = 3.0
    with torch.no_grad():
        one[0].weight[0], one[0].bias[0] = 0.0, -1.0
        one[0].weight[0, 0] = 1.0
        many[0].bias.copy_(torch.linspace(-2.2, 0.5, 64))
    new = torch.randn(1000, 16)
    for model, seen, asked in ((one, x, x), (many, torch.randn(512, 16), new), (many, torch.randn(16, 16), new)):
        errors = []
        for equalize in (False, True):
            view = shohin.quantize(model, shohin.Data(train=[seen]), equalize=equalize).view
            assert view is not None
            with torch.no_grad():
                errors.append(float((view(asked) - model(asked)).square().mean()))
        assert errors[1] < 1.1 * errors[0]


def test_constant_activations_are_no_trouble() -> None:
    for model, x in (
        (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(1, 16)),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.ones(32, 3, 4, 4)),
    ):
        view = shohin.quantize(model.eval(), shohin.Data(train=[x])).view
        assert view is not None
        with torch.no_grad():
            assert float((view(x) - model(x)).abs().max()) < 0.02 * float(model(x).abs().max())


def test_trained_and_planned_programs_go_on_from_it(tmp_path: object) -> None:
    model, data, _ = net("chain, norms")
    x = torch.cat(list(data.train))  # type: ignore[arg-type]
    with torch.no_grad():
        labels = model(x).argmax(1)
    pairs = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
    labelled = shohin.Data(train=pairs, validation=pairs)
    trained = shohin.quantize(model, labelled, "int8", recover="qat", epochs=1)
    kept = shohin.quantize(model, labelled, {"*": "w4a4"}, None, drop=0.2)
    planned = shohin.quantize(model, labelled, ("int8", "w4a8"), budget="size <= 90 %")
    for found in (trained, kept, planned):
        assert found.view is not None and found.model is not None
        with torch.no_grad():
            agree = (found.view(x).argmax(1) == labels).float().mean()
        assert float(agree) > 0.75
    assert trained.notes["equalized"] and kept.notes["equalized"]
