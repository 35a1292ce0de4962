"""The operations that cost time, as polynomials of the widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import fx

from shohin.graph.costs import Extent, Operator, Term
from shohin.graph.labels.core import Array, Labels
from shohin.graph.regions import Region
from shohin.graph.units import UnitGroup
from shohin.program import Program, family, shape_of

#: fused into their neighbour or free in every runtime that folds: no cost of their own
FREE = frozenset(
    ["batch_norm", "relu", "relu6", "hardtanh", "clamp", "dropout", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "getitem", "sym_size", "detach", "alias", "clone", "contiguous", "expand"]
)


class Extents:
    """Sizes of label axes as functions of widths."""

    def __init__(self, groups: Sequence[UnitGroup], label_count: int) -> None:
        self._groups = groups
        self._member: list[np.ndarray] = []
        for group in groups:
            mask = np.zeros(label_count, bool)
            mask[np.concatenate(group.units)] = True
            self._member.append(mask)

    def axis(self, data: Array, axis: int, size: int) -> tuple[float, tuple[Extent, ...]]:
        """(coefficient, extents) whose product is the size of an axis; ``data`` are its tensor's compressed labels."""
        if data.shape[axis] == 1:
            return 1.0, (Extent(size, {}),)
        other = tuple(d for d in range(data.ndim) if d != axis)
        per_unit: dict[str, int] = {}
        covered = np.zeros(data.shape[axis], int)
        present = []
        for group, member in zip(self._groups, self._member, strict=True):
            inside = member[data]
            if not inside.any():
                continue
            line = np.isin(data, group.units[0]).all(axis=other)
            if line.any():
                per_unit[group.name] = int(line.sum())
                covered += inside.all(axis=other)
                present.append(group)
        if len(present) == 2 and (covered == 2).all():  # rows = head x dim: a product of two widths
            a, b = present
            return size / (a.size * b.size), (Extent(0, {a.name: 1}), Extent(0, {b.name: 1}))
        fixed = size - sum(per_unit[g.name] * g.size for g in present)
        return 1.0, (Extent(fixed, per_unit),)

    def tensor(self, labels: Labels, skip: tuple[int, ...] = (0,)) -> Term:
        """Elements of an activation at batch 1 (axis 0 is skipped)."""
        return self.product([(labels.data, d, n) for d, n in enumerate(labels.shape) if d not in skip])

    def product(self, axes: Sequence[tuple[Array, int, int]], factor: float = 1.0) -> Term:
        """The product of several axes' sizes."""
        coefficient, extents = factor, []
        for data, axis, size in axes:
            c, e = self.axis(data, axis, size)
            coefficient *= c
            for extent in e:
                if extent.per_unit:
                    extents.append(extent)
                else:
                    coefficient *= extent.fixed
        return Term(coefficient, tuple(extents))


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
        elements = [extents.tensor(labels[n.name]) for n in (*node.all_input_nodes, node) if n.name in labels]
        inside = tuple(r.name for r in regions if node.name in r.nodes)
        out.append(Operator(origin.address, kind, tuple(macs), tuple(elements), tuple(weights), inside, origin.module))
    return out


def _work(
    program: Program, node: fx.Node, labels: Mapping[str, Labels], planes: Mapping[str, Sequence[Array]], extents: Extents
) -> tuple[str, list[Term], list[Term]]:
    name = family(node)
    result = labels[node.name]
    weight_name = next((program.names[a.name] for a in node.args[1:2] if isinstance(a, fx.Node) and a.name in program.names), None)
    own = [(result.data, d, n) for d, n in enumerate(result.shape) if d]
    weights = []
    for n in node.all_input_nodes:
        if n.name in program.names:
            tensor = program.names[n.name]
            shape = tuple(program.tensors[tensor].shape)
            weights.append(extents.product([(*_plane(planes[tensor], d, len(shape)), size) for d, size in enumerate(shape)]))
    if name.startswith("conv") and weight_name is not None:
        shape = tuple(program.tensors[weight_name].shape)
        kernel = int(np.prod(shape[2:]))
        transposed = name.startswith("conv_transpose")
        source = (
            own if not transposed else [(labels[node.args[0].name].data, d, n) for d, n in enumerate(labels[node.args[0].name].shape) if d]
        )
        macs = extents.product([*source, (*_plane(planes[weight_name], 1, len(shape)), shape[1])], kernel)
        size = "x".join(map(str, shape[2:]))
        grouped = len(node.args) > 6 and isinstance(node.args[6], int) and node.args[6] > 1
        kind = ("depthwise" if shape[1] == 1 else "groupconv") if grouped else "convtranspose" if transposed else "conv"
        return kind + size, [macs], weights
    if name == "linear" and weight_name is not None:
        shape = tuple(program.tensors[weight_name].shape)
        return "linear", [extents.product([*own, (*_plane(planes[weight_name], 1, 2), shape[1])])], weights
    if name in ("matmul", "bmm", "mm") and isinstance(node.args[0], fx.Node) and node.args[0].name in labels:
        a = labels[node.args[0].name]
        return "matmul", [extents.product([*own, (a.data, len(a.shape) - 1, a.shape[-1])])], weights
    if name == "scaled_dot_product_attention":
        q, k = (labels[n.name] for n in node.args[:2])
        rank = len(q.shape)
        rows = [(q.data, d, q.shape[d]) for d in range(1, rank)]
        keys = (k.data, rank - 2, k.shape[-2])
        return "attention", [extents.product([*rows, keys]), extents.product([*own, keys])], weights
    if name == "einsum":
        return "einsum", [], weights
    if name in ("layer_norm", "group_norm", "rms_norm", "softmax", "instance_norm"):
        return "norm", [], weights
    if "pool" in name or name in ("mean", "sum"):
        return "pool", [], weights
    if name in ("gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "mish", "elu", "exp"):
        return "activation", [], weights
    if name in (
        "cat",
        "stack",
        "permute",
        "transpose",
        "slice",
        "select",
        "split",
        "chunk",
        "unbind",
        "roll",
        "index",
        "pad",
        "constant_pad_nd",
    ):
        return "movement", [], weights
    return "elementwise", [], weights


def _plane(planes: Sequence[Array], axis: int, rank: int) -> tuple[Array, int]:
    """The plane that labels an axis of a parameter, or an unlabelled one."""
    for plane in planes:
        if plane.shape[axis] > 1:
            return plane, axis
    return np.zeros((1,) * rank, np.int64), axis


def macs_of(items: Sequence[Operator], kept: Mapping[str, int], skipped: frozenset[str] = frozenset()) -> float:
    """Total multiply-accumulates at batch 1."""
    return sum(t.at(kept) for op in items if not skipped & set(op.regions) for t in op.macs)


__all__ = ["FREE", "Extents", "macs_of", "operators", "shape_of"]
