"""Test models with what must be prunable in them, written by hand: an oracle that shares nothing with the library.

Two kinds of oracle. `Zero`: the original, with the slices that *consume* a removed unit set to zero. `Small`: a smaller
model of the same class whose tensors are index-selected by hand, for models that normalize over a cut axis or whose scores
would change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import small_models as models
from shohin.data import Call

Index = Callable[[int], Sequence[int]]
Kept = Mapping[str, tuple[int, ...]]


def same(i: int) -> list[int]:
    return [i]


def at(*offsets: int, step: int = 1) -> Index:
    """Unit i at ``offset + step * i``."""
    return lambda i: [o + step * i for o in offsets]


def block(n: int) -> Index:
    return lambda i: list(range(n * i, n * i + n))


Consumers = Mapping[str, Sequence[tuple[str, int, Index]]]


@dataclass(frozen=True)
class Case:
    """A model, its inputs, the sizes of its groups, and the oracle.

    Args:
        sizes: every group that must be found: name -> number of units.
        consumers: for the zero oracle: group -> (parameter, axis, unit -> indices).
        small: for the index-selected oracle: (original, kept units by group, all groups included) -> smaller model.
        form: the form that every cut must have.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    sizes: Mapping[str, int]
    consumers: Consumers = field(default_factory=dict)
    small: Callable[[nn.Module, Kept], nn.Module] | None = None
    form: str = "module"

    def model(self) -> nn.Module:
        torch.manual_seed(7)
        return models.lively(self.build())

    def call(self, batch: int, seed: int) -> Call:
        """One call in float64."""
        made = self.inputs(batch, torch.Generator().manual_seed(seed))
        return made if isinstance(made, Call) else Call(tuple(made), {}, None, None)

    def oracle(self, model: nn.Module, kept: Kept) -> nn.Module:
        """The original with consuming slices at zero, or the hand-made smaller model."""
        if self.small is not None:
            return self.small(model, kept)
        zeroed = copy.deepcopy(model)
        tensors = dict(zeroed.named_parameters(remove_duplicate=False))
        for group, places in self.consumers.items():
            for unit in set(range(self.sizes[group])) - set(kept[group]):
                for name, axis, index in places:
                    with torch.no_grad():
                        tensors[name].index_fill_(axis, torch.tensor(index(unit)), 0.0)
        return zeroed


def image(*shape: int) -> Callable[[int, torch.Generator], Any]:
    return lambda batch, g: (torch.randn(batch, *shape, generator=g, dtype=torch.float64),)


def tokens(batch: int, g: torch.Generator) -> Any:
    return (torch.randint(0, 11, (batch, 5), generator=g),)


def named(batch: int, g: torch.Generator) -> Call:
    left, right = (torch.randn(batch, n, generator=g, dtype=torch.float64) for n in (6, 4))
    return Call((), {"left": left, "other": {"right": right}}, None, None)


