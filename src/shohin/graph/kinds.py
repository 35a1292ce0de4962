"""What operations do with the units of a group, and what kind of unit that makes them: read from labels, never from names."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import fx

from shohin.graph.graph import Graph
from shohin.graph.labels.core import Array, Labels
from shohin.graph.units import UnitGroup
from shohin.program import family, shape_of
from shohin.program.nodes import argument

Kind = Literal["channel", "neuron", "head", "head dim", "width"]
Role = Literal["makes", "reads", "carries", "normalizes", "heads", "meets", "keeps", "adds"]

CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d", "convolution"])
TRANSPOSED = frozenset(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
RECURRENT = frozenset(["lstm", "gru", "rnn_tanh", "rnn_relu"])
#: products of activations -> places of the two operands
PRODUCTS = {"matmul": (0, 1), "bmm": (0, 1), "mm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
#: normalizations -> places of the input and the scale
NORMS = {"batch_norm": (0, 1), "instance_norm": (0, 1), "group_norm": (0, 2), "layer_norm": (0, 2), "rms_norm": (0, 2)}
#: reductions that measure a spread, by which a normalization written out by hand divides
SPREADS = frozenset(["var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "frobenius_norm"])


@dataclass(frozen=True, eq=False)
class Contraction:
    """An operation that contracts an axis of an activation with weights.

    Args:
        node: the operation.
        place: of the activation among its arguments.
        axis: of the activation that is contracted.
        weights: nodes of the weights; several for a recurrent layer (one for each direction of its first layer).
        inner, outer: contracted axis and output axis of each weight.
        out_axis: of the output; None where the output is no linear function of the input.
        groups: of a convolution.
        bias: True if a bias is added.
    """

    node: fx.Node
    place: int
    axis: int
    weights: tuple[fx.Node, ...]
    inner: int
    outer: int
    out_axis: int | None
    groups: int = 1
    bias: bool = False

    @property
    def depthwise(self) -> bool:
        """True if every input channel goes to outputs of its own: it passes units through."""
        return self.groups > 1 and shape_of(self.weights[0])[1] == 1 and self.groups == _size(self.node.args[self.place], 1)


@dataclass(frozen=True, eq=False)
class Use:
    """What one operation does with the units of one group.

    Args:
        node: name of the operation.
        family: of the operation.
        role: "makes" (with an output axis of a weight), "reads" (contracts them with a weight), "carries" (depthwise),
            "normalizes" (scales them, or computes statistics over them), "heads" (batch axis of a product of activations),
            "meets" (contracted in such a product), "keeps" (another axis of it), "adds" (carried past a residual branch).
        tensor: node name of the tensor whose axis holds the units: the weight for "makes" and "carries", else an activation.
        axis: of that tensor.
        owner: int64 (size of the axis,): the unit at each index, or -1.
        weight: node name of the scale of a normalization.
    """

    node: str
    family: str
    role: Role
    tensor: str
    axis: int
    owner: Array
    weight: str | None = None


_KNOWN: weakref.WeakKeyDictionary[Graph, dict[str, tuple[Use, ...]]] = weakref.WeakKeyDictionary()


def uses(graph: Graph) -> dict[str, tuple[Use, ...]]:
    """Group name -> what operations do with its units, in program order."""
    if graph not in _KNOWN:
        _KNOWN[graph] = _find_uses(graph)
    return _KNOWN[graph]


def kind(graph: Graph, group: UnitGroup) -> Kind:
    """What the units of a group are.

    - "width": the residual stream of a transformer: a layer or RMS normalization computes statistics over it, and residual
      additions carry it;
    - "head": whole heads, or groups of heads that share keys and values: a batch axis of a product of activations;
    - "head dim": the same place of every head: an axis that such a product contracts or keeps;
    - "channel": produced by a convolution;
    - "neuron": hidden features between linear layers, and all else.
    """
    mine = uses(graph)[group.name]
    roles = {u.role for u in mine}
    over = any(u.role == "normalizes" and u.family not in ("batch_norm", "instance_norm", "group_norm") for u in mine)
    if over and "adds" in roles:
        return "width"
    if "heads" in roles:
        return "head"
    if roles & {"meets", "keeps"} and "adds" not in roles:
        return "head dim"
    return "channel" if any(u.role in ("makes", "carries") and u.family in CONVOLUTIONS | TRANSPOSED for u in mine) else "neuron"


def static_nodes(graph: Graph) -> frozenset[fx.Node]:
    """Nodes whose value follows from the model's tensors alone: its weights, and what is computed from them."""
    found: set[fx.Node] = set()
    for node in graph.program.graph.nodes:
        if node.op == "placeholder":
            if node.name in graph.program.names:
                found.add(node)
        elif node.op == "call_function" and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def contraction(node: fx.Node, static: frozenset[fx.Node]) -> Contraction | None:
    """How an operation contracts an activation with weights; None if it does not."""
    if node.op != "call_function":
        return None
    name, args = family(node), node.args
    if name == "linear" or name in CONVOLUTIONS | TRANSPOSED:
        weight: Any = args[1]
        turned = name in TRANSPOSED or (name == "convolution" and bool(argument(node, 6)))
        if weight not in static or args[0] in static:
            return None
        rank = len(shape_of(node))
        axis = rank - 1 if name == "linear" else 1
        groups = int(argument(node, {"linear": 99, "convolution": 8}.get(name, 6), 1))
        return Contraction(node, 0, axis, (weight,), int(not turned), int(turned), axis, groups, argument(node, 2) is not None)
    if name in PRODUCTS:
        left, right = PRODUCTS[name]
        a: Any = args[left]
        b: Any = args[right]
        if b in static and a not in static and len(shape_of(b)) == 2:
            rank = len(shape_of(a))
            return Contraction(node, left, rank - 1, (b,), 0, 1, rank - 1, bias=left == 1)
        if a in static and b not in static and len(shape_of(a)) == 2 and len(shape_of(b)) >= 2:
            rank = len(shape_of(b))
            return Contraction(node, right, rank - 2, (a,), 1, 0, rank - 2, bias=left == 1)
    if name in RECURRENT and isinstance(args[2], (list, tuple)) and args[0] not in static:
        listed: list[Any] = list(args[2])
        layers, directions = int(argument(node, 4)), 1 + bool(argument(node, 7))
        count = len(listed) // (layers * directions)
        return Contraction(node, 0, len(shape_of(first_input(node))) - 1, tuple(listed[: count * directions : count]), 1, 0, None)
    return None


