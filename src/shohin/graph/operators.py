"""The operations that cost time, as polynomials of the widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import fx

from shohin.graph.costs import Edge, Extent, Operator, Term
from shohin.graph.labels.core import Array, Labels
from shohin.graph.macs import RECURRENT, contraction, contracts
from shohin.graph.regions import Region
from shohin.graph.sizes import Sizes
from shohin.graph.units import UnitGroup
from shohin.program import Program, family

#: fused into their neighbour or free in every runtime that folds: no cost of their own
FREE = frozenset(
    [
        "batch_norm",
        "relu",
        "relu6",
        "hardtanh",
        "clamp",
        "dropout",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "getitem",
        "sym_size",
        "detach",
        "alias",
        "clone",
        "contiguous",
        "expand",
    ]
)

#: classes of the rest, for latency regression
KINDS = {
    frozenset(["layer_norm", "group_norm", "rms_norm", "softmax", "instance_norm"]): "norm",
    frozenset(["mean", "sum"]): "pool",
    frozenset(["gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "mish", "elu", "exp"]): "activation",
    frozenset(
        ["cat", "stack", "permute", "transpose", "slice", "select", "split", "chunk", "unbind", "roll", "index", "pad", "constant_pad_nd"]
    ): "movement",
}


class Extents:
    """Sizes of label axes as functions of widths."""

    def __init__(self, groups: Sequence[UnitGroup], label_count: int) -> None:
        self._groups = groups
        self._known: dict[tuple[bytes, tuple[int, ...], int], list[tuple[float, tuple[Extent, ...]]]] = {}
        owned = [(np.concatenate(g.units), np.repeat(np.arange(g.size), [len(u) for u in g.units])) for g in groups]
        #: (memberships, labels): group of each label, or -1; a label of a head and of a dim has two
        self._group = np.full((1, label_count), -1, np.int64)
        self._unit = np.full((1, label_count), -1, np.int64)
        if owned:
            labels, units = (np.concatenate([o[i] for o in owned]) for i in (0, 1))
            self._fill(labels, np.repeat(np.arange(len(owned)), [len(o[0]) for o in owned]), units)

    def _fill(self, labels: Array, groups: Array, units: Array) -> None:
        row = 0
        while len(labels):
            if row == len(self._group):
                empty = np.full((1, self._group.shape[1]), -1, np.int64)
                self._group, self._unit = np.concatenate([self._group, empty]), np.concatenate([self._unit, empty])
            _, first = np.unique(labels, return_index=True)
            self._group[row, labels[first]], self._unit[row, labels[first]] = groups[first], units[first]
            left = np.setdiff1d(np.arange(len(labels)), first)
            labels, groups, units, row = labels[left], groups[left], units[left], row + 1

    def axis(self, data: Array, axis: int, size: int) -> list[tuple[float, tuple[Extent, ...]]]:
        """Products of extents whose sum is the size of an axis; ``data`` is the plane that varies on it.

        Indices that one group removes give one linear extent; rows that two groups remove (head x dim) give a product.
        """
        if data.shape[axis] == 1:
            return [(1.0, (Extent(size, {}),))]
        key = data.tobytes(), data.shape, axis
        if key not in self._known:
            self._known[key] = self._axis(np.moveaxis(data, axis, 0).reshape(size, -1))
        return self._known[key]

    def _axis(self, lines: Array) -> list[tuple[float, tuple[Extent, ...]]]:
        present = [int(g) for g in np.unique(self._group[:, lines[:, 0]]) if g >= 0]
        owners = np.zeros((len(lines), len(present)), bool)
        for column, g in enumerate(present):
            of = np.where(self._group[:, lines] == g, self._unit[:, lines], -1).max(axis=0)
            owners[:, column] = (of[:, 0] >= 0) & (of == of[:, :1]).all(axis=1)
        kinds, counts = np.unique(owners, axis=0, return_counts=True) if present else (np.zeros((1, 0), bool), np.array([len(lines)]))
        fixed, per_unit, products = 0, {}, []
        for kind, count in zip(kinds, counts.tolist(), strict=True):
            members = [self._groups[present[g]] for g in np.flatnonzero(kind).tolist()]
            if not members:
                fixed = count
            elif len(members) == 1:
                per_unit[members[0].name] = count // members[0].size
            else:
                extents = tuple(Extent(0, {m.name: 1}) for m in members)
                products.append((count / math.prod(m.size for m in members), extents))
        return [*([(1.0, (Extent(fixed, per_unit),))] if fixed or per_unit else []), *products]

    def tensor(self, labels: Labels) -> list[Term]:
        """Elements of a tensor without axis 0."""
        return self.product([(labels.plane(d), d, n) for d, n in enumerate(labels.shape) if d])

    def product(self, axes: Sequence[tuple[Array, int, int]], factor: float = 1.0) -> list[Term]:
        """The product of several axes' sizes, as a sum of terms."""
        terms = []
        for choice in itertools.product(*(self.axis(*a) for a in axes)):
            coefficient, extents = factor, []
            for c, factors in choice:
                coefficient *= c
                for extent in factors:
                    if extent.per_unit:
                        extents.append(extent)
                    else:
                        coefficient *= extent.fixed
            terms.append(Term(coefficient, tuple(extents)))
        return terms


