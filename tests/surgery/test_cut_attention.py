"""`torch.nn.MultiheadAttention`: the drop-in class equals it, and cuts of heads and head dims stay in the user's class."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from shohin.data import Call
from shohin.errors import ModelError
from shohin.plan import Plan
from shohin.surgery import cut, understand, view
from shohin.surgery.classes.multihead import MultiheadAttention, as_independent
from surgery_checks import answers, close

MASKS = ("none", "bool", "float", "heads")


def attention(seed: int, **options: object) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(8, 2, **options).double()  # type: ignore[arg-type]
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def masked(kind: str, heads: int, batch: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "bool":
        mask = torch.rand(5, 7) > 0.6
        mask[:, 0] = False
        return mask
    return torch.randn(5, 7).double() if kind == "float" else torch.randn(batch * heads, 5, 7).double()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("wide", [True, False], ids=["kdim", "packed"])
def test_equals_torch(mask: str, batch_first: bool, wide: bool) -> None:
    for seed, (bias, extra, zero, weights, average, padded) in enumerate(itertools.product([False, True], repeat=6)):
        widths = {"kdim": 6, "vdim": 10} if wide else {}
        one = attention(seed, bias=bias, add_bias_kv=extra, add_zero_attn=zero, batch_first=batch_first, **widths)
        other = as_independent(one, 2, 4, 4, 0.5)
        q, k, v = torch.randn(3, 5, 8).double(), torch.randn(3, 7, 6 if wide else 8).double(), torch.randn(3, 7, 10 if wide else 8).double()
        if not batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        padding = None
        if padded:
            padding = torch.rand(3, 7) > 0.6
            padding[:, 0] = False
        options = {"key_padding_mask": padding, "attn_mask": masked(mask, 2, 3), "need_weights": weights, "average_attn_weights": average}
        wanted, got = one(q, k, v, **options), other(q, k, v, **options)
        assert (wanted[1] is None) == (got[1] is None)
        close([g for g in got if g is not None], [w for w in wanted if w is not None], (bias, extra, zero, weights, average, padded))


@pytest.mark.parametrize("batch_first", [True, False])
def test_equals_torch_without_a_batch_and_with_one_tensor(batch_first: bool) -> None:
    one = attention(0, batch_first=batch_first)
    other = as_independent(one, 2, 4, 4, 0.5)
    for x in (torch.randn(5, 8).double(), torch.randn(5, 5, 8).double()):
        for weights in (True, False):
            wanted, got = one(x, x, x, need_weights=weights), other(x, x, x, need_weights=weights)
            close([t for t in got if t is not None], [t for t in wanted if t is not None], weights)
    causal = nn.Transformer.generate_square_subsequent_mask(5).double()
    for weights in (True, False):
        wanted = one(x, x, x, attn_mask=causal, is_causal=True, need_weights=weights)
        got = other(x, x, x, attn_mask=causal, is_causal=True, need_weights=weights)
        close([got[0]], [wanted[0]], weights)
    with pytest.raises(ModelError):
        other(x, x, x, is_causal=True)


def test_dropout_in_training_mode() -> None:
    """Without dropout training equals torch's; with it, the same draws fall on the same scores."""
    for rate, weights in ((0.0, True), (0.0, False), (0.5, True)):
        one = attention(1, dropout=rate, batch_first=True).train()
        other = as_independent(one, 2, 4, 4, 0.5)
        assert other.training
        x = torch.randn(3, 6, 8).double()
        torch.manual_seed(3)
        wanted = one(x, x, x, need_weights=weights)[0]
        torch.manual_seed(3)
        close([other(x, x, x, need_weights=weights)[0]], [wanted], rate)
        if rate:
            assert not torch.equal(other(x, x, x)[0], other(x, x, x)[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}, {"add_bias_kv": True}])
def test_the_state_has_torchs_names_and_layout(options: dict[str, object]) -> None:
    one = attention(0, **options)
    other = MultiheadAttention(8, 2, **options).double()  # type: ignore[arg-type]
    assert {n: t.shape for n, t in other.state_dict().items()} == {n: t.shape for n, t in one.state_dict().items()}
    other.load_state_dict(one.state_dict())
    q, k, v = torch.randn(5, 3, 8).double(), torch.randn(7, 3, one.kdim).double(), torch.randn(7, 3, one.vdim).double()
    close([other(q, k, v)[0]], [one(q, k, v)[0]], options)


def test_head_dims_are_free() -> None:
    module = MultiheadAttention(8, 3, qk_dim=2, v_dim=5, batch_first=True)
    assert module.in_proj_weight is not None and module.in_proj_weight.shape == (27, 8) and module.out_proj.weight.shape == (8, 15)
    x = torch.randn(2, 4, 8)
    out, scores = module(x, x, x)
    assert out.shape == (2, 4, 8) and scores is not None and scores.shape == (2, 4, 4)
    assert "3 heads" in repr(module)


