"""A cut: a plan applied to a copy of the user's own class, with proof; the program as a module where that fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shohin.graph import Graph
from shohin.plan import Plan
from shohin.program import Place, Program, structural_copy
from shohin.program.nodes import flatten
from shohin.surgery.proof import Proof, prove
from shohin.surgery.rewrite import Rewritten, rewrite
from shohin.surgery.view import view_of


class Skip(nn.Module):
    """Stands where a skipped module stood: returns its first argument."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input, unchanged."""
        return x


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut model.

    Args:
        model: the user's own class if ``form`` is "module", a `ProgramModule` if it is "program".
        form: "module" or "program".
        reason: why the user's class could not be repaired; "" if it could.
        proof: of ``model`` against the view.
        removed: tensor name -> {axis: removed indices}.
        rewritten: the program through the plan.
    """

    model: nn.Module
    form: str
    reason: str
    proof: Proof
    removed: dict[str, dict[int, list[int]]]
    rewritten: Rewritten


def cut(model: nn.Module, graph: Graph, plan: Plan, *, form: str = "module") -> Cut:
    """Removes physically what the plan removes, in a copy.

    Args:
        model: the module that the graph was made from; it is not changed.
        form: "module" tries the user's class first; "program" returns the program form at once.

    Raises:
        PlanError: if the plan is for another model.
        CannotRewrite: if an operation cannot follow the plan.
    """
    rewritten = rewrite(graph, plan)
    view = view_of(graph, rewritten)
    removed = {
        name: {axis: sorted(set(range(graph.program.tensors[name].shape[axis])) - set(indices.tolist())) for axis, indices in axes.items()}
        for name, axes in rewritten.kept.items()
    }
    reason = "asked for" if form == "program" else ""
    if not reason:
        repaired = _repair(model, graph, plan, rewritten)
        if isinstance(repaired, str):
            reason = repaired
        else:
            proof = prove(graph.program, repaired, view)
            if proof.holds:
                return Cut(repaired, "module", "", proof, removed, rewritten)
            reason = f"the repaired class does not equal the view: {proof.where}, relative error {proof.error:.1e}"
            reason = _sourceless(graph.program, rewritten) or reason
    again = view_of(graph, rewritten)
    again.train(model.training)
    return Cut(again, "program", reason, prove(graph.program, again, view), removed, rewritten)


def cut_sharing_values(model: nn.Module, graph: Graph, plan: Plan) -> Cut:
    """A cut whose tensors can be put into the rewritten program and back.

    A class whose query rows had to be scaled holds other values than the program, which writes the scale out: the program form then.
    """
    made = cut(model, graph, plan)
    return cut(model, graph, plan, form="program") if made.form == "module" and made.rewritten.scaled else made


def _repair(model: nn.Module, graph: Graph, plan: Plan, rewritten: Rewritten) -> nn.Module | str:
    """A copy with sliced tensors, repaired integers and skipped modules; a sentence that says why not."""
    program = graph.program
    for name in rewritten.mended:
        origin = program.origins[name]
        return f"{origin.address} needs more than another integer: {origin.line or 'no source line'}"
    wanted = _wanted(program, rewritten)
    if isinstance(wanted, str):
        return wanted
    for name in plan.skips:
        if graph.region(name).module is None:
            return f"the skipped region {name} is part of a forward, not a module of its own"
    replace: dict[int, Any] = {}
    for name in rewritten.kept:
        tensor, own = program.tensors[name], rewritten.own(name)
        replace[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in replace:
            own = tensor.detach().clone()
            replace[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    copy = structural_copy(model, replace)
    for place, value in wanted.items():
        _assign(copy.get_submodule(place.module), place.attribute, place.index, value)
    for name in plan.skips:
        path = graph.region(name).module or ""
        parent, _, leaf = path.rpartition(".")
        copy.get_submodule(parent)._modules[leaf] = Skip()
    _describe(copy)
    return copy


def _wanted(program: Program, rewritten: Rewritten) -> dict[Place, int] | str:
    """Place -> new value, or why there is none: a source asked for two values.

    A constant without a source may follow by itself (it was read off a shape): the proof decides. Every position that a
    source reaches is a constraint, also those that do not change. Sources with one factor are solved first, then products
    with one unknown factor.
    """
    changes = {(c.node, c.position): c for c in rewritten.changes}
    nodes = {n.name: n for n in program.graph.nodes}
    left = {n.name for n in rewritten.graph.nodes}
    constraints = []
    for key, source in program.sources.items():
        value = changes[key].new if key in changes else flatten(nodes[key[0]].args)[key[1]]
        if key[0] in left and isinstance(value, int):
            constraints.append((source, value, key))
    known: dict[Place, int] = {}
    for factors in (1, 2, 3):
        for source, value, key in (c for c in constraints if len(c[0].factors) == factors):
            solved = source.solve(value, known)
            if isinstance(solved, tuple):
                known[solved[0]] = solved[1]
            elif not solved and (key in changes or all(place in known for place, _ in source.factors)):
                return f"{source} is asked for two values or a fraction (at {_where(program, key[0])})"
    current = {place: value for source, _, _ in constraints for place, value in source.factors}
    return {place: value for place, value in known.items() if value != current[place]}


def _sourceless(program: Program, rewritten: Rewritten) -> str:
    """Names the first constant that had to change and whose source is not known."""
    for change in rewritten.changes:
        if (change.node, change.position) not in program.sources:
            return f"the constant {change.old} at {_where(program, change.node)} has no known source and must become {change.new}"
    return ""


def _where(program: Program, node: str) -> str:
    origin = program.origins.get(node)
    return f"{origin.address}: {origin.line}" if origin else node


def _assign(module: nn.Module, attribute: str, index: int | None, value: int) -> None:
    owner: Any = module
    *path, leaf = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    if index is None:
        setattr(owner, leaf, value)
    else:
        old = list(getattr(owner, leaf))
        old[index] = value
        setattr(owner, leaf, type(getattr(owner, leaf))(old))


def _describe(model: nn.Module) -> None:
    """Attributes of torch's own modules that describe their parameters and are read by users, not by forward."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        shape = tuple(weight.shape)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
        elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_features = shape[0]
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = shape[1]


def state_by_name(rewritten: Rewritten, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A full state dict reduced to what a cut keeps: loads a checkpoint of the original into a cut model."""
    return {name: rewritten.scale(name, rewritten.slice(name, tensor)) for name, tensor in state.items()}
