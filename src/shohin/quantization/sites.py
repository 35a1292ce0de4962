"""Sites: which tensors of a program need codes so that the chosen layers run on integers, and which share a grid.

The rules are those under which integer runtimes keep integer kernels: codes on the input and output of every integer
convolution, sum, concatenation and pooling; after a fused activation, not before it; the same grid on both sides of an
operation that only moves data. A linear layer may leave floats, which is cheaper before normalization, softmax or GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from shohin.program import Program, family
from shohin.program.fold import CONVOLUTIONS

LAYERS = CONVOLUTIONS | {"linear"}
FUSED = {"relu": (0.0, None), "relu6": (0.0, 6.0), "hardtanh": (None, None), "clamp": (None, None), "clamp_min": (None, None)}
MOVES = frozenset(
    [
        "max_pool1d",
        "max_pool2d",
        "flatten",
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "transpose",
        "permute",
        "slice",
        "select",
        "unflatten",
        "expand",
    ]
)
PADS = frozenset(("pad", "constant_pad_nd"))
IDENTITY = frozenset(["dropout", "contiguous", "alias", "clone", "detach"])
JOINS = frozenset(("add", "mul", "cat"))
POOLS = frozenset(["mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d"])


@dataclass(frozen=True)
class Sites:
    """Where activations have codes.

    Args:
        grids: node name -> name of the node whose grid it uses (itself, or the one that it only moves).
        low, high: node name -> bound that a fused activation sets on the values, where there is one.
        layers: address of each layer that computes on integers -> its weight's name.
        readers: node that a floating operation (or the caller) makes -> operations with integer kernels that read it. Where it is smoothed
            they alone take its codes, and all others go on with its floats.
    """

    grids: Mapping[str, str]
    low: Mapping[str, float]
    high: Mapping[str, float]
    layers: Mapping[str, str]
    readers: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def own(self) -> list[str]:
        """Nodes that have a grid of their own, in program order."""
        return [n for n, g in self.grids.items() if n == g]


def quantizable(program: Program) -> list[str]:
    """Addresses of the layers that can compute on integers: convolutions and linear layers with a weight of the model."""
    return [program.origins[n.name].address for n in program.graph.nodes if _is_layer(program, n)]


def weight_of(program: Program, node: fx.Node) -> str | None:
    """The name of the weight that a node contracts with as a layer; None if it is no layer with a weight of the model."""
    if node.op != "call_function" or family(node) not in LAYERS or not isinstance(node.args[1], fx.Node):
        return None
    return program.names.get(node.args[1].name)


def table_of(program: Program, node: fx.Node) -> str | None:
    """The name of the table that an embedding looks up; None if a node is no embedding of the model's."""
    if node.op != "call_function" or family(node) != "embedding" or not isinstance(node.args[0], fx.Node):
        return None
    return program.names.get(node.args[0].name)


def held_by(program: Program, node: fx.Node) -> str | None:
    """The name of what a node may hold in fewer bits, the weight of a layer or the table of an embedding; None if it is neither."""
    return weight_of(program, node) or table_of(program, node)


def _is_layer(program: Program, node: fx.Node) -> bool:
    return weight_of(program, node) is not None


def find_sites(program: Program, layers: set[str]) -> Sites:
    """The sites for a set of layer addresses, in a program whose batch normalizations are folded."""
    grids: dict[str, str] = {}
    chosen: dict[str, str] = {}
    order = [n for n in program.graph.nodes if n.op == "call_function"]
    for node in order:
        if _is_layer(program, node) and program.origins[node.name].address in layers:
            args: Any = node.args
            chosen[program.origins[node.name].address] = program.names[args[1].name]
            source = base(args[0])
            grids[source.name] = source.name
            while is_zero_pad(source):  # zeros are on every grid, and runtimes fuse the padding into the convolution
                args = source.args
                source = base(args[0])
                grids[source.name] = source.name
            if family(node) in CONVOLUTIONS:
                out = activated(node)
                grids[out.name] = out.name
    changed = True
    while changed:
        changed = False
        for node in order:
            out = activated(node) if family(node) in ("add", "mul") else node
            if out.name in grids:
                continue
            tensors = [base(n) for n in _tensors(program, node)]
            if not tensors or any(t.name in program.names for t in tensors) or len(_tensors(program, node)) != _operands(node):
                continue
            name = family(node)
            moves = name in MOVES and _made_of_integers(
                program, tensors[0], grids, chosen
            )  # floats are moved as floats, rounded where they are read
            if (
                (name in JOINS or name in POOLS or moves)
                and all(t.name in grids for t in tensors)
                and _worthwhile(program, node, tensors, layers)
            ):
                grids[out.name] = out.name
                changed = True
    names = {n.name: n for n in program.graph.nodes}
    ordered = [n.name for n in program.graph.nodes if n.name in grids]
    shared = {name: _root(names[name], grids) for name in ordered}
    low, high = {}, {}
    for name in ordered:
        a, b = _bounds(names[name])
        if a is not None:
            low[name] = a
        if b is not None:
            high[name] = b
    readers = {n: _readers(program, names[n], grids, chosen) for n in ordered if not _made_of_integers(program, names[n], grids, chosen)}
    return Sites(shared, low, high, chosen, {name: nodes for name, nodes in readers.items() if nodes})


