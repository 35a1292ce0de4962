"""Skipped regions: the outputs are those of a model in which the block was taken out by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shohin.errors import PlanError
from shohin.plan import Plan
from shohin.surgery import cut, view
from surgery_cases import CASES
from surgery_checks import answers, close, random_plan, understood


class Zero(nn.Module):
    """A branch that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def identity(path: str) -> Callable[[nn.Module], None]:
    return lambda model: _put(model, path, nn.Identity())


def nothing(path: str) -> Callable[[nn.Module], None]:
    return lambda model: _put(model, path, Zero())


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def no_gamma(model: nn.Module) -> None:
    model.gamma.data.zero_()


def no_second(model: nn.Module) -> None:
    model.l2.weight.data.zero_()
    model.l2.bias.data.zero_()


def no_normalized_branch(model: nn.Module) -> None:
    model.n2.weight.data.zero_()
    model.n2.bias.data.zero_()


#: model -> region -> what a person would do to skip it
BY_HAND: dict[str, dict[str, Callable[[nn.Module], None]]] = {
    "resnet": {
        "layers.0": identity("layers.0"),
        "layers.1": identity("layers.1"),
        "layers.2.conv2": identity("layers.2.conv2"),
        "layers.3": identity("layers.3"),
    },
    "mobilenet": {"blocks.0": identity("blocks.0"), "blocks.1.se": identity("blocks.1.se")},
    "grouped": {"g": identity("g")},
    "chunks": {"c": identity("c")},
    "vit fused": {"layers.0/add.0": nothing("layers.0.attn"), "layers.0/add.1": nothing("layers.0.fc2")},
    "vit sdpa": {"layers.0/add.0": nothing("layers.0.attn"), "layers.0/add.1": nothing("layers.0.fc2")},
    "convnext": {"/add.0": no_gamma},
    "tied": {"/add.0": no_second},
    "residual 1d": {"/add.0": no_normalized_branch},
}


def hand_skipped(name: str, model: nn.Module, skips: tuple[str, ...]) -> nn.Module:
    model = copy.deepcopy(model)
    for region in skips:
        BY_HAND[name][region](model)
    if name.startswith("vit") and "layers.0/add.1" in skips:
        layer = model.layers[0]
        layer.fc1 = nn.Identity()
    return model


@pytest.mark.parametrize("name", CASES)
def test_regions_are_those_expected(name: str) -> None:
    _, graph = understood(name)
    expected = dict(BY_HAND.get(name, {}))
    if name.startswith("vit"):
        expected = dict(BY_HAND["vit fused"])
    assert {r.name for r in graph.regions} == set(expected)


@pytest.mark.parametrize("name", BY_HAND)
def test_skips_equal_the_hand_made_model(name: str) -> None:
    model, graph = understood(name)
    names = sorted(BY_HAND[name])
    for count in range(1, len(names) + 1):
        for skips in itertools.combinations(names, count):
            plan = Plan(graph.program.fingerprint, {}, skips)
            wanted = hand_skipped(name, model, skips)
            call = CASES[name].call(3, 5)
            close(answers(view(graph, plan), call), answers(wanted, call), ("view", skips))
            result = cut(model, graph, plan)
            assert result.proof.holds
            assert (result.form == "module") == all("/" not in s for s in skips), result.reason
            close(answers(result.model, call), answers(wanted, call), ("cut", skips))


CHAINS = {"grouped": "g", "chunks": "c", "resnet": "layers.2.conv2"}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_skipped_only_where_both_ends_keep_the_same(name: str) -> None:
    _, graph = understood(name)
    region = graph.region(CHAINS[name])
    assert not region.residual
    widths = random_plan(CASES[name], graph, 3).widths
    with pytest.raises(PlanError, match="keep the same"):
        view(graph, Plan(graph.program.fingerprint, widths, (region.name,)))


def test_a_chain_is_skipped_with_its_widths() -> None:
    case, (model, graph) = CASES["grouped"], understood("grouped")
    plan = Plan(graph.program.fingerprint, {"a.weight#2": (0, 3), "g.weight": (0, 3)}, ("g",))
    wanted = hand_skipped("grouped", case.oracle(model, {**{n: tuple(range(s)) for n, s in case.sizes.items()}, **plan.widths}), ("g",))
    call = case.call(2, 1)
    close(answers(view(graph, plan), call), answers(wanted, call), "view")
    close(answers(cut(model, graph, plan).model, call), answers(wanted, call), "cut")


@pytest.mark.parametrize("name", [n for n in BY_HAND if not n.startswith("vit") and n not in ("convnext", "grouped", "chunks")])
def test_skips_together_with_widths(name: str) -> None:
    case, (model, graph) = CASES[name], understood(name)
    skips = tuple(sorted(r.name for r in graph.regions if r.residual))
    for seed in range(1, 4):
        plan = Plan(graph.program.fingerprint, random_plan(case, graph, seed).widths, skips)
        wanted = hand_skipped(name, case.oracle(model, plan.widths), skips)
        call = case.call(2, seed)
        close(answers(view(graph, plan), call), answers(wanted, call), ("view", plan))
        close(answers(cut(model, graph, plan).model, call), answers(wanted, call), ("cut", plan))


@pytest.mark.parametrize("name", ["vit fused", "convnext"])
def test_skips_and_widths_commute(name: str) -> None:
    """With a normalized axis: skipping in the cut model equals both at once."""
    case, (model, graph) = CASES[name], understood(name)
    skips = tuple(sorted(BY_HAND[name]))
    widths = random_plan(case, graph, 3).widths
    narrow = cut(model, graph, Plan(graph.program.fingerprint, widths))
    assert narrow.form == "module"
    both = view(graph, Plan(graph.program.fingerprint, widths, skips))
    call = case.call(2, 3)
    close(answers(both, call), answers(hand_skipped(name, narrow.model, skips), call), widths)
