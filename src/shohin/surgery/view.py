"""A view: the model seen through a plan, as a program with sliced tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from shohin.graph import Frozen, Graph, understand_program, with_costs
from shohin.plan import Plan
from shohin.program import ProgramModule, capture
from shohin.surgery.rewrite import attempt, rewrite
from shohin.surgery.rewritten import Rewritten


def understand(model: nn.Module, example: Any) -> Graph:
    """What can be chosen in a model: groups, regions, costs, and what is frozen and why.

    Args:
        example: arguments of one call (a tuple of tensors, or a `shohin.data.Call`); dimension 0 is the batch.

    Raises:
        ModelError: if the model does not run on the example or cannot be captured.
    """
    return confirm(understand_program(capture(model, example)))


def confirm(graph: Graph) -> Graph:
    """The graph without the groups that the program's integers cannot follow; these are frozen, with the reason.

    Alternate units of all groups are removed at once and the program is rewritten; where an operation cannot follow, the
    groups that reach it are tried one by one.
    """
    fingerprint = graph.program.fingerprint
    tried = {g.name: tuple(range(0, g.size, 2)) for g in graph.groups}
    failed = attempt(graph, Plan(fingerprint, tried))[1]
    if not failed:
        return graph
    groups, frozen = [], list(graph.frozen)
    for group in graph.groups:
        alone = attempt(graph, Plan(fingerprint, {group.name: tried[group.name]}))[1]
        if alone:
            frozen.append(Frozen(group.name, str(next(iter(alone.values())))))
        else:
            groups.append(group)
    return with_costs(replace(graph, groups=tuple(groups), frozen=tuple(frozen)))


def view(graph: Graph, plan: Plan) -> ProgramModule:
    """The program through a plan's widths and skips, with its own sliced parameters and buffers.

    Raises:
        PlanError: if the plan is for another model.
        CannotRewrite: if an operation cannot follow.
    """
    return view_of(graph, rewrite(graph, plan))


def view_of(graph: Graph, rewritten: Rewritten) -> ProgramModule:
    """A module from a rewritten program; its tensors are copies (of the kept parts only), tied where the model's are."""
    program = graph.program
    used = {program.names[n.name] for n in rewritten.graph.nodes if n.name in program.names}
    wanted = {id(program.tensors[name]) for name in used}
    copies: dict[int, Tensor] = {}
    tensors = {}
    for name, tensor in program.tensors.items():
        if id(tensor) not in wanted:
            continue
        if id(tensor) not in copies:
            own = rewritten.own(name)
            copies[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if name in program.trainable else own
        tensors[name] = copies[id(tensor)]
    return ProgramModule(program, rewritten.graph, tensors)