def _made_of_integers(program: Program, node: fx.Node, grids: Mapping[str, str], layers: Mapping[str, str]) -> bool:
    """True if an integer kernel makes a node that has a grid, so that its codes are all there is of it."""
    if node.op != "call_function":
        return False
    name = family(node)
    if name in CONVOLUTIONS:
        return program.origins[node.name].address in layers
    if name in FUSED:
        source: Any = node.args[0]
        return _made_of_integers(program, base(source), grids, layers)
    if name in JOINS or name in POOLS or name in MOVES or is_zero_pad(node):
        tensors = _tensors(program, node)
        return len(tensors) == _operands(node) and all(base(t).name in grids for t in tensors)
    return False


def _readers(program: Program, node: fx.Node, grids: Mapping[str, str], layers: Mapping[str, str]) -> frozenset[str]:
    """The operations with integer kernels that read a node."""
    found, waiting = set(), list(node.users)
    while waiting:
        user = waiting.pop()
        if user.op != "call_function":
            continue
        if family(user) in IDENTITY:
            waiting.extend(user.users)
            continue
        layer = _is_layer(program, user) and program.origins[user.name].address in layers and base(user.args[0]) is node  # type: ignore[arg-type]
        other = family(user) in JOINS | POOLS | MOVES or is_zero_pad(user)
        if layer or (other and {user.name, activated(user).name} & grids.keys()):
            found.add(user.name)
    return frozenset(found)


def integer_layers(program: Program, sites: Sites) -> list[fx.Node]:
    """The nodes of the layers that compute on integers, in program order."""
    return [n for n in program.graph.nodes if n.op == "call_function" and program.origins[n.name].address in sites.layers]


def _operands(node: fx.Node) -> int:
    if family(node) == "cat":
        return len(node.args[0])  # type: ignore[arg-type]
    return 2 if family(node) in ("add", "mul") else 1


def _tensors(program: Program, node: fx.Node) -> list[fx.Node]:
    sources: list[fx.Node] = []
    args: Any = node.args
    flat = args[0] if family(node) == "cat" else args[: _operands(node)]
    for a in flat:
        if isinstance(a, fx.Node) and _is_tensor(a):
            sources.append(a)
    return sources


def _is_tensor(node: fx.Node) -> bool:
    import torch

    return isinstance(node.meta.get("val"), torch.Tensor)


def _worthwhile(program: Program, node: fx.Node, tensors: list[fx.Node], layers: set[str]) -> bool:
    """Float operands (a linear layer's output before a residual sum) are cheaper left alone: all must come from integers."""
    return all(_from_integers(program, t, layers) for t in tensors)


def _from_integers(program: Program, node: fx.Node, layers: set[str]) -> bool:
    if node.op == "placeholder":
        return False
    name = family(node)
    if name in FUSED:
        source: Any = node.args[0]
        return _from_integers(program, source, layers)
    if name == "linear":
        return False
    if name in CONVOLUTIONS:
        return program.origins[node.name].address in layers
    return True


def base(node: fx.Node) -> fx.Node:
    """The node behind operations that do nothing in evaluation."""
    while node.op == "call_function" and family(node) in IDENTITY:
        source: Any = node.args[0]
        node = source
    return node


def activated(node: fx.Node) -> fx.Node:
    """The fused activation that alone reads a layer, or the layer."""
    users = list(node.users)
    while len(users) == 1 and users[0].op == "call_function" and family(users[0]) in IDENTITY:
        users = list(users[0].users)
    if len(users) == 1 and users[0].op == "call_function" and family(users[0]) in FUSED:
        return users[0]
    return node


def is_zero_pad(node: fx.Node) -> bool:
    """Constant padding with zeros."""
    args: Any = node.args
    if node.op != "call_function" or family(node) not in PADS:
        return False
    value = args[2:] if family(node) == "constant_pad_nd" else args[3:]
    mode = args[2] if family(node) == "pad" and len(args) > 2 else "constant"
    return mode == "constant" and (not value or not value[0]) and not node.kwargs.get("value")


def _root(node: fx.Node, grids: Mapping[str, str]) -> str:
    while node.op == "call_function" and (family(node) in MOVES or is_zero_pad(node)):
        source: Any = node.args[0]
        source = base(source)
        if source.name not in grids:
            break
        node = source
    return node.name


def _bounds(node: fx.Node) -> tuple[float | None, float | None]:
    if node.op != "call_function":
        return None, None
    name = family(node)
    if name in ("relu", "relu6"):
        return FUSED[name]
    if name in ("hardtanh", "clamp", "clamp_min"):
        args: Any = node.args
        low = args[1] if len(args) > 1 else -1.0 if name == "hardtanh" else None
        high = args[2] if len(args) > 2 else 1.0 if name == "hardtanh" else None
        return (None if low is None else float(low)), (None if high is None else float(high))
    return None, None
