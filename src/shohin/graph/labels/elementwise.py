"""Elementwise operators: labels that meet are united."""

from __future__ import annotations

from typing import Any

from torch import fx

from shohin.graph.labels.context import Context, Parameter, rule
from shohin.graph.labels.core import from_tensor
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
    "softsign",
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
    "contiguous",
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
]
NARY = [
    "add",
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
    "true_divide",
    "atan2",
]


@rule(*UNARY)
def unary(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """One tensor in, one out, element by element; bounds may be tensors too."""
    if family(node).startswith("clamp"):
        return context.merge(node, *args)
    return context.labels(args[0])


@rule(*NARY)
def nary(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Several tensors that broadcast. PReLU's one weight for each channel lies along axis 1."""
    if family(node) == "prelu":
        x = context.labels(args[0])
        weight = args[1]
        if weight.shape[0] > 1:
            if set(x.varying) - {1} or not isinstance(weight, Parameter):
                return NotImplemented
            context.axis(weight, 0, x.along(1))
        return context.labels(x)
    return context.merge(node, *args)


@rule("glu")
def glu(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The two halves of an axis meet: index i with index i + n."""
    x = context.labels(args[0])
    axis = args[1] if len(args) > 1 else -1
    a, b = x.full().chunk(2, axis)
    return context.merge(node, from_tensor(a), from_tensor(b))
