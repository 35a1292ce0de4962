"""Modules that break tools for structured pruning, each with what must be prunable in it and an oracle written by hand.

Those that are in `surgery_cases.CASES` already are not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_models as models
from surgery_cases import Case, Consumers, Index, at, block, image, load, same


class FlattenLast(nn.Module):
    """Flattens HWC: the channels of one place are neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 5, 3, 2, 1), nn.Linear(5 * 16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.elu(self.fc1(F.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))))


class Unshuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.PixelUnshuffle(2), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.down(self.a(x))))


class Packed(nn.Module):
    """One linear layer for queries, keys and values: two heads of four dims.

    Args:
        order: "literal" (the head count is a number in forward), "middle" (head x 3 x dim), "square" (3 x head x dim).
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.heads, self.dim, self.scale = order, 2, 4, 0.5
        self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.order == "literal":
            q, k, v = self.qkv(x).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.qkv(x).view(b, n, self.heads, 3, self.dim).permute(3, 0, 2, 1, 4).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x, x, x, need_weights=False)[0])))


class Grouped(nn.Module):
    """``heads`` queries share ``kv`` keys and values.

    Args:
        how: "gqa" (the operator's own switch), "repeat" (repeat_interleave), "expand" (one key and value for all heads).
    """

    def __init__(self, how: str, kv: int) -> None:
        super().__init__()
        self.how, self.heads, self.kv, self.dim, self.repeats = how, 4, kv, 3, 4 // kv
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 3 * kv), nn.Linear(6, 3 * kv), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (h, -1)).transpose(1, 2) for m, h in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv)))
        if self.how == "repeat":
            k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        if self.how == "expand":
            k, v = k.expand(-1, self.heads, -1, -1), v.expand(-1, self.heads, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "gqa")
        return self.o(out.transpose(1, 2).flatten(2))


class Rotary(nn.Module):
    """Queries and keys are turned in pairs of dims.

    Args:
        how: "half" (pair d, d + dim / 2), "pairs" (2 d, 2 d + 1 by a view), "strided" (the same by strided slices),
            "stored" ("half" with stored cosines and sines).
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.dim = how, 2, 6
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 4)
        inverse = 1.0 / 10 ** (torch.arange(3) / 3)
        if how == "stored":
            angles = torch.outer(torch.arange(16.0), torch.cat([inverse, inverse]))
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
        else:
            self.register_buffer("inv_freq", inverse)

    def turned(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        if self.how == "stored":
            first, second = x.chunk(2, -1)
            return x * self.cos[:n] + torch.cat([-second, first], -1) * self.sin[:n]
        angles = torch.arange(n, dtype=x.dtype)[:, None] * self.inv_freq[None]
        if self.how == "half":
            angles = torch.cat([angles, angles], -1)
            first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
        even, odd = (x[..., 0::2], x[..., 1::2]) if self.how == "strided" else x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Merging(nn.Module):
    """Four neighbours of a feature map become one, normalized and reduced."""

    def __init__(self, d: int = 6, wide: int = 5) -> None:
        super().__init__()
        self.a, self.n, self.merge, self.out = nn.Linear(3, d), nn.LayerNorm(4 * d), nn.Linear(4 * d, wide, bias=False), nn.Linear(wide, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.out(F.relu(self.merge(self.n(x)))).mean((1, 2))


class FusedGate(nn.Module):
    """SwiGLU with one matrix for gate and value, then a GLU of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.glu, self.out = nn.Linear(6, 18), nn.Linear(9, 5), nn.Linear(5, 14), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        x = self.down(F.silu(gate) * value)
        return self.out(F.glu(self.glu(x), -1))


class SlicedShortcut(nn.Module):
    """The shortcut is the first channels of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 5
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(torch.tanh(self.b(x) + x[:, : self.k]))


class PaddedShortcut(nn.Module):
    """He et al.'s option A: the shortcut skips every second place and gets zeros for the new channels."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = 2
        self.a, self.c1, self.c2, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.c2(F.relu(self.c1(x)))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra)))
        return self.fc(y.mean((2, 3)))


class PaddedChannels(nn.Module):
    """Channels of a constant on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(9, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.pad(F.relu(self.a(x)), (0, 0, 0, 0, 1, 2), value=0.5))


class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 2, 3
        self.q, self.k, self.v, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, self.heads, -1) for m in (self.q, self.k, self.v))
        scores = torch.einsum("bihd,bjhd->bhij", q * 0.6, k).softmax(-1)
        return self.o(torch.einsum("bhij,bjhd->bihd", scores, v).reshape(b, n, -1))


