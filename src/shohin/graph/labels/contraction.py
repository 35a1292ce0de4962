"""Contractions: the contracted axis of both operands is united; a weight's output axis gets labels of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from shohin.graph.labels.algebra import contract, merge
from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.core import Array, Labels, line, rigid
from shohin.graph.labels.rules import rule
from shohin.program import family, shape_of


def consume(context: Context, x: Labels, axis: int) -> tuple[Labels, Array | None]:
    """Unites labels that meet the same index of a weight's input axis.

    Returns:
        The labels of the other axes, and the label of each index along ``axis``; None if labels do not vary along it.
    """
    axis %= len(x.shape)
    x = context.labels(x)
    if axis in x.varying:
        x = context.collapse(x, [d for d, n in enumerate(x.plane(axis).shape) if n > 1 and d != axis])
    rest = Labels(tuple(p for p in x.planes if p.shape[axis] == 1), x.shape)
    return rest, x.along(axis) if axis in x.varying else None


def layer(context: Context, node: fx.Node, x: Labels, axis: int, weight: Any, bias: Any, inner: int = 1, outer: int = 0) -> Labels:
    """A weight of two axes (and kernel axes, which are never cut) over an axis of an activation, plus a bias."""
    rest, vector = consume(context, x, axis)
    context.bind(weight, inner, vector)
    context.fixed(weight, [d for d in range(len(weight.shape)) if d not in (inner, outer)])
    labels = context.made(weight, outer)
    context.bind(bias, 0, labels)
    shape = shape_of(node)
    return context.tidy([*rest.planes, line(axis % len(shape), labels, len(shape))], shape)


@rule("linear")
def linear(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``x [..., in] @ weight[out, in].T + bias[out]``."""
    if len(args[1].shape) != 2:
        return NotImplemented
    return layer(context, node, context.labels(args[0]), len(args[0].shape) - 1, args[1], args[2] if len(args) > 2 else None)


