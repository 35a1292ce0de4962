"""The operations that cost time, as polynomials of the widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import fx

from shohin.graph.costs import Edge, Extent, Operator, Term
from shohin.graph.labels.core import Array, Labels
from shohin.graph.regions import Region
from shohin.graph.units import UnitGroup
from shohin.program import Program, family
from shohin.program.nodes import argument, arguments

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

#: contractions
WEIGHTED = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "scaled_dot_product_attention",
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
    frozenset(["einsum"]): "einsum",
}


class Extents:
    """Sizes of label axes as functions of widths."""

    def __init__(self, groups: Sequence[UnitGroup], label_count: int) -> None:
        self._groups = groups
        self._unit: list[Array] = []  # for each group: label -> unit, or -1
        for group in groups:
            unit = np.full(label_count, -1, np.int64)
            for i, labels in enumerate(group.units):
                unit[labels] = i
            self._unit.append(unit)

    def axis(self, data: Array, axis: int, size: int) -> list[tuple[float, tuple[Extent, ...]]]:
        """Products of extents whose sum is the size of an axis; ``data`` are its tensor's compressed labels.

        Indices that one group removes give one linear extent; rows that two groups remove (head x dim) give a product.
        """
        if data.shape[axis] == 1:
            return [(1.0, (Extent(size, {}),))]
        lines = np.moveaxis(data, axis, 0).reshape(size, -1)
        owners = np.zeros((size, len(self._groups)), bool)
        for g, unit in enumerate(self._unit):
            of = unit[lines]
            owners[:, g] = (of[:, 0] >= 0) & (of == of[:, :1]).all(axis=1)
        kinds, counts = np.unique(owners, axis=0, return_counts=True)
        fixed, per_unit, products = 0, {}, []
        for kind, count in zip(kinds, counts.tolist(), strict=True):
            members = [self._groups[g] for g in np.flatnonzero(kind).tolist()]
            if not members:
                fixed = count
            elif len(members) == 1:
                per_unit[members[0].name] = count // members[0].size
            else:
                extents = tuple(Extent(0, {m.name: 1}) for m in members)
                products.append((count / math.prod(m.size for m in members), extents))
        return [*([(1.0, (Extent(fixed, per_unit),))] if fixed or per_unit else []), *products]

    def tensor(self, labels: Labels) -> list[Term]:
        """Elements of an activation at batch 1 (axis 0 is the batch)."""
        return self.product([(labels.data, d, n) for d, n in enumerate(labels.shape) if d])

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
    out = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.name not in labels or family(node) in FREE:
            continue
        origin = program.origins[node.name]
        kind, macs, weights = _work(program, node, labels, planes, extents)
        elements = [t for n in (*node.all_input_nodes, node) if n.name in labels for t in extents.tensor(labels[n.name])]
        inside = tuple(r.name for r in regions if node.name in r.nodes)
        out.append(Operator(origin.address, kind, tuple(macs), tuple(elements), tuple(weights), inside, origin.module))
    return out


def edges(program: Program, labels: Mapping[str, Labels], extents: Extents, costs: Sequence[Operator]) -> list[Edge]:
    """The tensors between operations that cost time (free ones in between do not count), in program order."""
    known = {op.address for op in costs}
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
            if start is not None and start != target:
                found.setdefault((start, target), Edge(start, target, tuple(extents.tensor(labels[tensor.name]))))
    return list(found.values())


def _work(
    program: Program, node: fx.Node, labels: Mapping[str, Labels], planes: Mapping[str, Sequence[Array]], extents: Extents
) -> tuple[str, list[Term], list[Term]]:
    """(kind, MACs, weight elements) of an operation."""
    name = family(node)
    tensors = [program.names[n.name] for n in node.all_input_nodes if n.name in program.names]
    weights = [t for tensor in tensors for t in extents.product(_axes(program, planes, tensor))]
    kind, macs = "elementwise", list[Term]()
    for families, label in KINDS.items():
        if name in families or (label == "pool" and "pool" in name):
            kind = label
    if name in WEIGHTED:
        kind, macs = _contraction(program, node, labels, planes, extents)
    return kind, macs, weights


def _contraction(
    program: Program, node: fx.Node, labels: Mapping[str, Labels], planes: Mapping[str, Sequence[Array]], extents: Extents
) -> tuple[str, list[Term]]:
    name, result = family(node), labels[node.name]
    args = arguments(node)
    operands = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    own = [(result.data, d, n) for d, n in enumerate(result.shape) if d]
    if name == "scaled_dot_product_attention":
        q, k = (labels[n.name] for n in operands)
        rank = len(q.shape)
        keys = (k.data, rank - 2, k.shape[-2])
        return "attention", [*extents.product([*((q.data, d, q.shape[d]) for d in range(1, rank)), keys]), *extents.product([*own, keys])]
    x = labels.get(operands[0].name)
    weight = program.names.get(operands[1].name)
    shape = tuple(program.tensors[weight].shape) if weight else ()
    if name.startswith("conv") and weight and x is not None:
        transposed = name.startswith("conv_transpose")
        source = [(x.data, d, n) for d, n in enumerate(x.shape) if d] if transposed else own
        macs = extents.product([*source, (*_plane(planes[weight], 1, len(shape)), shape[1])], math.prod(shape[2:]))
        grouped = isinstance(argument(node, 6), int) and argument(node, 6) > 1
        kind = ("depthwise" if shape[1] == 1 else "groupconv") if grouped else "convtranspose" if transposed else "conv"
        return kind + "x".join(map(str, shape[2:])), macs
    if name == "linear" and weight:
        return "linear", extents.product([*own, (*_plane(planes[weight], 1, 2), shape[1])])
    if x is not None:
        kind = "linear" if weight and name != "bmm" else "matmul"
        return kind, extents.product([*own, (x.data, len(x.shape) - 1, x.shape[-1])])
    return "matmul", []


def _axes(program: Program, planes: Mapping[str, Sequence[Array]], tensor: str) -> list[tuple[Array, int, int]]:
    shape = tuple(program.tensors[tensor].shape)
    return [(*_plane(planes[tensor], d, len(shape)), n) for d, n in enumerate(shape)]


def _plane(planes: Sequence[Array], axis: int, rank: int) -> tuple[Array, int]:
    """The plane that labels an axis of a parameter, or an unlabelled one."""
    for plane in planes:
        if plane.shape[axis] > 1:
            return plane, axis
    return np.zeros((1,) * rank, np.int64), axis


def macs_of(items: Sequence[Operator], kept: Mapping[str, int], skipped: frozenset[str] = frozenset()) -> float:
    """Total multiply-accumulates at batch 1."""
    return sum(t.at(kept) for op in items if not skipped & set(op.regions) for t in op.macs)
