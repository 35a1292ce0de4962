"""Static costs against torch's own counter, on whole and on cut models."""

from __future__ import annotations

import random

import pytest
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shohin.graph import Graph
from shohin.plan import Plan
from shohin.surgery import view
from surgery_cases import CASES, Case
from surgery_checks import understood

#: models that the counter does not count
UNCOUNTED = {"recurrent": "torch runs an LSTM in one fused call, which its counter does not see"}


def counted(model: nn.Module, case: Case) -> float:
    call = case.call(1, 3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused CPU kernel is not counted by torch
        model(*call.args, **call.kwargs)
    return counter.get_total_flops() / 2


def plans(graph: Graph, case: Case) -> list[Plan]:
    r = random.Random(1)
    out = [Plan(graph.program.fingerprint)]
    for _ in range(3):
        widths = {n: tuple(sorted(r.sample(range(s), r.randint(1, s)))) for n, s in graph.sizes.items()}
        out.append(Plan(graph.program.fingerprint, widths))
    skips = tuple(region.name for region in graph.regions if region.residual)
    return [*out, Plan(graph.program.fingerprint, out[1].widths, skips)] if skips else out


@pytest.mark.parametrize("name", [n for n in CASES if n not in UNCOUNTED])
def test_macs_equal_the_counter(name: str) -> None:
    case = CASES[name]
    model, graph = understood(name)
    assert graph.macs() == counted(model, case)
    for plan in plans(graph, case):
        assert graph.macs(plan) == pytest.approx(counted(view(graph, plan), case), abs=1e-6), (plan.widths, plan.skips)


@pytest.mark.parametrize("name", [n for n in CASES if n not in UNCOUNTED])
def test_parameters_of_groups_add_up(name: str) -> None:
    """Removing one unit of one group from the whole model removes exactly ``group.parameters`` elements."""
    _, graph = understood(name)
    names = {id(t): n for n, t in graph.program.tensors.items() if n in graph.program.trainable}
    whole = sum(graph.program.tensors[n].numel() for n in names.values())
    for group in graph.groups:
        for gone in (0, group.size - 1):
            plan = Plan(graph.program.fingerprint, {group.name: tuple(i for i in range(group.size) if i != gone)})
            left = view(graph, plan)
            now = sum(p.numel() for p in left.parameters())
            assert whole - now == group.parameters, group
