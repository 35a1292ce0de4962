"""Which weights of a program can be sparse, and which cannot and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from shohin.errors import PlanError, closest
from shohin.evidence.rows import Window
from shohin.graph import Graph
from shohin.program import Program, family
from shohin.program.nodes import argument
from shohin.pruning.sparse.patterns import Pattern

CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))


@dataclass(frozen=True)
class SparseWeight:
    """One weight that can be sparse.

    Args:
        name: of the tensor; of tied ones the first.
        names: all of its names.
        nodes: the operations that multiply with it, in the program's order.
        kind: what they are. A depthwise convolution has one input channel for each output.
        shape: ``[O, I / groups, *kernel]``.
        groups: of the convolution.
    """

    name: str
    names: tuple[str, ...]
    nodes: tuple[str, ...]
    kind: Literal["linear", "convolution", "depthwise"]
    shape: tuple[int, ...]
    groups: int = 1

    def misfit(self, pattern: Pattern) -> str:
        """Why the weight cannot have the pattern, or ""."""
        if self.kind == "depthwise" and pattern.kind != "unstructured":
            return "a depthwise convolution can only be unstructured"
        if (self.shape[0] // self.groups) % pattern.height:
            return f"the {self.shape[0] // self.groups} outputs of a group are not divisible into blocks of {pattern.height}"
        return pattern.misfit(self.shape)


def window_of(node: fx.Node, shape: tuple[int, ...]) -> Window | None:
    """The geometry of a convolution with a weight of this shape; None for a linear layer."""
    if family(node) not in CONVOLUTIONS:
        return None
    stride, padding, dilation, groups = (argument(node, i, d) for i, d in ((3, 1), (4, 0), (5, 1), (6, 1)))
    return Window(tuple(shape[2:]), stride, padding, dilation, int(groups))


def sparse_weights(graph: Graph) -> dict[str, SparseWeight]:
    """Name -> weight, for every weight that only linear layers and convolutions read, in the program's order."""
    return {w.name: w for w in _all(graph.program)[0]}


def dense_weights(graph: Graph) -> dict[str, str]:
    """Name -> why it stays dense, for every other parameter with two dimensions or more."""
    return _all(graph.program)[1]


def patterns_for(graph: Graph, pattern: Pattern | str) -> tuple[dict[str, Pattern], dict[str, str]]:
    """One pattern wherever it fits, and for each weight that stays dense the reason.

    An input axis that N:M does not divide, or a matrix that blocks do not, leaves the whole layer dense: a remainder that no
    runtime could use is not made.
    """
    pattern = Pattern.parse(pattern)
    chosen, left = {}, dense_weights(graph)
    for name, weight in sparse_weights(graph).items():
        why = weight.misfit(pattern)
        if why:
            left[name] = why
        else:
            chosen[name] = pattern
    return chosen, left


def chosen_weights(graph: Graph, patterns: Mapping[str, Pattern | str]) -> dict[str, tuple[SparseWeight, Pattern]]:
    """Weight and pattern of each name (any of a tied weight's names), in the program's order.

    Raises:
        PlanError: if a name is unknown or cannot be sparse, a pattern does not fit, or a tied weight is chosen twice, differently.
    """
    known = sparse_weights(graph)
    by_name = {alias: w for w in known.values() for alias in w.names}
    found: dict[str, tuple[SparseWeight, Pattern]] = {}
    for name, text in patterns.items():
        pattern = Pattern.parse(text)
        if name not in by_name:
            why = dense_weights(graph).get(name)
            raise PlanError(f"{name} cannot be sparse: {why}" if why else f"the model has no weight {name!r}{closest(name, by_name)}")
        weight = by_name[name]
        why = weight.misfit(pattern)
        if why:
            raise PlanError(f"{name} {weight.shape} cannot be {str(pattern)!r}: {why}; leave it dense or choose another pattern")
        if found.get(weight.name, (weight, pattern))[1] != pattern:
            raise PlanError(f"{name} is one tensor with {weight.name}, which has another pattern")
        found[weight.name] = (weight, pattern)
    return {name: found[name] for name in known if name in found}


def _all(program: Program) -> tuple[list[SparseWeight], dict[str, str]]:
    readers: dict[int, list[tuple[fx.Node, fx.Node]]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.names:
            readers.setdefault(id(program.tensors[program.names[node.name]]), []).extend((user, node) for user in node.users)
    names: dict[int, list[str]] = {}
    for name, tensor in program.tensors.items():
        if name in program.trainable and tensor.dim() > 1 and tensor.is_floating_point():
            names.setdefault(id(tensor), []).append(name)
    sparse, dense = [], {}
    for key, aliases in names.items():
        shape = tuple(program.tensors[aliases[0]].shape)
        why = _reason(readers.get(key, []))
        if why:
            dense[aliases[0]] = why
        else:
            nodes = [user for user, _ in readers[key]]
            groups = {int(argument(n, 6, 1)) if family(n) in CONVOLUTIONS else 1 for n in nodes}
            if len(groups) > 1:
                dense[aliases[0]] = "convolutions with other numbers of groups share it"
                continue
            kind: Literal["linear", "convolution", "depthwise"] = "convolution" if family(nodes[0]) in CONVOLUTIONS else "linear"
            if kind == "convolution" and shape[1] == 1 and groups != {1}:
                kind = "depthwise"
            sparse.append(SparseWeight(aliases[0], tuple(aliases), tuple(n.name for n in nodes), kind, shape, groups.pop()))
    order = {n.name: i for i, n in enumerate(program.graph.nodes)}
    return sorted(sparse, key=lambda w: order[w.nodes[0]]), dense


def _reason(readers: list[tuple[fx.Node, fx.Node]]) -> str:
    """Why a weight with these readers stays dense, or ""."""
    if not readers:
        return "nothing reads it"
    for user, weight in readers:
        if family(user) not in (*CONVOLUTIONS, "linear") or argument(user, 1) is not weight or user.args.count(weight) > 1:
            return f"{family(user)} reads it, which is neither a convolution nor a linear layer"
    if len({family(user) for user, _ in readers}) > 1:
        return "layers of several kinds share it"
    return ""