def standardized(weight: Tensor) -> Tensor:
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-4).sqrt()


class StandardConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardized(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardized(nn.Module):
    """Weight standardization; the middle one is depthwise."""

    def __init__(self, c: int = 6, e: int = 5) -> None:
        super().__init__()
        self.a, self.d = StandardConv(3, c, 3, padding=1), StandardConv(c, c, 3, padding=1, groups=c)
        self.b, self.out = StandardConv(c, e, 3, padding=1), nn.Conv2d(e, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(F.relu(self.d(F.relu(self.a(x)))))))


class WeightNormed(nn.Module):
    """``weight_norm`` as a parametrization or as the old hook."""

    def __init__(self, old: bool, c: int = 6, e: int = 5) -> None:
        super().__init__()
        norm: Any = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        self.a, self.b, self.out = norm(nn.Conv1d(2, c, 3, padding=1)), norm(nn.Conv1d(c, e, 3, padding=1)), nn.Conv1d(e, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


class Adapted(nn.Module):
    """A linear layer with an update of low rank."""

    def __init__(self, i: int, o: int, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.randn(o))
        self.B, self.A = nn.Parameter(torch.randn(o, rank)), nn.Parameter(torch.randn(rank, i))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.B @ self.A * 0.3, self.bias)


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Adapted(6, 8, 3), Adapted(8, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Configured(nn.Module):
    """Attention whose sizes are in an object that it shares with another."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        wide = config.heads * config.dim
        self.q, self.k, self.v, self.o = nn.Linear(6, wide), nn.Linear(6, wide), nn.Linear(6, wide), nn.Linear(wide, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, self.config.heads, self.config.dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        out = (q * 0.5 @ k.transpose(2, 3)).softmax(-1) @ v
        return self.o(out.transpose(1, 2).reshape(b, n, self.config.heads * self.config.dim))


class SharedConfig(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(heads=3, dim=4)
        self.one, self.two = Configured(config), Configured(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x + self.one(x))


class LinearAttention(nn.Module):
    """Keys meet values first."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = F.relu(q), F.relu(k)
        out = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2).unsqueeze(-1) + 1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class Selective(nn.Module):
    """A state-space scan: channels by states, an outer product in each step.

    Args:
        start: True to begin with zeros that forward makes.
    """

    def __init__(self, start: bool) -> None:
        super().__init__()
        self.start, self.d, self.n = start, 6, 4
        self.x, self.dt, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.B, self.C = nn.Linear(6, 4), nn.Linear(6, 4)
        self.A, self.D = nn.Parameter(torch.rand(6, 4)), nn.Parameter(torch.randn(6))

    def forward(self, u: Tensor) -> Tensor:
        x = F.silu(self.x(u))
        dt, b, c = F.softplus(self.dt(x)), self.B(x), self.C(x)
        decay = torch.exp(-dt.unsqueeze(-1) * self.A)
        add = (dt * x).unsqueeze(-1) * b.unsqueeze(-2)
        state = torch.zeros(u.shape[0], self.d, self.n, dtype=u.dtype) if self.start else add[:, 0]
        out = []
        for t in range(u.shape[1]):
            state = decay[:, t] * state + add[:, t]
            out.append((state * c[:, t].unsqueeze(-2)).sum(-1))
        return self.out(torch.stack(out, 1) + self.D * x)


class Mixer(nn.Module):
    """Layers along tokens and along channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.t1, self.t2, self.c1, self.c2 = nn.Linear(4, 7), nn.Linear(7, 4), nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.t2(F.gelu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(x)))
        return self.head(x.mean(1))


class RelativeBias(nn.Module):
    """A learned bias for each head and relative place, read through a constant index."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 3, 2
        self.q, self.k, self.v, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(7, 3))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4)[None] + 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, self.heads, self.dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = (q * 0.7) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


