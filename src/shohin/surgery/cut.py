"""A cut: a plan applied to a copy of the user's own class, with proof; the program as a module where that fails."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shohin.errors import ModelError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.program import Program, ProgramModule, first_lines
from shohin.surgery.classes.differences import Difference, adapted, differences, text
from shohin.surgery.classes.grafts import grafts
from shohin.surgery.classes.repair import Skip, repairs
from shohin.surgery.proof import Proof, prove, user_line
from shohin.surgery.rewrite import rewrite
from shohin.surgery.rewritten import Rewritten
from shohin.surgery.view import view_of

__all__ = ["Cut", "Skip", "cut", "cut_sharing_values", "state_by_name"]


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut model.

    Args:
        model: the user's own class if ``form`` is "module", a `ProgramModule` if it is "program".
        form: "module" or "program".
        reason: why the user's class, or its ``parts``, could not be repaired; "" if all could.
        proof: of ``model`` against the view.
        removed: tensor name -> {axis: removed indices}.
        rewritten: the program through the plan.
        parts: paths of modules inside the user's class that run as programs, because their own forward cannot follow.
    """

    model: nn.Module
    form: str
    reason: str
    proof: Proof
    removed: dict[str, dict[int, list[int]]]
    rewritten: Rewritten
    parts: tuple[str, ...] = ()


def cut(model: nn.Module, graph: Graph, plan: Plan, *, form: str = "module") -> Cut:
    """Removes physically what the plan removes, in a copy.

    Args:
        model: the module that the graph was made from; it is not changed.
        form: "module" tries the user's class first; "program" returns the program form at once.

    Raises:
        PlanError: if the plan is for another model.
        CannotRewrite: if an operation cannot follow the plan.
        ModelError: if the model has other tensors than when it was understood.
    """
    _check_same(model, graph.program)
    rewritten = rewrite(graph, plan)
    view = view_of(graph, rewritten)
    removed = {
        name: {axis: sorted(set(range(graph.program.tensors[name].shape[axis])) - set(indices.tolist())) for axis, indices in axes.items()}
        for name, axes in rewritten.kept.items()
    }
    reason = "asked for" if form == "program" else ""
    if not reason:
        for repaired in repairs(model, graph, plan, rewritten):
            if isinstance(repaired, str):
                reason = reason or repaired
                continue
            proof = prove(graph.program, repaired, view)
            failure = _fails_in_training(model, repaired, graph.program) if proof.holds else ""
            if failure:
                reason = reason or failure
                continue
            if proof.holds:
                return Cut(repaired, "module", "", proof, removed, rewritten)
            found = differences(graph.program, repaired, rewritten) if proof.error < float("inf") else []
            reason = reason or _reason(graph.program, proof, found)
            scaled = _with_scales(model, graph, plan, rewritten, view, found)
            if scaled is not None:
                return Cut(scaled[0], "module", "", scaled[2], removed, scaled[1])
        for grafted in grafts(model, graph, plan, rewritten):
            if not isinstance(grafted, str):
                proof = prove(graph.program, grafted.model, view)
                if proof.holds and not _fails_in_training(model, grafted.model, graph.program):
                    return Cut(grafted.model, "module", reason, proof, removed, rewritten, grafted.paths)
    again = view_of(graph, rewritten)
    again.train(model.training)
    return Cut(again, "program", reason, prove(graph.program, again, view), removed, rewritten)


def _check_same(model: nn.Module, program: Program) -> None:
    """A program holds the tensors that the model had: weights that were put in their place since would be left out."""
    types = {program.names[n.name]: n.meta["val"].dtype for n in program.graph.nodes if n.name in program.names}
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, tensor in program.tensors.items():
        now = own.get(name, tensor)
        if now is not tensor or now.dtype is not types.get(name, now.dtype):
            what = f"{name} is {now.dtype} now" if now is tensor else f"{name} is another tensor now"
            raise ModelError(f"the model has changed since it was understood: {what}; understand it again, and make the plan for that")


def _fails_in_training(model: nn.Module, repaired: nn.Module, program: Program) -> str:
    """How the repaired class fails in training mode where the user's own runs; "" if it does not.

    Asked only where the captured call does not read some parameter: an auxiliary head, say, that only training runs, may be fed by what
    has become narrower.
    """
    unread = [program.names[n.name] for n in program.graph.nodes if n.name in program.names and not n.users]
    if not set(unread) & program.trainable:
        return ""
    args, kwargs = pytree.tree_unflatten(list(program.example), program.in_spec)
    failures = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for one in (model, repaired):
            try:
                deepcopy(one).train()(*args, **kwargs)
                failures.append("")
            except Exception as error:  # whatever the user's forward raises
                failures.append(f"{type(error).__name__}: {first_lines(error, 1)}{user_line(error)}")
    mine, theirs = failures
    return (
        f"in training mode the class fails, with parameters that the captured call does not read ({unread[0]}): {theirs}"
        if not mine and theirs
        else ""
    )


def _with_scales(
    model: nn.Module, graph: Graph, plan: Plan, rewritten: Rewritten, view: ProgramModule, found: list[Difference]
) -> tuple[nn.Module, Rewritten, Proof] | None:
    """The user's class with the scales that its forward computes, and parameters that make up for them; proved twice: it equals the
    program with these scales, in outputs and gradients, and that program has the view's outputs.
    """
    other = adapted(graph.program, rewritten, found) if found else None
    if other is None:
        return None
    seen = view_of(graph, other)
    more = replace(other, scaled={name: rows for name, rows in other.scaled.items() if name not in rewritten.scaled})
    if not prove(graph.program, seen, view, gradients=False, relate=more.scale).holds:
        return None
    for repaired in repairs(model, graph, plan, other):
        if not isinstance(repaired, str):
            proof = prove(graph.program, repaired, seen)
            if proof.holds:
                return repaired, other, proof
    return None


def _reason(program: Program, proof: Proof, found: list[Difference]) -> str:
    """Why a repaired class was not proved, with the source line."""
    if proof.error == float("inf"):
        return proof.where
    differs = f"the repaired class does not equal the view ({proof.where}, relative error {proof.error:.1e})"
    return f"{differs}: {text(program, found[0])}" if found else differs


def cut_sharing_values(model: nn.Module, graph: Graph, plan: Plan) -> Cut:
    """A cut whose tensors can be put into the rewritten program and back.

    A class whose query rows had to be scaled holds other values than the program, which writes the scale out: the program form then.
    """
    made = cut(model, graph, plan)
    return cut(model, graph, plan, form="program") if made.form == "module" and made.rewritten.scaled else made


def state_by_name(rewritten: Rewritten, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A full state dict reduced to what a cut keeps: loads a checkpoint of the original into a cut model."""
    return {name: rewritten.scale(name, rewritten.slice(name, tensor)) for name, tensor in state.items()}