def load(small: nn.Module, model: nn.Module, take: Mapping[str, Mapping[int, Sequence[int]]]) -> nn.Module:
    """Fills a smaller model with index-selected tensors of the original."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for axis, indices in take.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.tensor(list(indices)))
        state[name] = tensor
    small = small.double().eval()
    small.load_state_dict(state)
    return small


def spread(kept: Sequence[int], index: Index) -> list[int]:
    return [i for unit in kept for i in index(unit)]


def small_vit(style: str, names: Mapping[str, str], heads: int = 3, dim: int = 4, d: int = 12) -> Callable[[nn.Module, Kept], nn.Module]:
    """``names``: stream, hidden, heads, dims, values (group of the value dims, "" if tied to the query dims) -> group name."""

    def build(model: nn.Module, kept: Kept) -> nn.Module:
        s, h = kept[names["stream"]], kept[names["hidden"]]
        hs, qk = kept.get(names.get("heads", ""), range(heads)), kept.get(names.get("dims", ""), range(dim))
        v = kept.get(names.get("values", ""), qk)
        rows = {"q": qk, "k": qk, "v": v}
        flat = {part: [a * dim + b for a in hs for b in dims] for part, dims in rows.items()}
        take: dict[str, Mapping[int, Sequence[int]]] = {"patch.weight": {0: s}, "patch.bias": {0: s}, "cls": {2: s}, "pos": {2: s}}
        for name in ("norm", "layers.0.n1", "layers.0.n2"):
            take |= {f"{name}.weight": {0: s}, f"{name}.bias": {0: s}}
        take |= {"head.weight": {1: s}, "layers.0.fc1.weight": {0: h, 1: s}, "layers.0.fc1.bias": {0: h}}
        take |= {"layers.0.fc2.weight": {0: s, 1: h}, "layers.0.fc2.bias": {0: s}}
        take |= {"layers.0.attn.proj.weight": {0: s, 1: flat["v"]}, "layers.0.attn.proj.bias": {0: s}}
        full = heads * dim
        packed = [full * p + i for p, part in enumerate("qkv") for i in flat[part]]
        take |= {"layers.0.attn.qkv.weight": {0: packed, 1: s}, "layers.0.attn.qkv.bias": {0: packed}}
        for part in "qkv":
            take |= {f"layers.0.attn.{part}.weight": {0: flat[part], 1: s}, f"layers.0.attn.{part}.bias": {0: flat[part]}}
        small = models.ViT(style, len(s), len(hs), len(qk), len(h), scale=dim**-0.5)
        attention = small.layers[0].attn
        _resize(attention, len(s), len(hs), len(qk), len(v), style)
        return load(small, model, take)

    return build


def _resize(attention: nn.Module, d: int, heads: int, qk: int, v: int, style: str) -> None:
    """A reference attention whose values may have another width than its queries."""

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()

    attention.proj = nn.Linear(heads * v, d)
    if style in ("fused", "timm"):
        attention.qkv = nn.Linear(d, heads * (2 * qk + v))
    else:
        attention.q, attention.k, attention.v = nn.Linear(d, heads * qk), nn.Linear(d, heads * qk), nn.Linear(d, heads * v)
    scale = attention.scale

    def forward(x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if style in ("fused", "timm"):
            q, k, value = attention.qkv(x).split([heads * qk, heads * qk, heads * v], -1)
        else:
            q, k, value = attention.q(x), attention.k(x), attention.v(x)
        q, k, value = (t.view(b, n, heads, -1).transpose(1, 2) for t in (q, k, value))
        o = torch.softmax(q @ k.transpose(2, 3) * scale, -1) @ value
        return attention.proj(o.transpose(1, 2).reshape(b, n, -1))

    attention.forward = forward  # type: ignore[method-assign]


def small_convnext(model: nn.Module, kept: Kept) -> nn.Module:
    s, h = kept["stem.weight"], kept["pw1.weight"]
    take = {name: {0: s} for name in ("stem.weight", "stem.bias", "dw.weight", "dw.bias", "norm.weight", "norm.bias", "gamma", "pw2.bias")}
    take |= {"pw1.weight": {0: h, 1: s}, "pw1.bias": {0: h}, "pw2.weight": {0: s, 1: h}, "head.weight": {1: s}}
    return load(models.ConvNeXt(len(s), len(h)), model, take)


def small_groupnorm(groups: int) -> Callable[[nn.Module, Kept], nn.Module]:
    def build(model: nn.Module, kept: Kept) -> nn.Module:
        size = 8 // groups
        several = size > 1 and groups > 1
        s = [g * size + i for g in kept["a.weight"] for i in kept["a.weight#2"]] if several else list(kept["a.weight"])
        take = {name: {0: s} for name in ("a.weight", "a.bias", "n.weight", "n.bias")} | {"b.weight": {1: s}}
        return load(models.NormGroups(len(s), len(s) if size == 1 else len(kept["a.weight"]) if several else groups), model, take)

    return build


def small_gqa(model: nn.Module, kept: Kept) -> nn.Module:
    """Units: a KV head with its queries; query r of every KV head; dim d of all queries and keys; dim d of all values."""
    heads, repeated, qk, v = kept["q.weight"], kept["q.weight#2"], kept["q.weight#3"], kept["v.weight"]
    queries = [(h * 2 + r) * 3 + d for h in heads for r in repeated for d in qk]
    keys, values = ([h * 3 + d for h in heads for d in dims] for dims in (qk, v))
    outs = [(h * 2 + r) * 3 + d for h in heads for r in repeated for d in v]
    small = models.GroupedQuery(6, len(heads) * len(repeated), len(heads), len(qk), scale=3**-0.5)
    small.v, small.o = nn.Linear(6, len(values)), nn.Linear(len(outs), 6)
    take = {"q.weight": {0: queries}, "q.bias": {0: queries}, "k.weight": {0: keys}, "k.bias": {0: keys}}
    take |= {"v.weight": {0: values}, "v.bias": {0: values}, "o.weight": {1: outs}}
    repeats = small.repeats

    def forward(x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, c, -1).transpose(1, 2) for layer, c in ((small.q, small.heads), (small.k, small.kv), (small.v, small.kv))
        )
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = (q @ k.transpose(2, 3)) * small.scale
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        return small.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))

    small.forward = forward  # type: ignore[method-assign]
    return load(small, model, take)


L = "layers.0"
VIT = {"patch.weight": 12, f"{L}.attn.qkv.weight": 3, f"{L}.attn.qkv.weight#2": 4, f"{L}.fc1.weight": 10}
FUSED = {"stream": "patch.weight", "hidden": f"{L}.fc1.weight", "heads": f"{L}.attn.qkv.weight", "dims": f"{L}.attn.qkv.weight#2"}
SEPARATE = {"patch.weight": 12, f"{L}.attn.q.weight": 3, f"{L}.attn.q.weight#2": 4, f"{L}.attn.v.weight": 4, f"{L}.fc1.weight": 10}
APART = {
    "stream": "patch.weight",
    "hidden": f"{L}.fc1.weight",
    "heads": f"{L}.attn.q.weight",
    "dims": f"{L}.attn.q.weight#2",
    "values": f"{L}.attn.v.weight",
}

CASES: dict[str, Case] = {
    "residual 1d": Case(
        models.Residual1d,
        image(2, 8),
        {"stem.weight": 8, "a1.weight": 6, "b1.weight": 10, "b2.weight": 12},
        {
            "stem.weight": [("a1.weight", 1, same), ("b1.weight", 1, same), ("short.weight", 1, same)],
            "a1.weight": [("a2.weight", 1, same)],
            "b1.weight": [("b2.weight", 1, same)],
            "b2.weight": [("fc.weight", 1, same)],
        },
    ),
    "resnet": Case(
        models.ResNet,
        image(3, 16, 16),
        {
            "conv.weight": 6,
            "layers.0.conv1.weight": 6,
            "layers.1.conv1.weight": 6,
            "layers.2.conv1.weight": 9,
            "layers.2.conv2.weight": 9,
            "layers.3.conv1.weight": 9,
        },
        {
            "conv.weight": [(f"layers.{n}.weight", 1, same) for n in ("0.conv1", "1.conv1", "2.conv1", "2.down.0")],
            "layers.0.conv1.weight": [("layers.0.conv2.weight", 1, same)],
            "layers.1.conv1.weight": [("layers.1.conv2.weight", 1, same)],
            "layers.2.conv1.weight": [("layers.2.conv2.weight", 1, same)],
            "layers.2.conv2.weight": [("layers.3.conv1.weight", 1, same), ("head.weight", 1, same)],
            "layers.3.conv1.weight": [("layers.3.conv2.weight", 1, same)],
        },
    ),
    "mobilenet": Case(
        models.MobileNet,
        image(3, 12, 12),
        {
            "stem.weight": 6,
            "blocks.0.pw.weight": 12,
            "blocks.0.se.fc1.weight": 4,
            "blocks.1.pw.weight": 10,
            "blocks.1.se.fc1.weight": 4,
            "blocks.1.pl.weight": 8,
        },
        {
            "stem.weight": [("blocks.0.pw.weight", 1, same), ("blocks.1.pw.weight", 1, same)],
            "blocks.0.pw.weight": [("blocks.0.se.fc1.weight", 1, same), ("blocks.0.pl.weight", 1, same)],
            "blocks.0.se.fc1.weight": [("blocks.0.se.fc2.weight", 1, same)],
            "blocks.1.pw.weight": [("blocks.1.se.fc1.weight", 1, same), ("blocks.1.pl.weight", 1, same)],
            "blocks.1.se.fc1.weight": [("blocks.1.se.fc2.weight", 1, same)],
            "blocks.1.pl.weight": [("fc.weight", 1, same)],
        },
    ),
    "densenet": Case(
        models.DenseNet,
        image(3, 6, 6),
        {"c0.weight": 4, "c1.weight": 3, "c2.weight": 5, "transition.weight": 6},
        {
            "c0.weight": [("c1.weight", 1, same), ("c2.weight", 1, same), ("transition.weight", 1, same)],
            "c1.weight": [("c2.weight", 1, at(4)), ("transition.weight", 1, at(4))],
            "c2.weight": [("transition.weight", 1, at(7))],
            "transition.weight": [("fc.weight", 1, same)],
        },
    ),
    "grouped": Case(
        models.Grouped,
        image(3, 4, 4),
        {"a.weight": 2, "a.weight#2": 4, "g.weight": 4},
        {
            "a.weight": [("b.weight", 1, block(4))],
            "a.weight#2": [("g.weight", 1, same)],
            "g.weight": [("b.weight", 1, at(0, 4))],
        },
    ),
    "flatten": Case(
        models.Flatten,
        image(3, 8, 8),
        {"conv.weight": 5, "fc1.weight": 6},
        {"conv.weight": [("fc1.weight", 1, block(16))], "fc1.weight": [("fc2.weight", 1, same)]},
    ),
    "chunks": Case(
        models.Chunks,
        image(3, 4, 4),
        {"a.weight": 4, "a.weight#2": 4, "c.weight": 3, "c.weight#2": 5, "p.weight": 4},
        {
            "a.weight": [("c.weight", 1, same)],
            "a.weight#2": [("c.weight", 1, at(4))],
            "c.weight": [("p.weight", 1, same)],
            "c.weight#2": [("q.weight", 1, same)],
            "p.weight": [("out.weight", 1, same)],
        },
        form="any",  # the user's forward says split(x, [3, 5])
    ),
    "shuffle": Case(
        models.Shuffle,
        image(3, 4, 4),
        {"a.weight": 2, "a.weight#2": 4},
        {"a.weight": [("b.weight", 1, at(0, 2, 4, 6))], "a.weight#2": [("b.weight", 1, at(0, 1, step=2))]},
    ),
    "pixel shuffle": Case(models.SubPixel, image(3, 4, 4), {"a.weight": 4}, {"a.weight": [("b.weight", 1, same)]}),
    "cat twice": Case(models.Twice, image(3, 4, 4), {"a.weight": 6}, {"a.weight": [("b.weight", 1, at(0, 6))]}),
    "shared by branches": Case(
        models.SharedBranches,
        image(3, 4, 4),
        {"a.weight": 6, "s.weight": 7},
        {"a.weight": [("s.weight", 1, same)], "s.weight": [("e.weight", 1, same)]},
    ),
    "called twice": Case(models.CalledTwice, image(3, 4, 4), {"a.weight": 6}, {"a.weight": [("s.weight", 1, same), ("e.weight", 1, same)]}),
    "shared oddly": Case(models.SharedOddly, image(6), {"s.weight": 5}, {"s.weight": [("e.weight", 1, same)]}),
    "tied": Case(
        models.Tied,
        tokens,
        {"embed.weight": 8, "l1.weight": 12},
        {"embed.weight": [("l1.weight", 1, same), ("embed.weight", 1, same)], "l1.weight": [("l2.weight", 1, same)]},
    ),
    "gated": Case(
        models.Gated,
        image(6),
        {"a.weight": 8, "b.weight": 5, "gate.weight": 9},
        {
            "a.weight": [("b.weight", 1, same)],
            "b.weight": [("gate.weight", 1, same), ("up.weight", 1, same)],
            "gate.weight": [("down.weight", 1, same)],
        },
    ),
    "scaled": Case(models.Scaled, image(3, 4, 4), {"a.weight": 6}, {"a.weight": [("b.weight", 1, same)]}),
    "unet": Case(
        models.UNet,
        image(3, 8, 8),
        {"a.weight": 6, "b.weight": 8, "up.weight": 5, "c.weight": 4},
        {
            "a.weight": [("b.weight", 1, same), ("c.weight", 1, at(5))],
            "b.weight": [("up.weight", 0, same)],
            "up.weight": [("c.weight", 1, same)],
            "c.weight": [("out.weight", 1, same)],
        },
    ),
    "recurrent": Case(
        models.Recurrent,
        image(2, 6),
        {"a.weight": 6, "lstm.weight_ih_l0": 5, "b.weight": 7},
        {
            "a.weight": [("lstm.weight_ih_l0", 1, same)],
            "lstm.weight_ih_l0": [("lstm.weight_hh_l0", 1, same), ("b.weight", 1, same)],
            "b.weight": [("c.weight", 1, same)],
        },
    ),
    "unknown operator": Case(models.Unknown, image(6), {"b.weight": 7}, {"b.weight": [("c.weight", 1, same)]}),
    "keywords": Case(models.Named, named, {"a.weight": 8}, {"a.weight": [("c.weight", 1, same)]}),
    "windowed": Case(
        models.Windowed,
        image(4, 4, 3),
        {"a.weight": 6, "merge.weight": 5},
        {
            "a.weight": [("merge.weight", 1, lambda i: [[4, 2, 0, 1, 5, 3].index(i) + 6 * k for k in range(4)])],
            "merge.weight": [("out.weight", 1, same)],
        },
        form="any",
    ),
    "matrix": Case(models.Matrix, image(4), {"w1": 7, "w2": 5}, {"w1": [("w2", 0, same)], "w2": [("w3", 0, same)]}),
    "group norm": Case(lambda: models.NormGroups(8, 2), image(3, 4, 4), {"a.weight": 2, "a.weight#2": 4}, small=small_groupnorm(2)),
    "group norm over all": Case(lambda: models.NormGroups(8, 1), image(3, 4, 4), {"a.weight": 8}, small=small_groupnorm(1)),
    "instance-like group norm": Case(lambda: models.NormGroups(8, 8), image(3, 4, 4), {"a.weight": 8}, small=small_groupnorm(8)),
    "convnext": Case(models.ConvNeXt, image(3, 8, 8), {"stem.weight": 8, "pw1.weight": 12}, small=small_convnext),
    "vit fused": Case(lambda: models.ViT("fused"), image(3, 8, 8), VIT, small=small_vit("fused", FUSED)),
    "vit square": Case(
        lambda: models.ViT("fused", 16, 4, 4),
        image(3, 8, 8),
        {**VIT, "patch.weight": 16, f"{L}.attn.qkv.weight": 4},
        small=small_vit("fused", FUSED, heads=4),
    ),
    "vit timm": Case(lambda: models.ViT("timm"), image(3, 8, 8), VIT, small=small_vit("timm", FUSED), form="any"),
    "vit separate": Case(lambda: models.ViT("separate"), image(3, 8, 8), SEPARATE, small=small_vit("separate", APART), form="any"),
    "vit sdpa": Case(lambda: models.ViT("sdpa"), image(3, 8, 8), SEPARATE, small=small_vit("sdpa", APART), form="any"),
    "grouped query": Case(
        models.GroupedQuery, image(8, 6), {"q.weight": 2, "q.weight#2": 2, "q.weight#3": 3, "v.weight": 3}, small=small_gqa, form="any"
    ),
}