class SelfAttention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.a, self.attn, self.b = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x + self.attn(x, x, x, need_weights=self.weights)[0])


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(5, 12), nn.Linear(16, 3)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True, kdim=12, vdim=12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.a(x), self.b(y)
        return self.c(x + self.attn(x, y, y, need_weights=False)[0])


class Encoder(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=first, dropout=0.0)
        self.a, self.encoder, self.b = nn.Linear(6, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.encoder(self.a(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
        self.a, self.b, self.decoder, self.c = nn.Linear(6, 16), nn.Linear(5, 16), nn.TransformerDecoder(layer, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(self.decoder(self.a(x), self.b(y)))


CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
torch.manual_seed(0)
for _name, _model, _widths in (
    ("self", SelfAttention(False), (6,)),
    ("self with weights", SelfAttention(True), (6,)),
    ("cross", CrossAttention(), (6, 5)),
    ("encoder", Encoder(False), (6,)),
    ("encoder, norm first", Encoder(True), (6,)),
    ("decoder", Decoder(), (6, 5)),
):
    CASES[_name] = _model.double().eval(), tuple(torch.randn(2, 4 + i, w).double() for i, w in enumerate(_widths))


@pytest.mark.parametrize("name", CASES)
def test_cuts_come_back_in_the_users_class(name: str) -> None:
    model, inputs = CASES[name]
    graph = understand(model, inputs)
    call = Call(inputs, {}, None, None)
    for seed in range(4):
        r = random.Random(seed)
        widths = {g.name: tuple(sorted(r.sample(range(g.size), r.randint(1, g.size)))) for g in graph.groups}
        plan = Plan(graph.program.fingerprint, widths)
        made = cut(model, graph, plan)
        assert made.form == "module" and not made.parts and type(made.model) is type(model), made.reason
        assert made.proof.holds
        with torch.no_grad():
            close(answers_without_gradients(made.model, inputs), answers_without_gradients(view(graph, plan), inputs), widths)
        close(answers(made.model, call), answers(view(graph, plan), call), widths)
        assert {n for n, _ in made.model.named_parameters()} == {n for n, _ in model.named_parameters()}


def answers_without_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    out = model(*inputs)
    return [out] if isinstance(out, Tensor) else list(out)


def test_torchs_class_stays_where_it_can_hold_the_sizes() -> None:
    model, inputs = CASES["self"]
    graph = understand(model, inputs)
    heads = next(g for g in graph.groups if g.size == 4)
    stream = graph.group("a.weight")
    whole = cut(model, graph, Plan(graph.program.fingerprint, {heads.name: (0, 2), stream.name: tuple(range(0, 16, 2))}))
    assert type(whole.model.attn) is nn.MultiheadAttention
    assert (whole.model.attn.num_heads, whole.model.attn.embed_dim, whole.model.attn.head_dim) == (2, 8, 4)
    fewer = cut(model, graph, Plan(graph.program.fingerprint, {heads.name: (0, 2)}))
    assert type(fewer.model.attn) is MultiheadAttention and isinstance(fewer.model.attn, nn.MultiheadAttention)
    assert (fewer.model.attn.num_heads, fewer.model.attn.embed_dim, fewer.model.attn.qk_dim) == (2, 16, 4)


def test_a_cut_can_be_cut_again() -> None:
    model, inputs = CASES["encoder"]
    graph = understand(model, inputs)
    first = Plan(graph.program.fingerprint, {g.name: tuple(range(1, g.size, 2)) for g in graph.groups})
    made = cut(model, graph, first)
    narrow = understand(made.model, inputs)
    assert {g: len(k) for g, k in first.widths.items()}.items() <= narrow.sizes.items()
    second = Plan(narrow.program.fingerprint, {g: tuple(range(max(1, n // 2))) for g, n in narrow.sizes.items() if g in first.widths})
    again = cut(made.model, narrow, second)
    assert again.form == "module" and again.proof.holds
    call = Call(inputs, {}, None, None)
    close(answers(again.model, call), answers(view(graph, first.then(second)), call), (first, second))


def test_hooks_survive_the_swap() -> None:
    torch.manual_seed(0)
    model, x = SelfAttention(False).double().eval(), torch.randn(2, 4, 6).double()
    graph = understand(model, (x,))
    seen = []
    model.attn.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    heads = next(g for g in graph.groups if g.size == 4)
    made = cut(model, graph, Plan(graph.program.fingerprint, {heads.name: (1,)}))
    seen.clear()
    made.model(x)
    assert seen == [MultiheadAttention]
