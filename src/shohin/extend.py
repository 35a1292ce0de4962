"""Rules of your own: how an operator passes on what is prunable, how its integers follow a cut, and a test that both are right.

    from shohin.extend import Context, conform, follow, merge, rule

    @rule("my_gate")                                   # the operator's name, without namespace and overload
    def my_gate(context: Context, node, args):
        return merge(context, node, *args)             # elementwise: labels that meet are united

    conform(ModelAroundMyGate(), (x,), groups={"first.weight": 8})

A rule gets the labels of the arguments and returns those of the result. `merge` is for what works element by element,
`reduce` for sums and means over axes, `contract` for Einstein summations, `Context.collapse` for what treats an axis alike,
`Context.bind` ties an axis of a weight; NotImplemented freezes what the operator touches, by name. Register before
`understand`. An operator that takes sizes of prunable axes as integers needs `follow` too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shohin.errors import ShohinError
from shohin.graph import Graph
from shohin.graph.labels.algebra import contract, meet, merge, reduce
from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.core import Labels
from shohin.graph.labels.rules import rule
from shohin.plan import Plan
from shohin.surgery import CannotRewrite, cut, understand
from shohin.surgery.follow import follow
from shohin.surgery.oracle import lively, oracle, unspoken
from shohin.surgery.precision import double_precision
from shohin.surgery.work import Work, set_argument

#: largest relative difference from the oracle, in float64
TOLERANCE = 1e-9


class NotConforming(ShohinError):
    """A rule is wrong: a cut differs from what it must compute."""


def conform(model: nn.Module, example: Any, groups: Mapping[str, int] | None = None, *, plans: int = 4, seed: int = 0) -> Graph:
    """Tries every group of a model that uses an operator between layers with weights.

    Each plan's cut must equal the view (outputs and gradients, float64), and the original in which the slices that read
    the removed units are zero. A group over which something computes statistics without a module of its own has no such
    oracle: it is compared with the view only.

    Args:
        model: small, with parameters before and after the operator; a float64 copy is tried.
        example: arguments of one call.
        groups: name -> number of units that must be found; None: at least one.
        plans: random plans, besides one that keeps half of every group.

    Raises:
        NotConforming: with the plan, and where it differs.
    """
    torch.manual_seed(seed)
    model = lively(model, seed).double().eval()
    example = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, example)
    graph = understand(model, example)
    frozen = "; ".join(f"{f.address}: {f.reason}" for f in graph.frozen)
    if groups is not None and graph.sizes != dict(groups):
        raise NotConforming(f"expected the groups {dict(groups)}, found {graph.sizes}; frozen: {frozen}")
    if not graph.groups:
        raise NotConforming(f"nothing is prunable around the operator; frozen: {frozen}")
    silent = unspoken(model, graph)
    for number in range(plans + 1):
        for without in (frozenset[str](), frozenset(silent)) if silent else (frozenset[str](),):
            plan = _plan(graph, random.Random(seed * 1000 + number) if number else None, without)
            _try(model, graph, plan, example, spoken=not silent or bool(without))
    return graph


def _plan(graph: Graph, dice: random.Random | None, without: frozenset[str]) -> Plan:
    """Half of every group, or random units of each."""
    widths = {}
    for group in graph.groups:
        if group.name in without:
            continue
        count = dice.randint(1, group.size) if dice else (group.size + 1) // 2
        widths[group.name] = tuple(sorted(dice.sample(range(group.size), count))) if dice else tuple(range(count))
    return Plan(graph.program.fingerprint, widths)


def _try(model: nn.Module, graph: Graph, plan: Plan, example: Any, *, spoken: bool) -> None:
    choice = ", ".join(f"{name}: {list(kept)}" for name, kept in plan.widths.items())
    try:
        made = cut(model, graph, plan)
    except CannotRewrite as error:
        raise NotConforming(f"the program cannot follow the plan {{{choice}}}: {error}") from None
    if not made.proof.holds:
        raise NotConforming(f"with the plan {{{choice}}} the cut differs from the view: {made.proof.where}, {made.proof.error:.1e}")
    if not spoken:
        return
    with torch.no_grad(), double_precision():
        got, wanted = (pytree.tree_leaves(m(*example)) for m in (made.model.eval(), oracle(model, graph, plan).eval()))
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if not isinstance(a, Tensor):
            continue
        gap = float((a - b).abs().max() / (b.abs().max() + 1e-30)) if a.shape == b.shape else float("inf")
        if not gap <= TOLERANCE:
            raise NotConforming(f"with the plan {{{choice}}} output {i} differs from the zeroed original by {gap:.1e} (relative)")


__all__ = [
    "Context",
    "Labels",
    "NotConforming",
    "Parameter",
    "Work",
    "conform",
    "contract",
    "follow",
    "meet",
    "merge",
    "reduce",
    "rule",
    "set_argument",
]
