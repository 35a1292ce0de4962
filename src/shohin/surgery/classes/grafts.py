"""Repairs of the last resort: the modules whose own forward cannot follow a plan run as programs, the rest is the user's class."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shohin.graph import Graph
from shohin.plan import Plan
from shohin.program import Program
from shohin.surgery.classes import attentions
from shohin.surgery.classes.differences import differences
from shohin.surgery.classes.repair import repairs
from shohin.surgery.classes.shares import record, share
from shohin.surgery.rewritten import Rewritten

#: rounds of blame; each takes in all modules of a class
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Grafted:
    """A copy in which some modules run as programs.

    Args:
        model: the copy, not yet proved.
        paths: of these modules.
    """

    model: nn.Module
    paths: tuple[str, ...]


def grafts(model: nn.Module, graph: Graph, plan: Plan, rewritten: Rewritten) -> Iterator[Grafted | str]:
    """Copies in which more and more modules run as programs; a string says why there is none."""
    program = graph.program
    found = attentions.attentions(model, rewritten)
    apart = attentions.inside(program, found) if not isinstance(found, str) else frozenset()
    paths = {program.origins[name].module for name in rewritten.mended if name not in apart}
    for _ in range(ROUNDS):
        paths = _outermost(_alike(model, program, rewritten, paths))
        if "" in paths:
            yield "the model's own forward cannot follow"
            return
        copy: nn.Module | None = None
        conflict = ""
        for one in repairs(model, graph, plan, rewritten, frozenset(paths)):
            if isinstance(one, str):
                conflict = conflict or one
            else:
                copy = one
                break
        if copy is None:
            yield conflict
            return
        if paths:
            recorded = record(model, program, paths)
            for path in sorted(paths):
                own = copy.get_submodule(path)
                made = share(program, rewritten, path, own, recorded[path])
                if isinstance(made, str):
                    yield made
                    return
                _put(copy, own, made)
            yield Grafted(copy, tuple(sorted(paths)))
        blamed = _failing(program, copy) or _differing(program, rewritten, copy)
        if blamed is None:
            return
        while blamed and any(blamed == p or blamed.startswith(p + ".") for p in paths):
            blamed = blamed.rpartition(".")[0]
        paths = paths | {blamed}


def _put(copy: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(copy.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _alike(model: nn.Module, program: Program, rewritten: Rewritten, paths: set[str]) -> set[str]:
    """With all modules of the same classes in which something changes: what one layer cannot do, no layer can."""
    kinds = {type(model.get_submodule(p)) for p in paths}
    names = [c.node for c in rewritten.changes] + list(rewritten.mended)
    touched = {program.origins[n].module for n in names if n in program.origins}
    above = {".".join(p.split(".")[:i]) for p in touched for i in range(1, len(p.split(".")) + 1)}
    same = {p for p, m in model.named_modules() if type(m) in kinds and p in above and not isinstance(m, nn.Sequential)}
    return paths | same


def _outermost(paths: set[str]) -> set[str]:
    return {p for p in paths if not any(p != q and (p.startswith(q + ".") or q == "") for q in paths)}


def _failing(program: Program, copy: nn.Module) -> str | None:
    """The innermost module of the user's whose forward raises on the example."""
    args, kwargs = pytree.tree_unflatten(list(program.example), program.in_spec)
    training = copy.training
    try:
        with torch.no_grad():
            copy.eval()(*args, **kwargs)
    except Exception as error:  # whatever the user's forward raises
        paths = {id(m): p for p, m in copy.named_modules()}
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in paths and not type(module).__module__.startswith("torch.nn"):
                return str(paths[id(module)])
    finally:
        copy.train(training)
    return None


def _differing(program: Program, rewritten: Rewritten, copy: nn.Module) -> str | None:
    """The module of the first constant that differs, or of the first that changed without a known source."""
    found = differences(program, copy, rewritten)
    names = [found[0].node.name] if found else [c.node for c in rewritten.changes if (c.node, c.position) not in program.sources]
    return next((program.origins[n].module for n in names if n in program.origins), None)
