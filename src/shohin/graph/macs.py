"""Multiply-accumulates of every operation that contracts, as polynomials of the widths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from shohin.graph.costs import Term
from shohin.graph.sizes import Axis, Sizes, shape_at_example
from shohin.program import family
from shohin.program.nodes import argument, arguments, flatten

CONVOLUTIONS = frozenset(
    ["conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "deform_conv2d"]
)
RECURRENT = frozenset(["lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"])
#: family -> position of the two factors; the last axis of the first one is contracted
PRODUCTS = {
    **dict.fromkeys(["linear", "matmul", "mm", "bmm", "mv", "inner", "dot", "vdot", "_grouped_mm", "linalg_vecdot"], (0, 1)),
    **dict.fromkeys(["addmm", "baddbmm", "addmv"], (1, 2)),
}
OTHERS = frozenset(["einsum", "tensordot", "bilinear", "addbmm", "scaled_dot_product_attention"])


def contracts(node: fx.Node) -> bool:
    """True if the operation multiplies and accumulates."""
    name = family(node)
    return name in CONVOLUTIONS or name in RECURRENT or name in PRODUCTS or name in OTHERS


def contraction(sizes: Sizes, node: fx.Node) -> tuple[str, list[Term]]:
    """(class for latency regression, MACs for one sample) of an operation that contracts."""
    name = family(node)
    if name in CONVOLUTIONS:
        return _convolution(sizes, node, name)
    if name in RECURRENT:
        return "recurrent", _recurrent(sizes, node)
    if name == "einsum":
        return "einsum", _einsum(sizes, node)
    if name == "scaled_dot_product_attention":
        return "attention", _attention(sizes, node)
    if name == "bilinear":
        a, b, weight = arguments(node)[:3]
        contracted = [_finer(sizes.axis(weight, 1), sizes.axis(a, -1)), _finer(sizes.axis(weight, 2), sizes.axis(b, -1))]
        return "linear", sizes.product([*sizes.axes(node), *contracted], (node,))
    if name == "tensordot":
        a, b, dims_a, dims_b = arguments(node)[:4]
        contracted = [_finer(sizes.axis(a, p), sizes.axis(b, q)) for p, q in zip(dims_a, dims_b, strict=True)]
        return "matmul", sizes.product([*sizes.axes(node), *contracted], (node, a, b))
    if name == "addbmm":
        a, b = arguments(node)[1:3]
        return "matmul", sizes.product([*sizes.axes(a), sizes.axis(b, -1)], (node, a, b))
    return _product(sizes, node, name)


def _product(sizes: Sizes, node: fx.Node, name: str) -> tuple[str, list[Term]]:
    """Every element of the result sums over the last axis of the first factor."""
    first, second = PRODUCTS[name]
    a, b = argument(node, first), argument(node, second)
    rank = len(shape_at_example(sizes.program, b))
    other = -1 if name in ("linear", "inner", "linalg_vecdot") or rank == 1 else -2
    weighted = {a.name, b.name} & sizes.program.names.keys()
    kind = "linear" if weighted and name not in ("bmm", "baddbmm") else "matmul"
    return kind, sizes.product([*sizes.axes(node), _finer(sizes.axis(b, other), sizes.axis(a, -1))], (node, a, b))


def _convolution(sizes: Sizes, node: fx.Node, name: str) -> tuple[str, list[Term]]:
    """``weight[out, in / groups, *kernel]`` at every output element; transposed: ``weight[in, out / groups, *kernel]`` at every
    input element.
    """
    x, weight = arguments(node)[:2]
    transposed = name.startswith("conv_transpose") or (name == "convolution" and bool(argument(node, 6, False)))
    groups = argument(node, {"convolution": 8, "deform_conv2d": 11}.get(name, 6), 1)
    shape = shape_at_example(sizes.program, weight)
    kernel = shape[2:]
    at = x if transposed else node
    macs = sizes.product([*sizes.axes(at), sizes.axis(weight, 1)], (at,), math.prod(kernel))
    grouped = isinstance(groups, int) and groups > 1
    kind = ("depthwise" if shape[1] == 1 else "groupconv") if grouped else "convtranspose" if transposed else "conv"
    return kind + "x".join(map(str, kernel)), macs


def _attention(sizes: Sizes, node: fx.Node) -> list[Term]:
    """Queries times keys, then scores times values; with shared keys (GQA) every query head does its own work. Masks, the
    causal one too, save nothing.
    """
    q, k = arguments(node)[:2]
    keys = sizes.axis(k, -2)
    return [*sizes.product([*sizes.axes(q), keys], (node, q)), *sizes.product([*sizes.axes(node), keys], (node,))]


def _recurrent(sizes: Sizes, node: fx.Node) -> list[Term]:
    """Every step multiplies every weight matrix (gates x (input + hidden), per layer and direction) once."""
    matrices = [n for n in flatten(arguments(node)[2:]) if isinstance(n, fx.Node) and len(shape_at_example(sizes.program, n)) == 2]
    steps = sizes.axes(argument(node, 0))[:-1]
    return [t for w in matrices for t in sizes.product([*steps, *sizes.axes(w)], (argument(node, 0),))]


def _finer(a: Axis, b: Axis) -> Axis:
    """Of two views of one contracted axis, the one whose labels are known."""
    return a if a[0].shape[a[1]] > 1 else b


Letter = str | int


def _einsum(sizes: Sizes, node: fx.Node) -> list[Term]:
    """Pair by pair, as torch contracts: along the path that it was given, else from left to right. Letters that one factor alone
    has are summed before; a pair that sums over nothing is an elementwise product.
    """
    operands: list[Any] = list(arguments(node)[1])
    given: Any = argument(node, 2) or node.kwargs.get("path") or ()
    path = [int(i) for i in given]
    terms, output = letters(str(argument(node, 0)), [len(shape_at_example(sizes.program, n)) for n in operands])
    axes: dict[Letter, Axis] = {}
    for operand, names in zip(operands, terms, strict=True):
        for position, letter in enumerate(names):
            axis = sizes.axis(operand, position)
            known = axes.get(letter)
            axes[letter] = axis if known is None or known[2] == 1 else _finer(known, axis) if axis[2] > 1 else known
    macs: list[Term] = []
    left = [frozenset(t) for t in terms]
    pairs = [(path[i], path[i + 1]) for i in range(0, len(path) - 1, 2)] if path else [(0, 1)] * (len(left) - 1)
    for pair in pairs:
        if len(left) < 2:
            break
        i, j = sorted(pair)
        a, b = left[i], left[j]
        rest = [t for n, t in enumerate(left) if n not in (i, j)]
        needed = frozenset(output).union(*rest)
        summed = (a & b) - needed
        product = (a & b) | ((a | b) & needed)
        if any(axes[letter][2] > 1 for letter in summed):
            macs += sizes.product([axes[letter] for letter in sorted(product, key=str)], (node, *operands))
        result = product - summed
        left = [*rest, result] if path else [result, *rest]
    return macs


def letters(equation: str, ranks: Sequence[int]) -> tuple[list[list[Letter]], list[Letter]]:
    """The letters of each operand and of the result; the axes of an ellipsis are the numbers -1 (last), -2...

    Args:
        equation: of `torch.einsum`, in letters.
        ranks: number of axes of each operand.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = [_expanded(text, rank - len(text.replace("...", ""))) for text, rank in zip(inputs.split(","), ranks, strict=True)]
    widest = max((sum(isinstance(x, int) for x in t) for t in terms), default=0)
    if arrow:
        return terms, _expanded(result, widest if "..." in result else 0)
    counts = Counter(x for t in terms for x in t if isinstance(x, str))
    return terms, [*range(-widest, 0), *sorted(x for x, n in counts.items() if n == 1)]


def _expanded(text: str, hidden: int) -> list[Letter]:
    before, dots, after = text.partition("...")
    return [*before, *(range(-hidden, 0) if dots else ()), *after]
