"""A cut copies what it keeps, not the model: the peak is the original's size plus the cut's, and one tensor between two slices."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shohin.plan import Plan
from shohin.surgery import rewrite, understand
from shohin.surgery.classes.repair import repairs


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone, size)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def size(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_a_cut_never_holds_the_whole_model_twice() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Linear(256, 256), nn.ReLU())]
    model = nn.Sequential(nn.Linear(16, 256), *layers, nn.Linear(256, 4)).eval()
    model.register_buffer("unused", torch.zeros(1000), persistent=False)
    graph = understand(model, (torch.randn(1, 16),))
    plan = Plan(graph.program.fingerprint, {g.name: tuple(range(g.size // 2)) for g in graph.groups})
    rewritten = rewrite(graph, plan)
    with Live() as live:
        made = next(iter(repairs(model, graph, plan, rewritten)))
    assert isinstance(made, nn.Module)
    largest = max(t.numel() * t.element_size() for t in model.parameters())
    assert size(made) < 0.3 * size(model)
    assert size(made) <= live.peak <= size(made) + 2 * largest < 0.7 * size(model)
