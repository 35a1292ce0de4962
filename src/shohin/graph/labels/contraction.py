"""Contractions: the contracted axis of both operands is united; a weight's output axis gets labels of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from shohin.graph.labels.context import Context, Parameter, rule
from shohin.graph.labels.core import Array, Labels, along, compress, rigid
from shohin.program import shape_of


def consume(context: Context, x: Labels, axis: int) -> tuple[Labels, Array | None]:
    """Unites labels that meet the same index of a weight's input axis.

    Returns:
        The labels again, and the label of each index along ``axis``; None if labels do not vary along it.
    """
    axis %= len(x.shape)
    if not x.varying:  # the only index of its axis never goes
        return rigid(x.shape), None
    if axis not in x.varying:
        return x, None
    moved = np.moveaxis(x.data, axis, 0).reshape(x.shape[axis], -1)
    context.classes.unite(moved, moved[:, :1])
    x = context.labels(x)
    if not x.varying:
        return rigid(x.shape), None
    return x, x.along(axis) if axis in x.varying else None


def contracted(context: Context, weight: Parameter, axis: int, vector: Array | None) -> None:
    """Labels the input axis of a weight; one use with an input that cannot shrink keeps it whole for all uses."""
    if vector is None:
        context.fixed(weight, axis)
    else:
        context.axis(weight, axis, vector)


def produce(
    context: Context, node: fx.Node, x: Labels, axis: int, vector: Array | None, weight: Parameter, bias: Any, weight_axis: int = 0
) -> Labels:
    """Labels of a contraction with a weight: fresh ones along the output axis, or those that ``x`` carries on other axes."""
    shape = shape_of(node)
    carried = vector is None and not x.rigid
    if carried:
        context.fixed(weight, weight_axis)
        if bias is not None:
            context.vector(bias, np.zeros(shape[axis], np.int64))
        return Labels(x.data, shape)
    fresh = context.classes.fresh(weight.shape[weight_axis])
    context.axis(weight, weight_axis, fresh)
    context.produced.add((weight.name, weight_axis))
    context.vector(bias, fresh)
    return along(axis, context.classes.find(fresh), shape)


@rule("linear")
def linear(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``x [..., in] @ weight[out, in].T + bias[out]``."""
    x, weight, bias = context.labels(args[0]), args[1], args[2] if len(args) > 2 else None
    if not isinstance(weight, Parameter):
        return NotImplemented
    x, vector = consume(context, x, -1)
    contracted(context, weight, 1, vector)
    return produce(context, node, x, len(x.shape) - 1, vector, weight, bias)