def first_input(node: fx.Node) -> fx.Node:
    """The first argument of an operation, which is a tensor."""
    first: Any = node.args[0]
    return first  # type: ignore[no-any-return]


def labels_of(graph: Graph, node: Any) -> Labels | None:
    """Labels of a node's tensor, the model's own tensors included; None where it has none."""
    if not isinstance(node, fx.Node):
        return None
    if node.name in graph.program.names:
        planes = graph.planes.get(graph.program.names[node.name], ())
        return Labels(tuple(p for p in planes if p.size > 1), shape_of(node))
    found = graph.labels.get(node.name)
    return found if isinstance(found, Labels) else None


class Owners:
    """Which unit of which group lies at each index of an axis."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._tables: dict[str, Array] = {}
        self._groups_of: dict[int, list[str]] = {}
        for group in graph.groups:
            for label in np.concatenate(group.units).tolist():
                self._groups_of.setdefault(label, []).append(group.name)

    def along(self, node: Any, axis: int) -> Iterator[tuple[str, Array]]:
        """(group, unit at each index or -1) of every group that an axis of a node's tensor holds."""
        labels = labels_of(self.graph, node)
        if labels is None or axis % len(labels.shape) not in labels.varying:
            return
        axis %= len(labels.shape)
        line = np.moveaxis(labels.plane(axis), axis, 0).reshape(labels.shape[axis], -1)
        for name in dict.fromkeys(g for label in dict.fromkeys(line[:, 0].tolist()) for g in self._groups_of.get(label, ())):
            owner = self._table(name)[line]
            if (owner == owner[:, :1]).all():
                yield name, owner[:, 0].copy()

    def _table(self, name: str) -> Array:
        if name not in self._tables:
            table = np.full(self.graph.label_count, -1, np.int64)
            for unit, classes in enumerate(self.graph.group(name).units):
                table[classes] = unit
            self._tables[name] = table
        return self._tables[name]


