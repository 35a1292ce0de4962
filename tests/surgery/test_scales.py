"""Attention whose scale follows the head dim stays in the user's class: rows of parameters make up for it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_models as models
from shohin.plan import Plan
from shohin.surgery import cut, understand
from shohin.surgery.oracle import oracle


class Attention(nn.Module):
    """Two heads of four dims; ``how`` says what happens to queries and keys before the scores."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.dim = how, 2, 4
        width = 8 * (3 if how == "packed" else 1)
        self.q = nn.Conv1d(6, width, 1) if how == "convolution" else nn.Linear(6, width)
        self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm = nn.LayerNorm(4)
        self.bias = nn.Parameter(torch.zeros(2, 1, 4))
        self.register_buffer("turn", torch.linspace(0.3, 2.0, 2))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.dim).transpose(1, 2)

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.cat((self.turn, self.turn))
        a, b = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((-b, a), dim=-1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "packed":
            q, k, v = (self.split(t) for t in self.q(x).chunk(3, dim=-1))
        else:
            q = self.q(x.transpose(1, 2)).transpose(1, 2) if self.how == "convolution" else self.q(x)
            q, k, v = self.split(q), self.split(self.k(x)), self.split(self.v(x))
        if self.how in ("rotary", "rotary, fused"):
            q, k = self.turned(q), self.turned(k)
        if self.how == "normalized":
            q = self.norm(q)
        if self.how == "biased":
            q = q + self.bias
        if "fused" in self.how:
            a = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q / math.sqrt(self.dim) @ k.mT if self.how == "queries first" else q @ k.mT * self.dim**-0.5
            a = torch.softmax(scores, -1) @ v
        if self.how == "queries read twice":
            a = a + q
        return self.out(a.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.heads * self.dim))


HOW = ("plain", "packed", "convolution", "rotary", "rotary, fused", "normalized", "biased", "queries first", "queries read twice")


class Twice(nn.Module):
    """One attention, called twice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.attention = Attention(how)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x + self.attention(x))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_scales_that_follow_the_head_dim(how: str, shared: bool) -> None:
    torch.manual_seed(0)
    model = models.lively(Twice(how) if shared else Attention(how))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    graph = understand(model, (x,))
    plan = Plan(graph.program.fingerprint, {g.name: tuple(range(0, g.size, 2)) for g in graph.groups})
    result = cut(model, graph, plan)
    assert result.form == "module", result.reason
    assert result.rewritten.scaled  # the case
    assert result.model.get_submodule("attention" if shared else "").dim == 2
    fresh = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.allclose(result.model(fresh), oracle(model, graph, plan)(fresh), rtol=1e-9, atol=1e-12)


def test_a_scale_that_nothing_can_make_up_for() -> None:
    """Queries and keys are both read beside the scores: the class cannot follow, the program does."""

    class Odd(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k = self.split(self.q(x)), self.split(self.k(x))
            a = torch.softmax(q @ k.mT / math.sqrt(self.dim), -1) @ k + q
            return self.out(a.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    torch.manual_seed(0)
    model = models.lively(Odd("plain"))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    graph = understand(model, (x,))
    plan = Plan(graph.program.fingerprint, {g.name: tuple(range(0, g.size, 2)) for g in graph.groups})
    result = cut(model, graph, plan)
    assert result.form == "program" and "its source is not known" in result.reason
    assert torch.allclose(result.model(x), oracle(model, graph, plan)(x), rtol=1e-9, atol=1e-12)
