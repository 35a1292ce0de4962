"""Rotations of channels: the network computes the same, channels that stand out no longer do, and what cannot be rotated is left alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shohin
from shohin.program import Program, ProgramModule, capture
from shohin.quantization import quantizable, rotated, rotation

WORDS, WIDTH = 50, 24
IDS = torch.randint(0, WORDS, (4, 9), generator=torch.Generator().manual_seed(0))
PHOTO = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Rms(nn.Module):
    """Written out, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """Two layers of a language model: attention whose heads share values, a gated feed-forward layer."""

    def __init__(
        self, norm: Callable[[], nn.Module] = lambda: nn.RMSNorm(WIDTH, eps=1e-6), *, tied: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.norms = nn.ModuleList(norm() for _ in range(5))
        self.q, self.o = (nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias) for _ in range(2)) for _ in range(2))
        self.k, self.v = (nn.ModuleList(nn.Linear(WIDTH, WIDTH // 3, bias) for _ in range(2)) for _ in range(2))
        self.gate, self.up = (nn.ModuleList(nn.Linear(WIDTH, 40, bias) for _ in range(2)) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(40, WIDTH, bias) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        b, t, _ = x.shape
        for i in range(2):
            y = self.norms[2 * i](x)
            q = self.q[i](y).view(b, t, 3, 8).transpose(1, 2)
            k, v = (layers[i](y).view(b, t, 1, 8).transpose(1, 2).repeat_interleave(3, 1) for layers in (self.k, self.v))
            x = x + self.o[i](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, WIDTH))
            y = self.norms[2 * i + 1](x)
            x = x + self.down[i](F.silu(self.gate[i](y)) * self.up[i](y))
        return self.head(self.norms[4](x))


class Vision(nn.Module):
    """Patches by a convolution, a token for the class, positions, layer normalization before attention."""

    def __init__(self, *, first: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 17, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 3, 40, norm_first=first, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.places
        return self.head(self.body(x)[:, 0])


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose gains and shifts are not trivial, and whose embedding has channels that stand out."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.RMSNorm, nn.LayerNorm, Rms)):
                for parameter in module.parameters():
                    parameter.add_(0.3 * torch.randn(WIDTH))
            if isinstance(module, nn.Embedding):
                module.weight[:, 3] *= 30
    return model


def turn(program: Program, layers: Collection[str] | None = None, seed: int = 0) -> tuple[Program, tuple[str, ...]]:
    found = rotated(program, quantizable(program) if layers is None else layers, seed)
    return found.program, found.layers


def decibels(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum().clamp_min(1e-30)))


def answer(program: Program, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = ProgramModule(program)(*inputs)
    return found


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "decoder": (Decoder, IDS, 16),
    "decoder, biases": (lambda: Decoder(bias=True), IDS, 16),
    "decoder, tied": (lambda: Decoder(tied=True), IDS, 16),
    "decoder, norms written out": (lambda: Decoder(Rms), IDS, 16),
    "decoder, layer norms": (lambda: Decoder(lambda: nn.LayerNorm(WIDTH)), IDS, 16),
    "decoder, norms without gains": (lambda: Decoder(lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)), IDS, 16),
    "vision": (Vision, PHOTO, 10),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rotated_network_computes_the_same(name: str) -> None:
    build, x, count = CASES[name]
    program = capture(made(build), (x,))
    turned, layers = turn(program)
    assert len(layers) == count
    assert decibels(answer(turned, x), answer(program, x)) > 110
    changed = [n for n, t in turned.tensors.items() if t.dim() > 1 and not torch.equal(t, program.tensors[n])]
    assert len(changed) >= count


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 200), seed=st.integers(0, 5), centred=st.booleans())
def test_rotations_are_orthogonal_and_spread_every_channel(size: int, seed: int, centred: bool) -> None:
    q = rotation(size, seed, centred=centred)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-9, rtol=0)
    if centred:
        torch.testing.assert_close(q.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-9, rtol=0)
    else:
        assert float(q.abs().max()) <= (2 / size) ** 0.5 + 1e-9


def test_channels_that_stand_out_no_longer_do() -> None:
    model = made(Decoder)
    program = capture(model, (IDS,))
    turned, _ = turn(program)

    def peak(at: Program) -> float:
        table = at.tensors["embedding.weight"].detach()
        return float((table.abs().amax(0) / table.square().mean().sqrt()).max())

    assert peak(turned) < 0.5 * peak(program)