def _find_uses(graph: Graph) -> dict[str, tuple[Use, ...]]:
    owners, static = Owners(graph), static_nodes(graph)
    found: dict[str, list[Use]] = {g.name: [] for g in graph.groups}
    for node in graph.program.graph.nodes:
        if node.op != "call_function" or node in static:
            continue
        name = family(node)
        for role, tensor, axis, weight in _places(node, name, static):
            for group, owner in owners.along(tensor, axis):
                scale = weight.name if isinstance(weight, fx.Node) else None
                found[group].append(Use(node.name, name, role, tensor.name, axis % len(shape_of(tensor)), owner, scale))
    return {name: tuple(listed) for name, listed in found.items()}


Place = tuple[Role, fx.Node, int, Any]


def _places(node: fx.Node, name: str, static: frozenset[fx.Node]) -> list[Place]:
    """(role, tensor, axis, scale) of all that an operation does with axes."""
    args: Sequence[Any] = node.args
    layer = contraction(node, static)
    if layer is not None:
        if layer.depthwise:
            return [("carries", layer.weights[0], 0, None)]
        made = layer.weights if name not in RECURRENT else tuple(w for w in args[2] if w in static and len(shape_of(w)) == 2)
        return [("reads", args[layer.place], layer.axis, None), *(("makes", w, layer.outer, None) for w in made)]
    if name in CONVOLUTIONS | TRANSPOSED | {"linear", *RECURRENT}:
        return []
    if name == "embedding":
        return [("makes", args[0], 1, None)] if args[0] in static else []
    if name in NORMS:
        x, scale = args[NORMS[name][0]], argument(node, NORMS[name][1])
        rank = len(shape_of(x))
        axes = range(rank - len(args[1]), rank) if name in ("layer_norm", "rms_norm") else (1,)
        return [("normalizes", x, axis, scale) for axis in axes]
    if name in SPREADS or (name == "mean" and _squared(args[0])):
        return [("normalizes", args[0], axis, None) for axis in range(1, len(shape_of(args[0])))]
    if name == "add" and all(isinstance(a, fx.Node) and a not in static for a in args[:2]):
        left, right = args[:2]
        residual = shape_of(left) == shape_of(right) and (_feeds(left, right) or _feeds(right, left))
        return [("adds", left, axis, None) for axis in range(1, len(shape_of(left)))] if residual else []
    return _product(node, name, static)


def _product(node: fx.Node, name: str, static: frozenset[fx.Node]) -> list[Place]:
    args: Sequence[Any] = node.args
    if name == "scaled_dot_product_attention":
        q, k, v = args[:3]
        heads: list[Place] = [("heads", x, axis, None) for x in (q, k, v) for axis in range(1, len(shape_of(x)) - 2)]
        return [*heads, ("meets", q, -1, None), ("keeps", v, -1, None)]
    if name == "einsum" and isinstance(args[1], (list, tuple)) and not any(o in static for o in args[1]):
        return _einsum(args[0], args[1])
    if name not in PRODUCTS:
        return []
    left, right = (args[place] for place in PRODUCTS[name])
    if any(not isinstance(x, fx.Node) or x in static or len(shape_of(x)) < 2 for x in (left, right)):
        return []
    heads = [("heads", x, axis, None) for x in (left, right) for axis in range(1, len(shape_of(x)) - 2)]
    return [*heads, ("meets", left, -1, None), ("keeps", left, -2, None), ("keeps", right, -1, None)]


def _einsum(equation: str, operands: Sequence[fx.Node]) -> list[Place]:
    inputs, _, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    found: list[Place] = []
    if "..." in equation or not output or len(operands) != 2:
        return found
    for own, other, x in zip(letters, reversed(letters), operands, strict=True):
        for axis, letter in enumerate(own):
            role: Role = "keeps" if letter not in other else "heads" if letter in output else "meets"
            found.append((role, x, axis, None))
    return found


def _squared(node: Any) -> bool:
    """True for ``x ** 2`` however it is written."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    name = family(node)
    return name == "square" or (name == "pow" and isinstance(node.args[1], (int, float)) and node.args[1] == 2) or _of_itself(node, name)


def _of_itself(node: fx.Node, name: str) -> bool:
    return name == "mul" and node.args[0] is node.args[1]


def _feeds(start: fx.Node, end: fx.Node) -> bool:
    """True if a value goes into the other, whatever lies between."""
    seen, stack = {end}, [end]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is start:
                return True
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return False


def _size(node: Any, axis: int) -> int:
    return shape_of(node)[axis]
