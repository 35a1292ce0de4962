"""Why a repaired class does not equal the view: its own program beside the rewritten one."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.errors import ShohinError
from shohin.program import Program, capture, concrete
from shohin.program.nodes import flatten
from shohin.surgery.rewritten import Rewritten
from shohin.surgery.sources import where


def first_difference(program: Program, rewritten: Rewritten, repaired: nn.Module) -> str:
    """The first operation whose constants differ, with its line; "" if none does or the class runs other operations."""
    found = _difference(program, rewritten, repaired)
    return f"{found[2]} would have to become {found[1]} at {where(program, found[0])}, and its source is not known" if found else ""


def differing_node(program: Program, rewritten: Rewritten, repaired: nn.Module) -> str:
    """The name of that operation."""
    found = _difference(program, rewritten, repaired)
    return found[0] if found else ""


def _difference(program: Program, rewritten: Rewritten, repaired: nn.Module) -> tuple[str, Any, Any] | None:
    args, kwargs = pytree.tree_unflatten(list(program.example), program.in_spec)
    try:
        captured = capture(repaired, Call(tuple(args), kwargs, None, None)).graph
    except ShohinError:
        return None
    for node, other in zip_longest(_operations(rewritten.graph), _operations(captured)):
        if node is None or other is None or node.target is not other.target:
            return None
        for mine, theirs in zip(_constants(node), _constants(other), strict=False):
            if mine != theirs:
                return node.name, mine, theirs
    return None


def _operations(graph: fx.Graph) -> list[fx.Node]:
    """Operations on tensors; sizes that are read are not among them."""
    return [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), (torch.Tensor, tuple, list))]


def _constants(node: fx.Node) -> list[Any]:
    values = flatten((tuple(node.args), tuple(v for _, v in sorted(node.kwargs.items()))))
    found = [concrete(v.meta["val"]) if isinstance(v, fx.Node) and isinstance(v.meta.get("val"), torch.SymInt) else v for v in values]
    return [v for v in found if isinstance(v, (int, float)) and not isinstance(v, bool)]
