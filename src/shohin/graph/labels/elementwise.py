"""Elementwise operators: labels that meet are united."""

from __future__ import annotations

from typing import Any

from torch import fx

from shohin.graph.labels.algebra import merge
from shohin.graph.labels.context import Context
from shohin.graph.labels.core import Labels, expanded, from_tensor
from shohin.graph.labels.rules import rule
from shohin.program import family

UNARY = [
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "hardtanh",
    "hardsigmoid",
    "hardswish",
    "sigmoid",
    "log_sigmoid",
    "tanh",
    "softplus",
    "threshold",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "square",
    "abs",
    "absolute",
    "negative",
    "special_expit",
    "erfc",
    "neg",
    "reciprocal",
    "sin",
    "cos",
    "erf",
    "sign",
    "floor",
    "ceil",
    "round",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
    "to",
    "_to_copy",
    "type_as",
    "logical_not",
    "isnan",
    "nan_to_num",
    "zeros_like",
    "ones_like",
    "full_like",
    "rrelu",
    "expm1",
    "log1p",
    "log2",
    "tan",
    "atan",
    "hardshrink",
    "softshrink",
    "logit",
    "trunc",
    "frac",
    "bitwise_not",
    "real",
    "imag",
    "_conj",
    "angle",
    "isinf",
    "isfinite",
    "positive",
    "empty_like",
    "rand_like",
    "randn_like",
    "bernoulli",
    "resolve_conj",
    "log10",
    "exp2",
    "sinh",
    "cosh",
    "asin",
    "acos",
    "asinh",
    "acosh",
    "atanh",
    "arctan",
    "sgn",
    "signbit",
    "erfinv",
    "lgamma",
    "digamma",
    "fix",
    "clip",
    "fill",
    "deg2rad",
]
NARY = [
    "add",
    "multiply",
    "subtract",
    "divide",
    "greater",
    "less",
    "greater_equal",
    "less_equal",
    "not_equal",
    "float_power",
    "copysign",
    "fmax",
    "fmin",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "maximum",
    "minimum",
    "where",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "bitwise_and",
    "bitwise_or",
    "masked_fill",
    "prelu",
    "lerp",
    "addcmul",
    "fmod",
    "remainder",
    "floor_divide",
    "xlogy",
    "addcdiv",
    "bitwise_xor",
    "logical_xor",
    "complex",
    "polar",
    "hypot",
    "true_divide",
    "atan2",
    "logaddexp",
    "logaddexp2",
    "heaviside",
    "ldexp",
]


@rule(*UNARY)
def unary(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """One tensor in, one out, element by element; bounds may be tensors too."""
    if family(node).startswith(("clamp", "clip")):
        return merge(context, node, *args)
    return context.labels(args[0])


@rule(*NARY)
def nary(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Several tensors that broadcast. PReLU's one weight for each channel lies along axis 1."""
    if family(node) == "prelu":
        x = context.labels(args[0])
        if args[1].shape[0] > 1:
            x = context.collapse(x, [d for d in range(len(x.shape)) if d != 1])
            context.bind(args[1], 0, x.along(1) if 1 in x.varying else None)
        return context.labels(x)
    return merge(context, node, *args)


@rule("glu")
def glu(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The two halves of an axis meet: index i with index i + n."""
    x = context.labels(args[0])
    axis = (args[1] if len(args) > 1 else -1) % len(x.shape)
    halves: list[list[Any]] = [[], []]
    for plane in x.planes:
        for half, part in zip(halves, expanded(plane, x.shape).chunk(2, axis), strict=True):
            half.append(from_tensor(part))
    shape = tuple(n // 2 if d == axis else n for d, n in enumerate(x.shape))
    return merge(context, node, *(Labels(tuple(half), shape) for half in halves))