def operators(
    program: Program, labels: Mapping[str, Labels], planes: Mapping[str, Sequence[Array]], extents: Extents, regions: Sequence[Region]
) -> list[Operator]:
    """Every operation that costs time, in program order."""
    sizes = Sizes(program, labels, planes, extents)
    out = []
    for node in program.graph.nodes:
        results = _results(node, labels)
        if not results or family(node) in FREE:
            continue
        origin = program.origins[node.name]
        kind, macs = contraction(sizes, node) if contracts(node) else (_kind(family(node)), [])
        tensors = [n for n in node.all_input_nodes if n.name in program.names]
        weights = [t for n in tensors for t in sizes.product(sizes.axes(n))]
        elements = [t for n in (*node.all_input_nodes, *results) if n.name in labels for t in sizes.elements(n)]
        inside = tuple(r.name for r in regions if node.name in r.nodes)
        out.append(Operator(origin.address, kind, tuple(macs), tuple(elements), tuple(weights), inside, origin.module))
    return out


def _results(node: fx.Node, labels: Mapping[str, Labels]) -> list[fx.Node]:
    """The nodes that hold what an operation computes: itself, or the parts that are read of what a recurrence returns."""
    if node.op != "call_function":
        return []
    if node.name in labels:
        return [node]
    return [n for n in node.users if n.name in labels] if family(node) in RECURRENT else []


def _kind(name: str) -> str:
    """Class of an operation without MACs."""
    return next((kind for families, kind in KINDS.items() if name in families or (kind == "pool" and "pool" in name)), "elementwise")


def edges(program: Program, labels: Mapping[str, Labels], extents: Extents, costs: Sequence[Operator]) -> list[Edge]:
    """The tensors between operations that cost time (free ones in between do not count), in program order."""
    known = {op.address for op in costs}
    sizes = Sizes(program, labels, {}, extents)
    found: dict[tuple[str, str], Edge] = {}

    def source(node: fx.Node) -> str | None:
        while node.op == "call_function" and program.origins[node.name].address not in known:
            if not node.all_input_nodes:
                return None
            node = node.all_input_nodes[0]
        if node.op == "placeholder":
            return None if node.name in program.names else ""
        return program.origins[node.name].address

    for node in program.graph.nodes:
        target = program.origins[node.name].address if node.op == "call_function" else ""
        if node.op == "placeholder" or (target and target not in known):
            continue
        for tensor in node.all_input_nodes:
            start = source(tensor) if tensor.name in labels else None
            if start is not None and start != target and (start, target) not in found:
                found[start, target] = Edge(start, target, tuple(sizes.elements(tensor)))
    return list(found.values())


def macs_of(items: Sequence[Operator], kept: Mapping[str, int], skipped: frozenset[str] = frozenset()) -> float:
    """Total multiply-accumulates at batch 1."""
    return sum(t.at(kept) for op in items if not skipped & set(op.regions) for t in op.macs)
