"""Scores whose scale would change with a plan, and the rows of parameters that make up for it.

Attention divides its scores by the square root of the head dim: torch's operator by default, a user's class with a number that its
forward computes. Where head dims are cut, the rows of what the scores are made of are multiplied instead, so that the scores stay
what they were and the class needs no other number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, fx, nn

from shohin.graph.labels.movement import MOVEMENT, move
from shohin.program import Program, concrete, family, shape_of
from shohin.program.nodes import flatten

LAYERS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
#: one tensor in, and multiplying it multiplies what comes out
LINEAR = frozenset({"neg", "to", "_to_copy", "clone", "contiguous", "alias", "dropout", "getitem", "div", "view_as", "reshape_as"})
SUMS = frozenset({"add", "sub", "cat", "concat", "stack"})
#: either factor will do; the first is the queries by custom
PRODUCTS = frozenset({"mul", "matmul", "bmm", "einsum"})
NORMS = frozenset({"layer_norm", "rms_norm", "group_norm"})
#: ways that are tried for a value
MOST = 8


@dataclass(frozen=True, eq=False)
class Scaling:
    """What must be multiplied before an operation reads it.

    Args:
        reader: operation of the program.
        value: the argument of it.
        factor: the number.
    """

    reader: fx.Node
    value: fx.Node
    factor: float


@dataclass(frozen=True, eq=False)
class Share:
    """Rows of one parameter that one operation reads.

    Args:
        tensor: placeholder of the parameter.
        user: the operation.
        rows: indices along axis 0.
    """

    tensor: fx.Node
    user: fx.Node
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Way:
    """How a value is made.

    Args:
        ends: layers and placeholders of parameters: multiplying what they give multiplies the value.
        path: the operations between.
    """

    ends: tuple[fx.Node, ...]
    path: frozenset[fx.Node]


def settle(program: Program, wanted: Sequence[Scaling]) -> tuple[dict[str, tuple[Tensor, float]], list[Scaling]]:
    """Tensor name -> (rows, factor) for all scalings that rows can make up for, and the scalings for which they cannot.

    Rows can if they reach the value and nothing else, by movement, sums and products alone; a parameter that several operations
    read must be asked for the same by all of them.
    """
    shares = {s: _shares(program, s) for s in wanted}
    active = [s for s in wanted if shares[s]]
    while True:
        table: dict[fx.Node, list[tuple[Scaling, Share]]] = {}
        for scaling in active:
            for share in shares[scaling]:
                table.setdefault(share.tensor, []).append((scaling, share))
        wrong = {s for tensor, claims in table.items() if not _agree(program, tensor, claims) for s, _ in claims}
        if not wrong:
            break
        active = [s for s in active if s not in wrong]
    scaled = {program.names[tensor.name]: (claims[0][1].rows, claims[0][0].factor) for tensor, claims in table.items()}
    return scaled, [s for s in wanted if s not in active]


def _agree(program: Program, tensor: fx.Node, claims: list[tuple[Scaling, Share]]) -> bool:
    first, share = claims[0]
    own = program.tensors[program.names[tensor.name]]
    alone = sum(own is t for t in program.tensors.values()) == 1
    same = all(s.factor == first.factor and torch.equal(c.rows, share.rows) for s, c in claims)
    return alone and same and set(tensor.users) <= {c.user for _, c in claims}


def _shares(program: Program, scaling: Scaling) -> list[Share]:
    """What would have to be multiplied; nothing if that is not possible."""
    if sum(n is scaling.value for n in flatten((scaling.reader.args, tuple(scaling.reader.kwargs.values())))) != 1:
        return []
    ways = (_through(program, scaling, way) for way in _ways(program, scaling.value, {}))
    return next((found for found in ways if found), [])


def _through(program: Program, scaling: Scaling, way: Way) -> list[Share]:
    """The rows for one way, if nothing beside it reads them."""
    inside = {*way.path, scaling.reader}
    moved: set[fx.Node] = set()
    found: list[Share] = []
    for end in way.ends:
        if end.op == "call_function":
            values, reads = _reads(end)
            moved |= set(values)
            made = {end, *way.path}
            ours = [value in made and (r in way.path or (r is scaling.reader and value is scaling.value)) for r, value, _ in reads]
            mine = [rows for (_, _, rows), own in zip(reads, ours, strict=True) if own]
            others = [rows for (_, _, rows), own in zip(reads, ours, strict=True) if not own]
            wanted = torch.unique(torch.cat([rows.reshape(-1) for rows in mine])) if mine else torch.empty(0)
            tensors = [n for n in end.all_input_nodes if n.name in program.names]
            if not mine or any(torch.isin(rows, wanted).any() for rows in others) or len(tensors) != len(end.all_input_nodes) - 1:
                return []
            found += [Share(tensor, end, wanted) for tensor in tensors]
        else:
            found += [Share(end, user, torch.arange(shape_of(end)[0])) for user in end.users if user in inside]
    alone = all(user in inside for node in way.path if node not in moved for user in node.users if _computes(user))
    return found if alone else []


def _ways(program: Program, node: Any, known: dict[fx.Node, list[Way]]) -> list[Way]:
    """From which layers and parameters a value is made by sums and products."""
    if not isinstance(node, fx.Node):
        return []
    if node not in known:
        known[node] = list(islice(_ways_to(program, node, known), MOST))
    return known[node]


def _ways_to(program: Program, node: fx.Node, known: dict[fx.Node, list[Way]]) -> Iterator[Way]:
    if node.name in program.names:
        if isinstance(program.tensors[program.names[node.name]], nn.Parameter) and shape_of(node):
            yield Way((node,), frozenset())
        return
    name = family(node) if node.op == "call_function" else ""
    inputs = [a for a in flatten(node.args) if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), (Tensor, tuple, list))]
    parts: list[list[Way]]
    if name in LAYERS:
        yield Way((node,), frozenset())
        return
    if name in NORMS:
        parts = [_ways(program, a, known) for a in inputs[1:]]
    elif name in PRODUCTS:
        parts = [[w for a in sorted(inputs, key=lambda n: n.name not in program.names) for w in _ways(program, a, known)]]
    elif name in SUMS and len(inputs) == len(flatten(node.args[0] if name not in ("add", "sub") else node.args[:2])):
        parts = [_ways(program, a, known) for a in inputs]
    elif name in LINEAR or _moves(node):
        parts = [_ways(program, inputs[0], known)]
    else:
        return
    for ways in product(*parts) if parts else ():
        ends = tuple(dict.fromkeys(end for way in ways for end in way.ends))
        yield Way(ends, frozenset({node}).union(*(way.path for way in ways)))


def _computes(node: fx.Node) -> bool:
    """False for sizes that are read."""
    return node.op == "output" or isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _moves(node: Any) -> bool:
    """True if the operation only moves its one tensor."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
    return len(tensors) == 1 and node.all_input_nodes[0] is tensors[0] and (family(node) in MOVEMENT or family(node) == "getitem")


def _reads(layer: fx.Node) -> tuple[dict[fx.Node, Any], list[tuple[fx.Node, fx.Node, Tensor]]]:
    """The values that are moved rows of a layer, and (operation, value, rows) for everything that reads them and is not movement."""
    shape = shape_of(layer)
    rows = torch.arange(shape[-1]) if family(layer) == "linear" else torch.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    values: dict[fx.Node, Any] = {layer: rows.expand(shape)}
    reads: list[tuple[fx.Node, fx.Node, Tensor]] = []
    for node in layer.graph.nodes:
        known = [n for n in node.all_input_nodes if n in values]
        if not known:
            continue
        if _moves(node):
            args: Any = fx.map_arg(node.args, lambda n: values[n] if n in values else concrete(n.meta["val"]))
            values[node] = args[0][args[1]] if family(node) == "getitem" else move(node, list(args))
        elif _computes(node):
            reads.extend((node, n, part) for n in known for part in _tensors(values[n]))
    return values, reads


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
