"""Rules of your own: how an operator passes on what is prunable, how its integers follow a cut, and a test that both are right.

    from shohin.extend import Context, conform, follow, merge, rule

    @rule("mylib::my_gate")                            # the operator's name, without overload
    def my_gate(context: Context, node, args):
        return merge(context, node, *args)             # elementwise: labels that meet are united

    conform(ModelAroundMyGate(), (x,), groups={"first.weight": 8})

A rule gets the labels of the arguments and returns those of the result. `merge` is for what works element by element,
`reduce` for sums and means over axes, `contract` for Einstein summations, `Context.collapse` for what treats an axis alike,
`Context.bind` ties an axis of a weight; NotImplemented freezes what the operator touches, by name. Register before
`understand`; a later rule replaces an earlier one. An operator that takes sizes of prunable axes as integers needs `follow` too:
without it, or where it is wrong, `understand` freezes the groups that the operator cannot follow, and says so.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.errors import ShohinError
from shohin.graph import Graph, UnitGroup
from shohin.graph.labels.algebra import contract, meet, merge, reduce
from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.core import Labels, axes_of, compress
from shohin.graph.labels.rules import Rule
from shohin.graph.labels.rules import rule as label_rule
from shohin.graph.labels.walk import propagate
from shohin.plan import Plan
from shohin.program import concrete, family, shape_of
from shohin.program.inputs import call_of
from shohin.program.nodes import arguments, flatten, run
from shohin.surgery import CannotRewrite, cut, understand
from shohin.surgery.follow import FOLLOW, Follow
from shohin.surgery.moves import evaluate
from shohin.surgery.oracle import AVERAGE, NORMALIZE, lively, oracle, removed_slices, unspoken
from shohin.surgery.precision import double_precision
from shohin.surgery.work import Work, set_argument

#: largest relative difference from the oracles, in float64
TOLERANCE = 1e-9
#: operators that sum over what two activations share
CONTRACTIONS = frozenset(
    (
        "linear",
        "matmul",
        "mm",
        "bmm",
        "baddbmm",
        "addmm",
        "mv",
        "dot",
        "einsum",
        "scaled_dot_product_attention",
        "conv1d",
        "conv2d",
        "conv3d",
    )
)


class NotConforming(ShohinError):
    """A rule is wrong: a cut differs from what it must compute."""


def rule(*families: str) -> Callable[[Rule], Rule]:
    """Registers a label rule for operators by name ("my_gate"): see `shohin.graph.labels.rules.rule` for what it gets and gives.

    Their integers are taken to be independent of prunable sizes until `follow` says how they change; each rewritten call is
    run on tensors without values and must give the shape that the labels predict.
    """

    def register(function: Rule) -> Rule:
        for name in families:
            FOLLOW.setdefault(name, check_shapes)
        return label_rule(*families)(function)

    return register


def follow(*families: str) -> Callable[[Follow], Follow]:
    """Registers how the integers of operators follow a plan; the shapes that they give are checked.

    The function gets (`Work`, the original node, its copy) and changes the copy, by `set_argument`; ``work.of(node)`` are the
    labels of a node's tensor, ``work.shape(labels)`` the shape that stays, ``work.kept(labels)`` the kept indices of the axes that
    shrink. It raises `CannotRewrite` where the arguments cannot follow.
    """

    def register(function: Follow) -> Follow:
        def checked(work: Work, node: fx.Node, copy: fx.Node) -> None:
            function(work, node, copy)
            check_shapes(work, node, copy)

        for name in families:
            FOLLOW[name] = checked
        return function

    return register


def check_shapes(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """Runs a rewritten call on tensors without values.

    Raises:
        CannotRewrite: if it fails, or gives another shape than the labels predict.
    """
    labels = work.graph.labels.get(node.name)
    wanted = [work.shape(one) for one in (labels if isinstance(labels, tuple) else (labels,)) if isinstance(one, Labels)]
    original = {work.use(n, node): n for n in node.all_input_nodes}

    def now(n: fx.Node) -> Any:
        old = original.get(n)
        if old is None:
            return evaluate(work, n)
        val, kept = old.meta["val"], work.stays(old)
        if not isinstance(val, Tensor):
            return concrete(val)
        return torch.empty([len(kept[d]) if d in kept else size for d, size in enumerate(shape_of(old))], dtype=val.dtype)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = run(copy, *fx.map_arg((copy.args, copy.kwargs), now))
    except Exception as error:  # whatever the operator raises means that it does not take what stays
        raise CannotRewrite(f"the operator does not run on what stays: {str(error).splitlines()[0]}") from None
    shapes = [tuple(t.shape) for t in flatten(found if isinstance(found, (tuple, list)) else [found]) if isinstance(t, Tensor)]
    if wanted and shapes != wanted:
        raise CannotRewrite(f"the operator gives {shapes} where {wanted} would stay; its integers need a rule (shohin.extend.follow)")


def conform(model: nn.Module, example: Any, groups: Mapping[str, int] | None = None, *, plans: int = 4, seed: int = 0) -> Graph:
    """Tries every group of a model that uses an operator between layers with weights.

    Each plan's cut must equal, in float64, the view (outputs and gradients); the original in which every slice of the removed
    units is zero; and the original in which only the slices that *read* them are zero: an operator that mixes units changes
    what others receive, zero or not. A group over which something computes statistics without a module of its own has no
    such oracles: it is compared with the view only. A group that no weight reads (queries and keys) has not the last one.

    Args:
        model: small, with parameters before and after the operator; a float64 copy is tried. Its outputs must be finite where
            units are zero.
        example: arguments of one call: a tuple, a dict of keyword arguments, or one tensor.
        groups: name -> number of units that must be found; None: at least one.
        plans: random plans, besides one that keeps half of every group; these cut, in turn, all groups and only those that
            have the oracles.

    Raises:
        NotConforming: with the plan, and where it differs.
    """
    torch.manual_seed(seed)
    model = lively(copy.deepcopy(model), seed).double().eval()
    call = call_of(pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, example))
    graph = understand(model, call)
    frozen = "; ".join(f"{f.address}: {f.reason}" for f in graph.frozen)
    if groups is not None and graph.sizes != dict(groups):
        raise NotConforming(f"expected the groups {dict(groups)}, found {graph.sizes}; frozen: {frozen}")
    if not graph.groups:
        raise NotConforming(f"nothing is prunable around the operator; frozen: {frozen}")
    trial = _trial(model, graph, call)
    for number in range(plans + 1):
        for without in trial.rounds if number == 0 else (trial.rounds[number % len(trial.rounds)],):
            _try(trial, _plan(graph, random.Random(seed * 1000 + number) if number else None, without))
    return graph


@dataclass(frozen=True, eq=False)
class _Trial:
    """A model and what can be said of cutting it.

    Args:
        silent: groups that have no oracle.
        indirect: groups that no weight reads, or that are normalized: what reads them cannot be told from what makes them.
        produced: (tensor, axis) that a weight produces; all other slices of a unit read it.
    """

    model: nn.Module
    graph: Graph
    call: Call
    silent: frozenset[str]
    indirect: frozenset[str]
    produced: frozenset[tuple[str, int]]

    @property
    def rounds(self) -> list[frozenset[str]]:
        """Groups to leave whole: none; those that would silence the first oracle; those that would silence the second."""
        every = {g.name for g in self.graph.groups}
        return [s for s in dict.fromkeys((frozenset(), self.silent, self.silent | self.indirect)) if s != every]


def _trial(model: nn.Module, graph: Graph, call: Call) -> _Trial:
    produced = frozenset(propagate(graph.program).produced)
    known, reduced, indirect = set[int](), set[int](), set[int]()
    uses: dict[int, int] = {}
    for node in graph.program.graph.nodes:
        operands = [n for n in flatten([arguments(node), list(node.kwargs.values())]) if isinstance(n, fx.Node)]
        for tensor in (id(graph.program.tensors[graph.program.names[n.name]]) for n in operands if n.name in graph.program.names):
            uses[tensor] = uses.get(tensor, 0) + 1
        if node.op != "call_function":
            continue
        entering = [_axes(graph.groups, graph.labels.get(n.name)) for n in operands]
        leaving = _axes(graph.groups, graph.labels.get(node.name))
        lost = {g for found in entering for g in found if found[g] > leaving[g]}
        if family(node) in NORMALIZE | AVERAGE:
            known = known.union(*entering)
            reduced |= lost & set(leaving)
        met = {g for found in entering for g in found if sum(g in other for other in entering) > 1}
        indirect |= met if family(node) in CONTRACTIONS else met & lost
    names = [g.name for g in graph.groups]
    silent = {*unspoken(model, graph), *(g.name for i, g in enumerate(graph.groups) if i in reduced or (g.normalized and i not in known))}
    reused = {name for name in graph.planes if uses.get(id(graph.program.tensors[name]), 0) > 1}
    twice = {g.name for g in graph.groups if any(n in reused and (n, d) in produced for n, axes in g.slices.items() for d in axes)}
    apart = {names[i] for i in indirect} | twice | {g.name for g in graph.groups if g.normalized}
    return _Trial(model, graph, call, frozenset(silent), frozenset(apart), produced)


def _axes(groups: Sequence[UnitGroup], labels: Any) -> Counter[int]:
    """Number of each group whose units lie in a tensor -> along how many of its axes they lie."""
    found = Counter[int]()
    for one in labels if isinstance(labels, tuple) else (labels,):
        mine = Counter[int]()
        for plane in one.planes if isinstance(one, Labels) else ():
            for number, group in enumerate(groups):
                masks = (np.isin(plane, unit) for unit in group.units)
                mine[number] += next((len(axes_of(compress(mask.astype(np.int64)))) for mask in masks if mask.any()), 0)
        found |= mine
    return +found


def _plan(graph: Graph, dice: random.Random | None, without: frozenset[str]) -> Plan:
    """Half of every group, or random units of each."""
    widths = {}
    for group in graph.groups:
        if group.name in without:
            continue
        count = dice.randint(1, group.size) if dice else (group.size + 1) // 2
        widths[group.name] = tuple(sorted(dice.sample(range(group.size), count))) if dice else tuple(range(count))
    return Plan(graph.program.fingerprint, widths)


def _try(trial: _Trial, plan: Plan) -> None:
    choice = "with the plan {" + ", ".join(f"{name}: {list(kept)}" for name, kept in plan.widths.items()) + "}"
    try:
        made = cut(trial.model, trial.graph, plan)
    except CannotRewrite as error:
        raise NotConforming(f"{choice} the program cannot follow: {error}") from None
    if not made.proof.holds:
        raise NotConforming(f"{choice} the cut differs from the view: {made.proof.where}, {made.proof.error:.1e}")
    cutting = {n for n, kept in plan.widths.items() if len(kept) < trial.graph.sizes[n]}
    if cutting & trial.silent:
        return
    got = _outputs(made.model, trial.call)
    _compare(got, _outputs(oracle(trial.model, trial.graph, plan), trial.call), f"{choice} output", "the original with zeros for the units")
    if not cutting & trial.indirect:
        said = "the original in which nothing reads the units (the operator mixes what its rule keeps apart)"
        _compare(got, _outputs(_unread(trial, plan), trial.call), f"{choice} output", said)


def _unread(trial: _Trial, plan: Plan) -> nn.Module:
    """A copy in which the removed units are made but not read: all their slices are zero but those that a weight produces."""
    result = copy.deepcopy(trial.model)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, axes in removed_slices(trial.graph, plan).items():
            for axis, indices in axes.items():
                if name in parameters and (name, axis) not in trial.produced:
                    parameters[name].index_fill_(axis, torch.tensor(sorted(indices), dtype=torch.int64), 0)
    return result


def _outputs(module: nn.Module, call: Call) -> list[Any]:
    with torch.no_grad(), double_precision():
        return pytree.tree_leaves(module.eval()(*call.args, **call.kwargs))


def _compare(got: Sequence[Any], wanted: Sequence[Any], what: str, said: str) -> None:
    """Raises NotConforming at the first output that differs."""
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if not bool(b.isfinite().all()):
            raise NotConforming(f"{what} {i} of {said} is not finite: try the operator where zero is inside its domain")
        gap = float((a - b).abs().max() / (b.abs().max() + 1e-30)) if a.shape == b.shape else float("inf")
        if not gap <= TOLERANCE:
            raise NotConforming(f"{what} {i} differs by {gap:.1e} (relative) from {said}")


__all__ = [
    "CannotRewrite",
    "Context",
    "Labels",
    "NotConforming",
    "Parameter",
    "Work",
    "check_shapes",
    "conform",
    "contract",
    "follow",
    "meet",
    "merge",
    "reduce",
    "rule",
    "set_argument",
]
