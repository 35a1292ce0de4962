"""A copy of the user's own class with the tensors and integers that a plan leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from shohin.graph import Graph
from shohin.plan import Plan
from shohin.program import Program, structural_copy
from shohin.surgery.classes import attentions
from shohin.surgery.classes.describe import describe
from shohin.surgery.classes.sources import assign, wanted, where
from shohin.surgery.rewritten import Rewritten


class Skip(nn.Module):
    """Stands where a skipped module stood: returns its first argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The input, unchanged."""
        return args[0] if args else next(iter(kwargs.values()))


def repairs(
    model: nn.Module, graph: Graph, plan: Plan, rewritten: Rewritten, replaced: frozenset[str] = frozenset()
) -> Iterator[nn.Module | str]:
    """Copies with sliced tensors, repaired integers, skipped modules and attention modules that hold their sizes.

    A copy has its own tensors (of the kept parts only); ties, shared modules, hooks, ``requires_grad`` and modes are the
    original's. It is not yet proved: where the program leaves more than one way, each is tried in turn. A string says why
    there is none.

    Args:
        replaced: paths of modules that will not run their own forward.
    """
    program = graph.program
    found = attentions.attentions(model, rewritten)
    if isinstance(found, str):
        yield found
        return
    apart = attentions.inside(program, found) | {
        name for name, o in program.origins.items() if any(o.module == p or o.module.startswith(p + ".") for p in replaced)
    }
    for name in rewritten.mended:
        if name not in apart:
            yield f"{where(program, name)} needs more than another integer"
            return
    skipped = graph.skipped(plan.skips)
    for region in skipped:
        if region.module is None:
            yield f"the skipped region {region.name} is part of a forward, not a module of its own"
            return
    solutions = wanted(program, rewritten, apart)
    if isinstance(solutions, str):
        yield solutions
        return
    for values in solutions:
        copy = structural_copy(model, own_tensors(model, program, rewritten))
        failed = assign(copy, values)
        if failed:
            yield failed
            continue
        attentions.apply(copy, found)
        copy = attentions.swapped_root(copy, found)
        for region in skipped:
            parent, _, leaf = (region.module or "").rpartition(".")
            copy.get_submodule(parent)._modules[leaf] = Skip()
        describe(copy)
        yield copy


def own_tensors(model: nn.Module, program: Program, rewritten: Rewritten) -> dict[int, Tensor]:
    """id of each tensor that the model holds -> the copy's own: the kept part, with its gradient flag.

    Plain tensor attributes that the program reads are among them.
    """
    replace: dict[int, Tensor] = {}
    for name in rewritten.kept:
        tensor = _attribute(model, name)
        tensor = program.tensors[name] if tensor is None else tensor
        if id(tensor) not in replace:
            replace[id(tensor)] = _like(tensor, rewritten.own(name))
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in replace:
            replace[id(tensor)] = _like(tensor, tensor.detach().clone())
    return replace


def _attribute(model: nn.Module, name: str) -> Tensor | None:
    owner: Any = model
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, Tensor) else None


def _like(tensor: Tensor, own: Tensor) -> Tensor:
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