class Folded(nn.Module):
    """Windows become columns, are mixed, and become an image again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.out = nn.Conv2d(3, 4, 1), nn.Conv1d(16, 8, 1), nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mix(F.unfold(self.a(x), 2, stride=2)))
        return self.out(F.fold(x, (8, 8), 2, stride=2))


@torch.library.custom_op("torture::warp", mutates_args=())
def warp(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1)


@warp.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


warp.register_autograd(lambda context, grad: grad.flip(1).cumsum(1))


class Custom(nn.Module):
    """An operator that nobody knows between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.torture.warp(self.b(F.relu(self.a(x))))
        return self.d(F.relu(self.c(x)))


Kept = Mapping[str, tuple[int, ...]]


def small_merging(model: nn.Module, kept: Kept) -> nn.Module:
    a, wide = kept["a.weight"], kept["merge.weight"]
    four = [6 * k + i for k in range(4) for i in a]
    take = {"a.weight": {0: a}, "a.bias": {0: a}, "n.weight": {0: four}, "n.bias": {0: four}}
    return load(Merging(len(a), len(wide)), model, take | {"merge.weight": {0: wide, 1: four}, "out.weight": {1: wide}})


def small_standardized(model: nn.Module, kept: Kept) -> nn.Module:
    c, e = kept["b.weight"], kept["b.weight#2"]
    take: dict[str, Mapping[int, Sequence[int]]] = {n: {0: c} for n in ("a.weight", "a.bias", "d.weight", "d.bias")}
    return load(Standardized(len(c), len(e)), model, take | {"b.weight": {0: e, 1: c}, "b.bias": {0: e}, "out.weight": {1: e}})


def small_weight_norm(old: bool) -> Callable[[nn.Module, Kept], nn.Module]:
    scale, weight = ("weight_g", "weight_v") if old else ("parametrizations.weight.original0", "parametrizations.weight.original1")

    def build(model: nn.Module, kept: Kept) -> nn.Module:
        c, e = kept[f"b.{weight}"], kept[f"b.{weight}#2"]
        take: dict[str, Mapping[int, Sequence[int]]] = {f"a.{n}": {0: c} for n in (scale, weight, "bias")}
        take |= {f"b.{scale}": {0: e}, "b.bias": {0: e}, f"b.{weight}": {0: e, 1: c}, "out.weight": {1: e}}
        return load(WeightNormed(old, len(c), len(e)), model, take)

    return build


def heads_of(heads: int, dim: int) -> tuple[Index, Index]:
    """(places of a head, places of "dim d of every head") in an axis of head x dim."""
    return block(dim), lambda d: [h * dim + d for h in range(heads)]


def separate(q: str, heads: int, dim: int, values: int | None = None, o: str = "o", v: str = "v") -> Consumers:
    """Consumers in attention with a layer each for q, k and v: a head and a value dim are read by ``o``; a query dim adds to scores."""
    head, dims = heads_of(heads, values or dim)
    of_query = heads_of(heads, dim)[1]
    return {
        f"{q}.weight": [(f"{o}.weight", 1, head)],
        f"{q}.weight#2": [(f"{q}.weight", 0, of_query), (f"{q}.bias", 0, of_query)],
        f"{v}.weight": [(f"{o}.weight", 1, dims)],
    }


def packed(qkv: str, proj: str, queries: Index, weight: str = "weight", bias: str = "bias") -> Consumers:
    """Two heads of four dims; q, k and v lose the same dims."""
    head, dims = heads_of(2, 4)
    name = f"{qkv}{weight}"
    return {
        name: [(f"{proj}.weight", 1, head)],
        f"{name}#2": [(f"{proj}.weight", 1, dims), (name, 0, queries), (f"{qkv}{bias}", 0, queries)],
    }


def config_consumers() -> Consumers:
    out: dict[str, Any] = {}
    for part in ("one", "two"):
        out |= separate(f"{part}.q", 3, 4, o=f"{part}.o", v=f"{part}.v")
    return out