@rule("embedding")
def embedding(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``weight[vocabulary, width]`` looked up: the width gets labels, the vocabulary is never cut."""
    shape = shape_of(node)
    context.fixed(args[0], [0])
    context.freeze(node, "looks up by values that are prunable", args[1])
    return context.tidy([line(len(shape) - 1, context.made(args[0], 1), len(shape))], shape)


def _spatial(context: Context, value: Any) -> Labels:
    """Labels of a convolution's input: what lies in one window is treated alike; the batch cannot be cut."""
    x = context.labels(value)
    return context.collapse(x, [0, *range(2, len(x.shape))])


def _groups(args: tuple[Any, ...], place: int) -> int:
    return args[place] if len(args) > place and isinstance(args[place], int) else 1


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``weight[out, in / groups, *kernel]`` over ``x[batch, in, *space]``; depthwise carries labels, groups tie equal positions."""
    weight, bias = args[1], args[2] if len(args) > 2 else None
    if len(args[0].shape) != len(weight.shape) or (family(node) == "convolution" and args[6]):
        return NotImplemented
    x, groups = _spatial(context, args[0]), _groups(args, 8 if family(node) == "convolution" else 6)
    if groups == 1:
        return layer(context, node, x, 1, weight, bias)
    shape, outputs, inputs = shape_of(node), weight.shape[0], x.shape[1]
    source = x.along(1) if 1 in x.varying else None
    if weight.shape[1] == 1:  # depthwise: output o reads input o // multiplier only
        labels = None if source is None else np.repeat(source, outputs // inputs)
        context.fixed(weight, range(2, len(weight.shape)))
        return _outputs(context, weight, bias, labels, shape)
    context.fixed(weight, range(2, len(weight.shape)))
    if source is None:
        context.bind(weight, 1, None)
        return _outputs(context, weight, bias, _alike(context, weight, groups), shape)
    return _grouped(context, weight, bias, source.reshape(groups, -1), shape)


def _outputs(context: Context, weight: Any, bias: Any, labels: Array | None, shape: tuple[int, ...]) -> Labels:
    context.bind(weight, 0, labels)
    context.bind(bias, 0, labels)
    return rigid(shape) if labels is None else context.tidy([line(1, labels, len(shape))], shape)


def _alike(context: Context, weight: Any, groups: int) -> Array:
    """Output labels where the groups of the input cannot go: the same outputs leave every group."""
    labels = context.made(weight, 0)
    grid = labels.reshape(groups, -1)
    context.classes.unite(grid, grid[:1])
    return context.classes.find(labels)


def _grouped(context: Context, weight: Any, bias: Any, inputs: Array, shape: tuple[int, ...]) -> Labels:
    """Whole groups can go, with their inputs; else the same inputs, or the same outputs, leave every group.

    Args:
        inputs: labels of the input channels, (groups, inputs of a group).
    """
    groups = len(inputs)
    outputs = context.made(weight, 0).reshape(groups, -1)
    if isinstance(weight, Parameter) and inputs.all():
        whole = context.classes.fresh(groups)
        context.classes.link(whole, list(inputs))
        context.classes.link(whole, list(outputs))
        columns = context.classes.fresh(inputs.shape[1])
        context.bind(weight, 1, columns)
        context.classes.link(columns, list(inputs.T))
        context.classes.grids += [g for g in (inputs, outputs) if g.shape[1] > 1]
    else:
        context.classes.unite(inputs, inputs[:1])
        context.classes.unite(outputs, outputs[:1])
        context.bind(weight, 1, context.classes.find(inputs[0]))
    labels = context.classes.find(outputs.reshape(-1))
    context.bind(bias, 0, labels)
    return context.tidy([line(1, labels, len(shape))], shape)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``weight[in, out / groups, *kernel]``; groups tie equal positions."""
    weight, bias, groups = args[1], args[2] if len(args) > 2 else None, _groups(args, 6)
    x, shape = _spatial(context, args[0]), shape_of(node)
    if groups == 1:
        return layer(context, node, x, 1, weight, bias, inner=0, outer=1)
    context.fixed(weight, range(2, len(weight.shape)))
    source = x.along(1) if 1 in x.varying else None
    if weight.shape[1] == 1 and groups == x.shape[1]:  # depthwise
        return _outputs(context, weight, bias, source, shape)
    if source is not None:
        grid = source.reshape(groups, -1)
        context.classes.unite(grid, grid[:1])
        source = context.classes.find(source)
    context.bind(weight, 0, source)
    labels = np.tile(context.made(weight, 1), groups)
    context.bind(bias, 0, labels)
    return context.tidy([line(1, labels, len(shape))], shape)


@rule("matmul", "mm", "bmm", "baddbmm", "addmm", "mv", "dot")
def product(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``a[..., m, k] @ b[..., k, n]`` of two activations, or of an activation and a weight (with a bias first)."""
    bias, (left, right) = (args[0], args[1:3]) if len(args) >= 3 else (None, args[:2])
    if isinstance(right, Parameter) and len(right.shape) == 2 and not isinstance(left, Parameter) and len(left.shape) >= 2:
        result = layer(context, node, context.labels(left), len(left.shape) - 1, right, None, inner=0, outer=1)
    else:
        found = _multiply(context, node, left, right)
        if found is None:
            return NotImplemented
        result = found
    return result if bias is None else merge(context, node, bias, result)


def _multiply(context: Context, node: fx.Node, left: Any, right: Any) -> Labels | None:
    letters = "abcdefghij"
    a, b = (tuple(v.shape) for v in (left, right))
    batch = max(len(a), len(b), 2) - 2
    first = letters[max(batch - len(a) + 2, 0) : batch] + ("mk" if len(a) > 1 else "k")
    second = letters[max(batch - len(b) + 2, 0) : batch] + ("kn" if len(b) > 1 else "k")
    output = letters[:batch] + ("m" if len(a) > 1 else "") + ("n" if len(b) > 1 else "")
    sizes: dict[str, int] = {}
    for shape, own in ((a, first), (b, second)):
        for n, c in zip(shape, own, strict=True):
            sizes[c] = max(n, sizes.get(c, 1))
    return contract(context, node, [(left, first), (right, second)], output, sizes)


@rule("einsum")
def einsum(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Einstein summation: letters that meet are united, letters that the output lacks are contracted."""
    operands = list(args[1])
    left, arrow, output = args[0].replace(" ", "").partition("->")
    inputs = left.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in args[0]]
    wide = max((len(v.shape) - len(s.replace("...", "")) for v, s in zip(operands, inputs, strict=True) if "..." in s), default=0)
    dots = "".join(free[:wide])
    inputs = [s.replace("...", dots[wide - (len(v.shape) - len(s.replace("...", ""))) :]) for v, s in zip(operands, inputs, strict=True)]
    if not arrow:
        counts = {c: sum(s.count(c) for s in inputs) for s in inputs for c in s}
        output = dots + "".join(sorted(c for c, n in counts.items() if n == 1 and c not in dots))
    output = output.replace("...", dots)
    sizes: dict[str, int] = {}
    for v, own in zip(operands, inputs, strict=True):
        for n, c in zip(v.shape, own, strict=True):
            sizes[c] = max(n, sizes.get(c, 1))
    found = contract(context, node, list(zip(operands, inputs, strict=True)), output, sizes)
    return NotImplemented if found is None else found
