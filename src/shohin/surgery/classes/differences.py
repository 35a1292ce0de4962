"""Where a repaired class does not equal the view: its own program beside the rewritten one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.errors import ShohinError
from shohin.program import Program, capture, concrete, family
from shohin.program.nodes import flatten
from shohin.surgery.classes.sources import where
from shohin.surgery.rewritten import Rewritten
from shohin.surgery.scales import Scaling, settle


@dataclass(frozen=True, eq=False)
class Difference:
    """One constant.

    Args:
        node: operation of the rewritten graph.
        position: among its flattened arguments, keywords last, by name.
        wanted: what the view has.
        found: what the repaired class has.
    """

    node: fx.Node
    position: int
    wanted: float
    found: float


def differences(program: Program, repaired: nn.Module, rewritten: Rewritten) -> list[Difference]:
    """All constants that differ; none if the class runs other operations, or cannot be captured."""
    args, kwargs = pytree.tree_unflatten(list(program.example), program.in_spec)
    try:
        captured = capture(repaired, Call(tuple(args), kwargs, None, None)).graph
    except ShohinError:
        return []
    found: list[Difference] = []
    for node, other in zip_longest(_operations(rewritten.graph), _operations(captured)):
        if node is None or other is None or node.target is not other.target:
            return found[:1]  # of operations that come first, the constants can be compared
        found.extend(_constants(node, other))
    return found


def text(program: Program, difference: Difference) -> str:
    """What would have to become what, and where."""
    place = where(program, difference.node.name)
    return f"{difference.found} would have to become {difference.wanted} at {place}, and its source is not known"


def adapted(program: Program, rewritten: Rewritten, found: list[Difference]) -> Rewritten | None:
    """The program with the class's own scales, and rows of parameters that make up for them; None if anything else differs.

    A forward that divides its scores by ``math.sqrt(self.head_dim)`` follows the head dim, which its reshapes need; the meaning of a
    plan does not.
    """
    nodes = {n.name: n for n in program.graph.nodes}
    scalings = []
    for one in found:
        factor = _factor(one)
        tensors = [n for n in nodes[one.node.name].all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if factor is None or not tensors:
            return None
        scalings.append(Scaling(nodes[one.node.name], tensors[0], factor))
    scaled, refused = settle(program, scalings)
    if refused or not scaled or set(scaled) & set(rewritten.scaled):
        return None
    graph = fx.Graph()
    graph.output(graph.graph_copy(rewritten.graph, {}))
    own = {n.name: n for n in graph.nodes}
    for one in found:
        node = own[one.node.name]
        if one.position < len(flatten(node.args)):
            node.args = tuple(one.found if i == one.position else a for i, a in enumerate(node.args))
        else:
            node.kwargs = {**node.kwargs, "scale": one.found}
    return replace(rewritten, graph=graph, scaled={**rewritten.scaled, **scaled})


def _factor(one: Difference) -> float | None:
    """What the operation's tensor must be multiplied by; None if that cannot help."""
    name = family(one.node)
    if name == "scaled_dot_product_attention" or (name == "mul" and one.position == 1):
        return one.wanted / one.found if one.found else None
    if name == "div" and one.position == 1:
        return one.found / one.wanted if one.wanted else None
    return None


def _operations(graph: fx.Graph) -> list[fx.Node]:
    """Operations on tensors; sizes that are read are not among them, nor what only lays a tensor out (torch leaves it out at times)."""
    found = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), (torch.Tensor, tuple, list))]
    return [n for n in found if family(n) not in ("contiguous", "clone", "alias")]


def _constants(node: fx.Node, other: fx.Node) -> Iterator[Difference]:
    for position, (mine, theirs) in enumerate(zip(_values(node), _values(other), strict=False)):
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (mine, theirs))
        if numbers and mine != theirs:
            yield Difference(node, position, mine, theirs)


def _values(node: fx.Node) -> list[Any]:
    values = flatten((tuple(node.args), tuple(v for _, v in sorted(node.kwargs.items()))))
    return [concrete(v.meta["val"]) if isinstance(v, fx.Node) and isinstance(v.meta.get("val"), torch.SymInt) else v for v in values]
