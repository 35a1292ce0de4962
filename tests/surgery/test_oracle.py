"""The view and the cut against an oracle that was written by hand and shares no code with them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import CASES, Case
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.surgery import cut, understand, view

PLANS = 5
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


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_expected(name: str) -> None:
    _, graph = understood(name)
    assert graph.sizes == dict(CASES[name].sizes), graph.frozen


@pytest.mark.parametrize("name", CASES)
def test_view_and_cut_equal_the_oracle(name: str) -> None:
    case = CASES[name]
    model, graph = understood(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for seed in range(PLANS):
        plan = random_plan(case, graph, seed)
        kept = {**{n: tuple(range(s)) for n, s in case.sizes.items()}, **plan.widths}
        oracle = case.oracle(model, kept)
        result = cut(model, graph, plan)
        assert result.proof.holds and result.proof.error < 1e-10
        assert case.form == "any" or result.form == case.form, result.reason
        seen = view(graph, plan)
        for batch in (1, 3):
            call = case.call(batch, 10 + seed)
            wanted = answers(oracle, call)
            close(answers(seen, call), wanted, ("view", plan.widths))
            close(answers(result.model, call), wanted, ("cut", plan.widths))
        if result.form == "module":
            assert type(result.model) is type(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the user's model was changed"
    assert before.keys() == model.state_dict().keys()
