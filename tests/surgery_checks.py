"""Comparison with the oracle; models are captured once for all tests."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.surgery import understand
from surgery_cases import CASES, Case

_known: dict[str, tuple[nn.Module, Graph]] = {}


def understood(name: str) -> tuple[nn.Module, Graph]:
    """The model and its graph, from a batch-1 example; captured once."""
    if name not in _known:
        model = CASES[name].model()
        _known[name] = model, understand(model, CASES[name].call(1, 0))
    return _known[name]


def random_plan(case: Case, graph: Graph, seed: int) -> Plan:
    """Seed 0 keeps everything, seed 1 one unit of every group, the others random subsets of random groups."""
    r = random.Random(seed)
    widths = {}
    for name, size in case.sizes.items():
        count = size if seed == 0 else 1 if seed == 1 else r.choice([size, r.randint(1, size), r.randint(1, size)])
        widths[name] = tuple(sorted(r.sample(range(size), count)))
    return Plan(graph.program.fingerprint, widths)


def answers(model: nn.Module, call: Call) -> list[Tensor]:
    """Outputs, and gradients of a fixed combination of them with respect to the inputs."""
    flat, spec = pytree.tree_flatten((call.args, call.kwargs))
    flat = [x.clone().requires_grad_() if x.is_floating_point() else x for x in flat]
    args, kwargs = pytree.tree_unflatten(flat, spec)
    outputs = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
    inputs = [x for x in flat if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs)
    return [*outputs, *(torch.autograd.grad(loss, inputs) if inputs else ())]


def close(got: list[Tensor], wanted: list[Tensor], what: Any) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        error = float((a - b).detach().abs().max() / (b.detach().abs().max() + 1e-30))
        assert error < 1e-10, f"{what}: relative error {error}"