@rule("embedding")
def embedding(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``weight[vocabulary, width]`` looked up: the width gets labels, the vocabulary is never cut."""
    if not isinstance(args[0], Parameter):
        return NotImplemented
    shape = shape_of(node)
    fresh = context.classes.fresh(args[0].shape[1])
    context.axis(args[0], 1, fresh)
    context.produced.add((args[0].name, 1))
    context.fixed(args[0], 0)
    return along(len(shape) - 1, fresh, shape)


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``weight[out, in / groups, *kernel]`` over ``x[batch, in, *space]``; depthwise carries labels, groups tie equal positions."""
    x, weight, bias = context.labels(args[0]), args[1], args[2] if len(args) > 2 else None
    groups = args[6] if len(args) > 6 and isinstance(args[6], int) else 1
    if not isinstance(weight, Parameter) or len(x.shape) != len(weight.shape) or 0 in x.varying:
        return NotImplemented
    x = context.collapse(x, range(2, len(x.shape)))
    shape = shape_of(node)
    if groups == 1:
        x, vector = consume(context, x, 1)
        contracted(context, weight, 1, vector)
        return produce(context, node, x, 1, vector, weight, bias)
    outputs, inputs = weight.shape[0], x.shape[1]
    if weight.shape[1] == 1:  # depthwise: output o reads input o // multiplier only
        source = x.along(1) if 1 in x.varying else np.zeros(inputs, np.int64)
        labels = np.repeat(source, outputs // inputs)
        _vector(context, weight, bias, labels)
        return along(1, labels, shape)
    context.produced.add((weight.name, 0))
    per_group = context.classes.fresh(outputs // groups)  # the same outputs leave every group
    labels = np.tile(per_group, groups)
    _vector(context, weight, bias, labels)
    if 1 in x.varying:
        grid = x.along(1).reshape(groups, -1)
        context.classes.unite(grid, grid[:1])
        context.axis(weight, 1, context.classes.find(grid[0]))
    else:
        context.fixed(weight, 1)
    return along(1, labels, shape)


def _vector(context: Context, weight: Parameter, bias: Any, labels: Array) -> None:
    context.axis(weight, 0, labels)
    context.vector(bias, labels)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``weight[in, out / groups, *kernel]``."""
    x, weight, bias = context.labels(args[0]), args[1], args[2] if len(args) > 2 else None
    groups = args[6] if len(args) > 6 and isinstance(args[6], int) else 1
    if not isinstance(weight, Parameter) or groups != 1 or 0 in x.varying:
        return NotImplemented
    x = context.collapse(x, range(2, len(x.shape)))
    x, vector = consume(context, x, 1)
    contracted(context, weight, 0, vector)
    return produce(context, node, x, 1, vector, weight, bias, weight_axis=1)


@rule("matmul", "mm", "bmm", "baddbmm", "addmm")
def product(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``a[..., m, k] @ b[..., k, n]`` of two activations, or of an activation and a weight (with a bias first)."""
    bias, (left, right) = (args[0], args[1:3]) if len(args) == 3 else (None, args)
    if isinstance(right, Parameter) and len(right.shape) == 2 and not isinstance(left, Parameter) and len(left.shape) >= 2:
        x, vector = consume(context, context.labels(left), -1)
        contracted(context, right, 0, vector)
        return produce(context, node, x, len(x.shape) - 1, vector, right, bias, weight_axis=1)
    if bias is not None or isinstance(left, Parameter) or isinstance(right, Parameter):
        return NotImplemented
    a, b = context.labels(left), context.labels(right)
    if len(a.shape) != len(b.shape) or len(a.shape) < 2:
        return NotImplemented
    return contract(context, node, a, b)


def contract(context: Context, node: fx.Node, a: Labels, b: Labels) -> Any:
    """The general contraction of two activations over a's last and b's second-last axis.

    Labels along the contracted axis are united position by position; a batch axis (a head) along which they vary gets a
    derived label, removed with all of its contracted labels. What varies on a's rows or b's columns is carried over.
    """
    shape = shape_of(node)
    rank = len(shape)
    if any(p != q for p, q in zip(a.shape[:-2], b.shape[:-2], strict=True)):
        return NotImplemented
    along_k = rank - 1 in a.varying, rank - 2 in b.varying
    if any(along_k):
        if rank - 2 in a.varying or rank - 1 in b.varying:
            return NotImplemented  # varies on the contracted axis and on a free one
        left = np.broadcast_to(a.data, (*a.data.shape[:-2], 1, a.data.shape[-1]))[..., 0, :]
        right = np.broadcast_to(b.data, (*b.data.shape[:-2], b.data.shape[-2], 1))[..., 0]
        context.classes.unite(left, right)
        width = a.shape[-1]
        batch = np.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        joined = context.classes.find(np.broadcast_to(left, (*batch, width)))
        if not any(n > 1 for n in batch):
            return rigid(shape)
        derived = context.classes.fresh(int(np.prod(batch)))
        context.classes.link(derived, list(joined.reshape(-1, width)))
        return compress(context.classes.find(derived).reshape(*batch, 1, 1), shape)
    return carry(context, node, a, b, shape)


def carry(context: Context, node: fx.Node, a: Labels, b: Labels, shape: tuple[int, ...]) -> Any:
    """Labels of ``a @ b`` when none varies along the contracted axis: batch labels must agree, free axes are carried."""
    rank = len(shape)
    row, column = rank - 2 in a.varying, rank - 1 in b.varying
    if row and column:
        return NotImplemented
    fine, coarse = (a.data, b.data) if row else (b.data, a.data)
    axis = rank - 2 if row else rank - 1
    if not (row or column):
        context.classes.unite(a.data, b.data)
        return compress(context.classes.find(a.data), shape)
    batch = np.broadcast_shapes(fine.shape[:-2], coarse.shape[:-2])
    lines = np.broadcast_to(fine, (*batch, *fine.shape[-2:])).reshape(int(np.prod(batch)), -1)
    parents = np.broadcast_to(coarse, (*batch, 1, 1)).reshape(-1)
    if any(n > 1 for n in batch) or parents.any():
        context.classes.link(parents, list(lines))
    elif not parents.any() and not any(n > 1 for n in batch):
        pass  # nothing on the other side depends on the free axis
    del axis
    return compress(context.classes.find(np.broadcast_to(fine, (*batch, *fine.shape[-2:]))), shape)
