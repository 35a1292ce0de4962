"""Random networks, random plans: the cut equals the view, and both equal an oracle that zeroes consuming slices.

The test follows channels itself, as lists of class numbers, with its own rules for each block.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import small_models as models
from shohin.data import Call
from shohin.plan import Plan
from shohin.surgery import cut, understand, view
from surgery_checks import answers, close

Op = tuple[str, int]
KINDS = [
    "conv",
    "strided",
    "depthwise",
    "bn",
    "relu",
    "residual",
    "dense",
    "chunk",
    "swap",
    "pool",
    "se",
    "shuffle",
    "scale",
    "twice",
    "grouped",
]


class Network(nn.Module):
    """A stem, blocks, and a head of linear layers; ``flat`` flattens instead of pooling."""

    def __init__(self, ops: list[Op], flat: bool) -> None:
        super().__init__()
        self.flat, self.kinds = flat, [kind for kind, _ in ops]
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList()
        c, size = 4, 8
        for kind, n in ops:
            block = nn.Module()
            if kind == "conv":
                block.a, c = nn.Conv2d(c, n, 3, padding=1), n
            elif kind == "strided":
                block.a, c, size = nn.Conv2d(c, n, 2, 2) if size > 2 else nn.Conv2d(c, n, 1), n, max(size // 2, 2) if size > 2 else size
            elif kind == "depthwise":
                block.a = nn.Conv2d(c, c, 3, padding=1, groups=c)
            elif kind == "bn":
                block.a = nn.BatchNorm2d(c)
            elif kind == "residual":
                block.a, block.b = nn.Conv2d(c, n, 1), nn.Conv2d(n, c, 3, padding=1)
            elif kind == "dense":
                block.a, c = nn.Conv2d(c, n, 1), c + n
            elif kind == "pool":
                size = size // 2 if size > 2 else size
            elif kind == "se":
                block.a, block.b = nn.Conv2d(c, n, 1), nn.Conv2d(n, c, 1)
            elif kind == "scale":
                block.a = nn.Parameter(torch.rand(1, c, 1, 1) + 0.5)
            elif kind == "twice":
                c = 2 * c
            elif kind == "grouped":
                groups = 2 if c % 2 == 0 else 1
                block.a, c = nn.Conv2d(c, 2 * n, 1, groups=groups), 2 * n
            self.blocks.append(block)
        self.fc, self.out = nn.Linear(c * size * size if flat else c, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind in ("conv", "strided", "depthwise", "bn", "grouped"):
                x = block.a(x)
            elif kind == "relu":
                x = F.relu(x)
            elif kind == "residual":
                x = x + block.b(F.relu(block.a(x)))
            elif kind == "dense":
                x = torch.cat([x, torch.tanh(block.a(x))], 1)
            elif kind in ("chunk", "swap") and x.shape[1] > 1:
                u, v = x.chunk(2, 1)
                x = torch.cat([torch.sigmoid(v), u] if kind == "swap" else [torch.tanh(u), F.elu(v)], 1)
            elif kind == "pool" and x.shape[2] > 2:
                x = F.avg_pool2d(x, 2)
            elif kind == "se":
                x = x * torch.sigmoid(block.b(F.relu(block.a(x.mean((2, 3), keepdim=True)))))
            elif kind == "shuffle" and x.shape[1] % 2 == 0:
                n, c, h, w = x.shape
                x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            elif kind == "scale":
                x = x * block.a
            elif kind == "twice":
                x = torch.cat([x, x], 1)
        return self.out(torch.tanh(self.fc(x.flatten(1) if self.flat else x.mean((2, 3)))))


@dataclass
class Tracker:
    """Channel classes: fresh ones for produced channels, united where channels are added or share a weight index."""

    parent: list[int] = field(default_factory=list)
    made: dict[tuple[str, int], int] = field(default_factory=dict)
    used: list[tuple[str, slice, int, int]] = field(default_factory=list)

    def find(self, a: int) -> int:
        while self.parent[a] != a:
            a = self.parent[a]
        return a

    def unite(self, xs: list[int], ys: list[int]) -> None:
        for a, b in zip(xs, ys, strict=True):
            self.parent[self.find(a)] = self.find(b)

    def produce(self, name: str, count: int) -> list[int]:
        fresh = list(range(len(self.parent), len(self.parent) + count))
        self.parent.extend(fresh)
        self.made.update({(name, i): c for i, c in enumerate(fresh)})
        return fresh

    def consume(self, name: str, channels: list[int], rows: slice = slice(None)) -> None:
        self.used.extend((name, rows, i, c) for i, c in enumerate(channels))


def track(net: Network) -> Tracker:
    t = Tracker()
    x = t.produce("stem.weight", 4)
    for i, (kind, block) in enumerate(zip(net.kinds, net.blocks, strict=True)):
        a, b = f"blocks.{i}.a.weight", f"blocks.{i}.b.weight"
        half = (len(x) + 1) // 2
        if kind in ("conv", "strided"):
            t.consume(a, x)
            x = t.produce(a, block.a.out_channels)
        elif kind == "residual":
            t.consume(a, x)
            t.consume(b, t.produce(a, block.a.out_channels))
            t.unite(t.produce(b, len(x)), x)
        elif kind == "dense":
            t.consume(a, x)
            x = x + t.produce(a, block.a.out_channels)
        elif kind == "swap" and len(x) > 1:
            x = x[half:] + x[:half]
        elif kind == "se":
            t.consume(a, x)
            t.consume(b, t.produce(a, block.a.out_channels))
            t.unite(t.produce(b, len(x)), x)
        elif kind == "shuffle" and len(x) % 2 == 0:
            x = [x[g * half + j] for j in range(half) for g in range(2)]
        elif kind == "twice":
            x = x + x
        elif kind == "grouped":
            groups = block.a.groups
            size = len(x) // groups
            if groups > 1 and size == 1:  # depthwise: output o reads input o // multiplier
                outputs = t.produce(a, block.a.out_channels)
                x = [x[o * groups // len(outputs)] for o in range(len(outputs))]
                t.unite(outputs, x)
                continue
            each = block.a.out_channels // groups
            for g in range(groups):  # whole groups can go, so that no two channels must
                t.consume(a, x[g * size : (g + 1) * size], slice(g * each, (g + 1) * each))
            x = t.produce(a, block.a.out_channels)
    area = net.fc.in_features // len(x)
    t.consume("fc.weight", [c for c in x for _ in range(area)])
    t.consume("out.weight", t.produce("fc.weight", 5))
    return t


def zeroed(net: Network, t: Tracker, removed: dict[str, dict[int, list[int]]]) -> Network:
    """The original with consuming slices at zero; the removed producers must be whole classes."""
    gone = {t.find(t.made[name, i]) for name, axes in removed.items() for i in axes.get(0, []) if (name, i) in t.made}
    for (name, i), c in t.made.items():
        assert (t.find(c) in gone) == (i in removed.get(name, {}).get(0, [])), f"{name}[{i}] is not removed with its class"
    net = copy.deepcopy(net)
    weights = dict(net.named_parameters())
    with torch.no_grad():
        for name, rows, i, c in t.used:
            if t.find(c) in gone:
                weights[name][rows, i] = 0
    return net


OPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 6)), min_size=1, max_size=7)


@settings(max_examples=30, phases=(Phase.explicit, Phase.generate))
@example([("grouped", 1)], True, 1)
@example([("grouped", 3), ("relu", 1), ("grouped", 2)], False, 1)
@given(OPS, st.booleans(), st.integers(0, 10**6))
def test_random_networks(ops: list[Op], flat: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net = models.lively(Network(ops, flat), seed)
    assert isinstance(net, Network)
    graph = understand(net, (torch.randn(1, 2, 8, 8, dtype=torch.float64),))
    assert "fc.weight" in graph.sizes
    t = track(net)
    r = random.Random(seed)
    for _ in range(2):
        widths = {g.name: tuple(sorted(r.sample(range(g.size), r.randint(1, g.size)))) for g in graph.groups if r.random() < 0.8}
        plan = Plan(graph.program.fingerprint, widths)
        result = cut(net, graph, plan)
        assert result.proof.holds
        call = Call((torch.randn(3, 2, 8, 8, dtype=torch.float64),), {}, None, None)
        wanted = answers(zeroed(net, t, result.removed), call)
        close(answers(view(graph, plan), call), wanted, (ops, widths))
        close(answers(result.model, call), wanted, (ops, widths))
