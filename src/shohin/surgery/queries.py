"""Which rows of a projection are the queries of an attention, and of nothing else.

Scaled dot-product attention divides by the square root of the head dim. Where head dims are cut, the query rows are
multiplied by sqrt(new / old), so that the scores stay what they were and the operator needs no other argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from shohin.graph.labels.movement import MOVEMENT, move
from shohin.program import Program, concrete, family, shape_of
from shohin.program.nodes import arguments


def query_rows(program: Program, attention: fx.Node) -> tuple[tuple[str, ...], Tensor] | None:
    """The names of a projection's weight and bias, and the rows that reach the queries of ``attention``.

    Returns:
        None if the queries are not plainly moved rows of one linear layer, or if anything else reads these rows.
    """
    linear = arguments(attention)[0]
    while _moves(linear):
        linear = linear.all_input_nodes[0]
    if family(linear) != "linear" or linear.op != "call_function":
        return None
    tensors = [n for n in linear.all_input_nodes if n.name in program.names]
    names = tuple(program.names[n.name] for n in tensors)
    same = [sum(t is program.tensors[name] for t in program.tensors.values()) for name in names]
    if len(tensors) != len(linear.all_input_nodes) - 1 or any(len(n.users) > 1 for n in tensors) or max(same, default=2) > 1:
        return None
    reads = _reads(linear)
    mine = [rows for node, rows in reads if node is attention and rows.shape == shape_of(arguments(attention)[0])]
    if not mine or not _only_queries(attention):
        return None
    queries = torch.from_numpy(np.unique(mine[0].numpy()))
    others = [rows for node, rows in reads if node is not attention or rows is not mine[0]]
    if any(torch.isin(rows, queries).any() for rows in others):
        return None
    return names, queries


def _only_queries(attention: fx.Node) -> bool:
    return all(a is not arguments(attention)[0] for a in arguments(attention)[1:])


def _moves(node: Any) -> bool:
    """True if the operation only moves its one tensor."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
    return len(tensors) == 1 and node.all_input_nodes[0] is tensors[0] and (family(node) in MOVEMENT or family(node) == "getitem")


def _reads(linear: fx.Node) -> list[tuple[fx.Node, Tensor]]:
    """(operation, rows that it reads) for everything that is not movement."""
    shape = shape_of(linear)
    values: dict[fx.Node, Any] = {linear: torch.arange(shape[-1]).expand(shape)}
    reads: list[tuple[fx.Node, Tensor]] = []
    for node in linear.graph.nodes:
        known = [n for n in node.all_input_nodes if n in values]
        if not known:
            continue
        if _moves(node):
            args: Any = fx.map_arg(node.args, lambda n: values[n] if n in values else concrete(n.meta["val"]))
            values[node] = args[0][args[1]] if family(node) == "getitem" else move(node, list(args))
        elif node.op == "output" or isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            reads.extend((node, rows) for n in known for rows in _tensors(values[n]))
    return reads


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