PAIRS: dict[str, Index] = {"half": at(0, 3, 6, 9), "pairs": lambda i: [2 * i, 2 * i + 1, 6 + 2 * i, 7 + 2 * i]}
PAIRS |= {"stored": PAIRS["half"], "strided": PAIRS["pairs"]}


def rotary(how: str) -> Case:
    consumers = {**separate("q", 2, 6), "q.weight#2": [("q.weight", 0, PAIRS[how]), ("q.bias", 0, PAIRS[how])]}
    return Case(lambda: Rotary(how), image(5, 6), {"q.weight": 2, "q.weight#2": 3, "v.weight": 6}, consumers, form="any")


def queries_of(heads: int, kv: int, how: str) -> Case:
    group = heads // kv
    consumers: Consumers = {**separate("q", heads, 3), "q.weight": [("o.weight", 1, block(3 * group if kv > 1 else 3))]}
    return Case(lambda: Grouped(how, kv), image(5, 6), {"q.weight": kv if kv > 1 else heads, "q.weight#2": 3, "v.weight": 3}, consumers)


ATTENTION = {"q.weight": 2, "q.weight#2": 3, "v.weight": 3}
TORTURE: dict[str, Case] = {
    "flatten HWC": Case(
        FlattenLast,
        image(3, 8, 8),
        {"conv.weight": 5, "fc1.weight": 6},
        {"conv.weight": [("fc1.weight", 1, lambda i: [i + 5 * k for k in range(16)])], "fc1.weight": [("fc2.weight", 1, same)]},
    ),
    "pixel unshuffle": Case(Unshuffle, image(3, 4, 4), {"a.weight": 4}, {"a.weight": [("b.weight", 1, block(4))]}),
    "packed, literal heads": Case(
        lambda: Packed("literal"),
        image(5, 6),
        {"qkv.weight": 2, "qkv.weight#2": 4},
        packed("qkv.", "proj", lambda d: [d, 4 + d]),
        form="any",
    ),
    "packed, 3 in the middle": Case(
        lambda: Packed("middle"), image(5, 6), {"qkv.weight": 2, "qkv.weight#2": 4}, packed("qkv.", "proj", lambda d: [d, 12 + d])
    ),
    "multi-head attention": Case(
        Multihead,
        image(5, 8),
        {"a.in_proj_weight": 2, "a.in_proj_weight#2": 4, "a.out_proj.weight": 8, "b.weight": 6},
        {
            **packed("a.", "a.out_proj", lambda d: [d, 4 + d], "in_proj_weight", "in_proj_bias"),
            "a.out_proj.weight": [("b.weight", 1, same)],
            "b.weight": [("c.weight", 1, same)],
        },
    ),
    "grouped queries by enable_gqa": queries_of(4, 2, "gqa"),
    "grouped queries by repeat": queries_of(4, 2, "repeat"),
    "multi-query by expand": queries_of(4, 1, "expand"),
    "multi-query by broadcast": queries_of(4, 1, "broadcast"),
    "rotary by halves": rotary("half"),
    "rotary by pairs": rotary("pairs"),
    "rotary by strides": rotary("strided"),
    "rotary, stored angles": rotary("stored"),
    "patch merging": Case(Merging, image(4, 4, 3), {"a.weight": 6, "merge.weight": 5}, small=small_merging),
    "fused gates": Case(
        FusedGate,
        image(6),
        {"up.weight": 9, "down.weight": 5, "glu.weight": 7},
        {"up.weight": [("down.weight", 1, same)], "down.weight": [("glu.weight", 1, same)], "glu.weight": [("out.weight", 1, same)]},
    ),
    "recurrent between convolutions": Case(
        models.Recurrent,
        image(2, 6),
        {"a.weight": 6, "lstm.weight_ih_l0": 5, "b.weight": 7},
        {
            "a.weight": [("lstm.weight_ih_l0", 1, same)],
            "lstm.weight_ih_l0": [("lstm.weight_hh_l0", 1, same), ("b.weight", 1, same)],
            "b.weight": [("c.weight", 1, same)],
        },
    ),
    "sliced shortcut": Case(
        SlicedShortcut,
        image(3, 4, 4),
        {"a.weight": 5, "a.weight#2": 3},
        {"a.weight": [("b.weight", 1, same), ("c.weight", 1, same)], "a.weight#2": [("b.weight", 1, at(5))]},
        form="any",
    ),
    "padded shortcut": Case(
        PaddedShortcut,
        image(3, 8, 8),
        {"a.weight": 4, "c1.weight": 6, "c2.weight": 4},
        {
            "a.weight": [("c1.weight", 1, same), ("fc.weight", 1, at(2))],
            "c1.weight": [("c2.weight", 1, same)],
            "c2.weight": [("fc.weight", 1, lambda i: [[0, 1, 6, 7][i]])],
        },
        form="any",
    ),
    "padded channels": Case(
        PaddedChannels,
        image(3, 4, 4),
        {"a.weight": 6, "b.weight": 3},  # the constant channels too: columns that they take of a weight
        {"a.weight": [("b.weight", 1, at(1))], "b.weight": [("b.weight", 1, lambda i: [[0, 7, 8][i]])]},
        form="any",
    ),
    "einsum attention": Case(EinsumAttention, image(5, 6), ATTENTION, separate("q", 2, 3)),
    "weight standardization": Case(Standardized, image(3, 5, 5), {"b.weight": 6, "b.weight#2": 5}, small=small_standardized),
    "weight norm": Case(
        lambda: WeightNormed(False),
        image(2, 5),
        {"b.parametrizations.weight.original1": 6, "b.parametrizations.weight.original1#2": 5},
        small=small_weight_norm(False),
    ),
    "weight norm by hook": Case(
        lambda: WeightNormed(True), image(2, 5), {"b.weight_v": 6, "b.weight_v#2": 5}, small=small_weight_norm(True)
    ),
    "low rank": Case(
        LoRA,
        image(6),
        {"a.weight": 8, "a.B": 3, "b.A": 2},
        {
            "a.weight": [("b.weight", 1, same), ("b.A", 1, same)],
            "a.B": [("a.B", 1, same)],
            "b.A": [("b.B", 1, same)],
        },
    ),
    "shared config": Case(
        SharedConfig,
        image(5, 6),
        {f"{p}.{n}": s for p in ("one", "two") for n, s in (("q.weight", 3), ("q.weight#2", 4), ("v.weight", 4))},
        config_consumers(),
        form="any",
    ),
    "linear attention": Case(LinearAttention, image(5, 6), {**ATTENTION, "v.weight": 4}, separate("q", 2, 3, 4)),
    "selective scan": Case(
        lambda: Selective(False),
        image(4, 5),
        {"x.weight": 6, "B.weight": 4},
        {
            "x.weight": [(f"{n}.weight", 1, same) for n in ("dt", "B", "C", "out")],
            "B.weight": [("C.weight", 0, same), ("C.bias", 0, same)],
        },
    ),
    "selective scan from zeros": Case(
        lambda: Selective(True),
        image(4, 5),
        {"x.weight": 6, "B.weight": 4},
        {
            "x.weight": [(f"{n}.weight", 1, same) for n in ("dt", "B", "C", "out")],
            "B.weight": [("C.weight", 0, same), ("C.bias", 0, same)],
        },
        form="any",
    ),
    "mixer": Case(
        Mixer,
        image(3, 8, 8),
        {"patch.weight": 8, "t1.weight": 7, "c1.weight": 10},
        {
            "patch.weight": [("c1.weight", 1, same), ("head.weight", 1, same)],
            "t1.weight": [("t2.weight", 1, same)],
            "c1.weight": [("c2.weight", 1, same)],
        },
    ),
    "relative bias": Case(RelativeBias, image(4, 6), {"q.weight": 3, "q.weight#2": 2, "v.weight": 2}, separate("q", 3, 2), form="any"),
    "unfold and fold": Case(
        Folded,
        image(3, 8, 8),
        {"a.weight": 4, "mix.weight": 2},
        {"a.weight": [("mix.weight", 1, block(4))], "mix.weight": [("out.weight", 1, same)]},
    ),
    "custom operator": Case(
        Custom, image(6), {"a.weight": 8, "c.weight": 7}, {"a.weight": [("b.weight", 1, same)], "c.weight": [("d.weight", 1, same)]}
    ),
}
