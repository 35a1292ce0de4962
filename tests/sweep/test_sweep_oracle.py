"""The oracle by zeroing: what it mirrors, what it does not speak for, and that a wrong cut is seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from shohin.plan import Plan
from shohin.surgery import cut, understand
from shohin.surgery.oracle import Mirror, lively, oracle, unspoken
from sweep.numbers import difference, run


class Rms(nn.Module):
    """A root-mean-square normalization in plain operations."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    """Convolutions, batch statistics, a residual, attention, a normalization."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.SiLU())
        self.norm, self.head = norm, nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        return self.head(self.norm(x.flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.LayerNorm(12), nn.LayerNorm(12, bias=False), nn.RMSNorm(12)], ids=lambda n: repr(n)[:20]
)
@pytest.mark.parametrize("seed", range(2))
def test_the_oracle_equals_the_cut(norm: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model = lively(Net(norm), seed).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = understand(model, (x,))
    assert len(graph.groups) == 2 and not unspoken(model, graph)
    plan = Plan(graph.program.fingerprint, {g.name: tuple(range(seed, g.size, 2)) for g in graph.groups})
    wanted = run(oracle(model, graph, plan), ((x,), {}))[0]
    result = cut(model, graph, plan)
    assert difference(run(result.model, ((x,), {}))[0], wanted, "output")[0] < 1e-12
    other = dataclasses.replace(plan, widths={n: tuple(range(1 - seed % 2, graph.sizes[n], 2)) for n in plan.widths})
    assert difference(run(cut(model, graph, other).model, ((x,), {}))[0], wanted, "output")[0] > 1e-6, "other units kept: seen"


@pytest.mark.parametrize(
    "norm, shape", [(nn.LayerNorm(6), (2, 5, 6)), (nn.RMSNorm(6), (6, 6, 6)), (Rms(6), (2, 6, 6)), (nn.GroupNorm(3, 6), (2, 6, 6, 5))]
)
def test_a_mirror_normalizes_what_is_kept(norm: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    lively(norm)
    x = torch.randn(shape)
    kept, axis = [0, 2, 5], 1 if isinstance(norm, nn.GroupNorm) else 2
    got = Mirror(norm, {1, 3, 4})(x)
    part = x.index_select(axis, torch.tensor(kept))
    scale = next(norm.parameters())[kept]
    bias = getattr(norm, "bias", None)
    if isinstance(norm, nn.GroupNorm):
        wanted = nn.functional.group_norm(part, 3, scale, norm.bias[kept], norm.eps)
    elif isinstance(norm, nn.LayerNorm):
        wanted = nn.functional.layer_norm(part, (3,), scale, bias[kept], norm.eps)
    else:
        wanted = (
            part
            / (part.pow(2).mean(-1, keepdim=True) + (norm.eps or 1.1920929e-07 if isinstance(norm, nn.RMSNorm) else 1e-6)).sqrt()
            * scale
        )
    assert torch.allclose(got.index_select(axis, torch.tensor(kept)), wanted, atol=1e-6)
    assert not got.index_select(axis, torch.tensor([1, 3, 4])).any()


def test_a_normalization_without_a_module_is_named() -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).mean((2, 3))
            return self.head(nn.functional.layer_norm(x, (12,)))

    model = lively(Functional(nn.Identity())).double()
    graph = understand(model, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    assert list(unspoken(model, graph)) == [g.name for g in graph.groups if g.normalized] == ["stem.0.weight"]


def test_lively_leaves_nothing_constant() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LayerNorm(6)))
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert value.dim() == 0 or value.unique().numel() > 1, name
