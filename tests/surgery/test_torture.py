"""Each torture module against its oracle: random plans and half of everything, outputs and gradients."""

from __future__ import annotations

import random
import re
import warnings
from functools import cache

import pytest
import torch
from torch import nn

import small_models as models
from shohin.errors import ModelError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.surgery import cut, understand, view
from surgery_cases import Case
from surgery_checks import answers, close
from torture_modules import TORTURE


@cache
def understood(name: str) -> tuple[nn.Module, Graph]:
    """The model and its graph, from an example of batch 1."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm says that it is old
        model = TORTURE[name].model()
        return model, understand(model, TORTURE[name].call(1, 0))


def plans(case: Case) -> list[dict[str, tuple[int, ...]]]:
    """Half of everything; random numbers of units of all groups, and of each alone."""
    r = random.Random(1)
    sizes = case.sizes
    half = {n: tuple(sorted(r.sample(range(s), s // 2))) for n, s in sizes.items()}
    mixed = {n: tuple(sorted(r.sample(range(s), r.randint(1, s)))) for n, s in sizes.items()}
    alone = [{n: tuple(sorted(r.sample(range(s), r.randint(1, s - 1))))} for n, s in sizes.items()]
    return [half, mixed, *(alone if len(alone) > 1 else [])]


@pytest.mark.parametrize("name", TORTURE)
def test_torture(name: str) -> None:
    case = TORTURE[name]
    model, graph = understood(name)
    assert {g.name: g.size for g in graph.groups if g.parameters} == case.sizes, graph.frozen
    half, *others = plans(case)
    for widths in (half, *others):
        kept = {n: widths.get(n, tuple(range(s))) for n, s in case.sizes.items()}
        plan = Plan(graph.program.fingerprint, widths)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = case.oracle(model, kept)
            result = cut(model, graph, plan)
        assert result.proof.holds
        assert case.form == "any" or result.form == case.form, (widths, result.reason)
        for batch in (1, 3) if widths is half else (3,):
            call = case.call(batch, batch)
            close(answers(result.model, call), answers(wanted, call), (name, widths, result.form, batch))
        call = case.call(2, 5)
        close(answers(view(graph, plan), call), answers(wanted, call), (name, widths, "view"))
        if widths is half:
            assert any(bool((a != b).any()) for a, b in zip(answers(model, call), answers(wanted, call), strict=True))


def test_a_custom_operator_is_named_with_its_line() -> None:
    _, graph = understood("custom operator")
    found = [f for f in graph.frozen if "warp" in f.address or "warp" in f.reason]
    assert found and any(f.address == "/torture::warp.0" and "x = torch.ops.torture.warp(self.b(" in f.line for f in found)


def test_a_data_dependent_branch_is_refused_with_its_line() -> None:
    with pytest.raises(ModelError) as error:
        understand(models.Branching().double(), (torch.randn(1, 6).double(),))
    assert re.search(r"models\.py:\d+: if x\.sum\(\) > 0:", str(error.value))


def test_two_layers_of_one_config_may_differ() -> None:
    """A plan that gives the two layers different sizes keeps the user's class: each reads a configuration of its own."""
    model, graph = understood("shared config")
    plan = Plan(graph.program.fingerprint, {"one.q.weight": (0, 2), "two.q.weight": (1,)})
    result = cut(model, graph, plan)
    assert result.form == "module", result.reason
    assert (result.model.one.config.heads, result.model.two.config.heads, model.one.config.heads) == (2, 1, 3)
    assert result.model.one.config is not model.one.config
    wanted = TORTURE["shared config"].oracle(
        model, {**{n: tuple(range(s)) for n, s in TORTURE["shared config"].sizes.items()}, **dict(plan.widths)}
    )
    call = TORTURE["shared config"].call(3, 1)
    close(answers(result.model, call), answers(wanted, call), "shared config")