class Around(nn.Module):
    """A stream with something of a test's own in the middle, and a layer that writes what it reads."""

    def __init__(self, width: int = WIDTH, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.a, self.norm, self.own = nn.Embedding(WORDS, width), norm(width), nn.Linear(width, width)
        self.last, self.head = norm(width), nn.Linear(width, 7)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.middle(self.a(ids))
        x = x + self.own(self.norm(x))
        found: Tensor = self.head(self.last(x))
        return found


class Constant(Around):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.places = torch.randn(1, 9, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.places


class Buffered(Around):
    """Places that checkpoints lack."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(1, 9, WIDTH), persistent=False)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.places


class Whole(Around):
    """A cast that rounds."""

    def middle(self, x: Tensor) -> Tensor:
        return (x * 4).to(torch.int32).float() / 4


class Mixed(nn.Module):
    """A learned mixture: a product without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.share = nn.Linear(WIDTH, 16), nn.Linear(16, 4), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.relu(self.a(x))) * (torch.softmax(self.share, 0) @ self.share) * self.share[0].pow(2).mean(-1)
        return found


class Crossed(nn.Module):
    """One weight that only reads the stream at one place, and only writes it at another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.own, self.head = (
            nn.Embedding(WORDS, WIDTH),
            nn.RMSNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH, False),
            nn.Linear(WIDTH, 7),
        )
        self.last = nn.RMSNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.a(ids)
        x = x + self.own(torch.tanh(self.own(self.norm(x))))
        found: Tensor = self.head(self.last(x))
        return found


def test_a_layer_that_writes_what_it_reads_is_turned_along_both_axes() -> None:
    program = capture(made(Around), (IDS,))
    turned, layers = turn(program)
    assert set(layers) == {"a/embedding.0", "own/linear.0", "head/linear.0"}
    assert decibels(answer(turned, IDS), answer(program, IDS)) > 110


def test_wide_streams_in_half_precision() -> None:
    class Half(nn.Module):
        """Root mean square in floats, as language models have it."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(width) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = x.to(torch.float32)
            return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    program = capture(Around(320, Half).bfloat16().eval(), (IDS,))
    turned, layers = turn(program)
    assert len(layers) == 3
    assert decibels(answer(turned, IDS).float(), answer(program, IDS).float()) > 25


def test_other_names_of_a_weight_go_with_it() -> None:
    model = made(Decoder)
    model.spare = nn.Linear(WIDTH, 8, bias=False)
    model.spare.weight = model.v[0].weight  # type: ignore[index, union-attr]
    program = capture(model, (IDS,))
    turned, _ = turn(program)
    assert turned.tensors["spare.weight"] is turned.tensors["v.0.weight"]
    found = shohin.quantize(model, shohin.Data(train=[(IDS,)]), "w8a8")
    assert found.model is not None and found.model.spare.weight is found.model.v[0].weight  # type: ignore[index, union-attr]


class Told(nn.Module):
    """A decoder's first half that also gives its stream back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(ids)
        return self.b(self.norm(x)), x


class Shared(nn.Module):
    """One weight that reads the stream behind two gains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.first, self.second, self.b = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.a(ids)
        return self.b(self.first(x)) * torch.sigmoid(self.b(self.second(x)))


class Curved(nn.Module):
    """Something that is not linear between the layers of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.norm(torch.tanh(self.a(ids))))


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (Told, IDS),
        (Shared, IDS),
        (Curved, IDS),
        (Constant, IDS),
        (Buffered, IDS),
        (Whole, IDS),
        (Crossed, IDS),
        (Mixed, torch.randn(4, WIDTH)),
        (lambda: Vision(first=False), PHOTO),  # what is normalized goes on in the stream
        (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)), torch.randn(4, WIDTH)),  # the caller's channels
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4, 8)),
    ],
)
def test_what_cannot_be_rotated_is_left_alone(build: Callable[[], nn.Module], x: Tensor) -> None:
    program = capture(made(build), (x,))
    turned, layers = turn(program)
    assert turned is program and layers == ()


def test_sparse_weights_and_silenced_channels_keep_their_channels() -> None:
    pruned = made(Decoder)
    with torch.no_grad():
        for layer in (*pruned.v, *pruned.up):  # type: ignore[misc]
            layer.weight[:, ::2] = 0  # type: ignore[index, operator]
    program = capture(pruned, (IDS,))
    assert turn(program)[1] == ()
    for channels in (slice(5, 6), slice(None)):
        silent = made(Vision)
        with torch.no_grad():
            silent.body.norm.weight[channels] = 0.0  # type: ignore[union-attr, index, operator]
        program = capture(silent, (PHOTO,))
        assert turn(program)[1] == ()


def test_streams_that_no_rounded_layer_touches_stay_as_they_are() -> None:
    program = capture(made(Decoder), (IDS,))
    turned, layers = turn(program, {"o.1/linear.0"})
    assert "gate.0/linear.0" in layers and "o.0/linear.0" in layers
    assert torch.equal(turned.tensors["v.0.weight"].norm(dim=0) > 0, program.tensors["v.0.weight"].norm(dim=0) > 0)
    assert turn(program, set()) == (program, ())


def test_seeds_decide(seeds: Any = (0, 0, 1)) -> None:
    program = capture(made(Decoder), (IDS,))
    one, same, other = (turn(program, seed=seed)[0].tensors["head.weight"] for seed in seeds)
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("tied", [False, True])
def test_rotated_integers_are_exported_and_the_model_holds_their_values(tied: bool, tmp_path: Any) -> None:
    """Channels that stand out: codes of the whole tensor are far more exact once they are mixed; the file, the model and the view agree."""
    model = made(lambda: Decoder(tied=tied))
    data = shohin.Data(train=[(IDS,), (IDS.flip(1),)])
    errors = {}
    with torch.no_grad():
        wanted = model(IDS)
    for rotate in (False, True):
        found = shohin.quantize(model, data, "int8", rotate=rotate, smoothing=False)
        assert found.view is not None and found.model is not None
        with torch.no_grad():
            errors[rotate] = decibels(found.view(IDS), wanted)
            assert decibels(found.model(IDS), wanted) > 20
        assert bool(found.notes["rotated"]) == rotate
    assert errors[True] > errors[False] + 3
    path = tmp_path / "rotated.onnx"
    shohin.export(found, data, "onnxruntime", path)
    assert decibels(shohin.Target("onnxruntime").runner(path)(IDS), found.view(IDS)) > 30  # type: ignore[misc]
