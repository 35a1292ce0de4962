# mypy: ignore-errors
"""Elementwise operators, generated from tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_kit import aten, image, own, pair, sequence, vector
from torch import nn


def positive(x):
    """Where logarithms, roots and quotients are smooth."""
    return x.square() + 0.5


def unit(x):
    """Between 0.1 and 0.9."""
    return 0.1 + 0.8 * torch.sigmoid(x)


def paired(x):
    """A complex tensor of the shape of ``x``."""
    return torch.complex(x, x + 1)


#: operator -> how it is called on the activations of a layer, where not as torch.ops.aten.<name>(x)
CALLS = {
    "log": lambda x: positive(x).log(),
    "sqrt": lambda x: positive(x).sqrt(),
    "rsqrt": lambda x: positive(x).rsqrt(),
    "log1p": lambda x: positive(x).log1p(),
    "log2": lambda x: positive(x).log2(),
    "reciprocal": lambda x: positive(x).reciprocal(),
    "logit": lambda x: unit(x).logit(),
    "tan": lambda x: unit(x).tan(),
    "threshold": lambda x: F.threshold(x, 0.1, 0.3),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "feature_dropout": lambda x: aten.feature_dropout(x, 0.5, False),
    "alpha_dropout": lambda x: aten.alpha_dropout(x, 0.5, False),
    "rrelu": lambda x: F.rrelu(x, training=False),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp_min(-0.2),
    "clamp_max": lambda x: x.clamp_max(0.2),
    "to": lambda x: x.to(torch.complex128).real,
    "type_as": lambda x: x.float().type_as(x),
    "_to_copy": lambda x: aten._to_copy(x, dtype=torch.float64),
    "logical_not": lambda x: x * x.round().logical_not(),
    "bitwise_not": lambda x: x * (~(x > 0)),
    "isnan": lambda x: x * x.isnan().logical_not(),
    "isinf": lambda x: x * x.isinf().logical_not(),
    "isfinite": lambda x: x * x.isfinite(),
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "ones_like": lambda x: x + torch.ones_like(x),
    "full_like": lambda x: x + torch.full_like(x, 0.3),
    "empty_like": lambda x: torch.where(x.isfinite(), x, torch.empty_like(x)),
    "rand_like": lambda x: x * (torch.rand_like(x) >= 0),
    "randn_like": lambda x: x * torch.randn_like(x).isfinite(),
    "bernoulli": lambda x: x * torch.bernoulli((x > 0).double()),
    "real": lambda x: paired(x).real,
    "imag": lambda x: paired(x).imag,
    "_conj": lambda x: paired(x).conj().imag,
    "resolve_conj": lambda x: paired(x).conj().resolve_conj().imag,
    "angle": lambda x: paired(x).angle(),
    "contiguous": lambda x: x.t().contiguous().t(),
    "positive": lambda x: +x,
    "log10": lambda x: positive(x).log10(),
    "acosh": lambda x: (positive(x) + 1).acosh(),
    **{name: (lambda f: lambda x: f(unit(x)))(getattr(aten, name)) for name in ("asin", "acos", "atanh", "erfinv", "lgamma", "digamma")},
    "signbit": lambda x: x * x.signbit(),
    "clip": lambda x: x.clip(-0.5, 0.5),
    "fill": lambda x: x + aten.fill(x, 0.5),
}
PLAIN = [
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "hardsigmoid",
    "hardswish",
    "sigmoid",
    "log_sigmoid",
    "tanh",
    "softplus",
    "exp",
    "square",
    "abs",
    "absolute",
    "negative",
    "special_expit",
    "erfc",
    "neg",
    "sin",
    "cos",
    "erf",
    "sign",
    "floor",
    "ceil",
    "round",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
    "nan_to_num",
    "expm1",
    "atan",
    "hardshrink",
    "softshrink",
    "trunc",
    "exp2",
    "sinh",
    "cosh",
    "asinh",
    "arctan",
    "sgn",
    "fix",
    "deg2rad",
    "frac",
]
#: two tensors in; what they give that is not a number multiplies the first
BINARY = {
    **{
        name: getattr(aten, name)
        for name in [
            "add",
            "multiply",
            "subtract",
            "sub",
            "mul",
            "maximum",
            "minimum",
            "fmax",
            "fmin",
            "copysign",
            "rsub",
            "atan2",
            "hypot",
        ]
    },
    **{
        name: (lambda f: lambda x, y: x * f(x, y))(getattr(aten, name))
        for name in ["greater", "less", "greater_equal", "less_equal", "not_equal"]
    },
    **{name: (lambda f: lambda x, y: x * f(x.round(), y.round()))(getattr(aten, name)) for name in ["eq", "ne", "lt", "le", "gt", "ge"]},
    **{
        name: (lambda f: lambda x, y: f(x, positive(y)))(getattr(aten, name))
        for name in ["div", "divide", "true_divide", "fmod", "remainder"]
    },
    **{name: (lambda f: lambda x, y: x * f(x > 0, y > 0))(getattr(aten, name)) for name in ["logical_and", "logical_or", "logical_xor"]},
    **{name: (lambda f: lambda x, y: x * f(x > 0, y > 0))(getattr(aten, name)) for name in ["bitwise_and", "bitwise_or", "bitwise_xor"]},
    "floor_divide": lambda x, y: x * torch.floor_divide(x.detach(), positive(y).detach()),
    "pow": lambda x, y: positive(x).pow(y),
    "float_power": lambda x, y: positive(x).float_power(y),
    "where": lambda x, y: torch.where(x > y, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0.5),
    "lerp": lambda x, y: torch.lerp(x, y, x),
    "addcmul": lambda x, y: torch.addcmul(x, x, y),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, positive(y)),
    "xlogy": lambda x, y: torch.xlogy(x, positive(y)),
    **{name: getattr(aten, name) for name in ("logaddexp", "logaddexp2")},
    "heaviside": lambda x, y: y * torch.heaviside(x.detach(), y.detach()),
    "ldexp": lambda x, y: torch.ldexp(x, y.detach()),
    "complex": lambda x, y: torch.complex(x, y).abs(),
    "polar": lambda x, y: torch.polar(positive(x), y).imag,
}


def _scaled(s, x):
    """A gain of its own for each unit, beside one for each place."""
    return s.b(s.a(x) * s.gain + s.place)


def together(calls, arity=1, count=6):
    """Several operators in one module, side by side, each between layers of its own: one capture for all of them."""
    names = list(calls)
    return dict(_beside({name: calls[name] for name in names[i : i + count]}, arity) for i in range(0, len(names), count))


def _beside(calls, arity):
    def forward(s, x):
        return sum(s.get_submodule(f"{n}_out")(call(*(s.get_submodule(f"{n}_{i}")(x) for i in range(arity)))) for n, call in calls.items())

    def layers():
        made = {f"{name}_{i}": nn.Linear(5, 6) for name in calls for i in range(arity)}
        return made | {f"{name}_out": nn.Linear(6, 2) for name in calls}

    return ", ".join(calls), own(" ".join(calls), forward, layers, (2, 5), {f"{name}_0.weight": 6 for name in calls})


EXAMPLES = {
    **together({name: getattr(aten, name) for name in PLAIN}),
    **together(CALLS),
    **together(BINARY, 2),
    "clamp by tensors": pair("clamp", lambda x, y: x.clamp(y - 1, y + 1)),
    "prelu": image("prelu", lambda x: F.prelu(x, torch.full((1,), 0.2, dtype=x.dtype))),
    "prelu of each channel": own(
        "prelu",
        lambda s, x: s.b(s.p(s.a(x))),
        lambda: {"a": nn.Conv2d(2, 6, 1), "p": nn.PReLU(6), "b": nn.Conv2d(6, 3, 1)},
        (2, 2, 4, 4),
        {"a.weight": 6},
    ),
    "glu": vector("glu", F.glu, 8, 4, {"a.weight": 4}),
    "glu of channels": image("glu", lambda x: F.glu(x, 1), 8, 4, {"a.weight": 4}),
    "glu of places": image("glu", lambda x: F.glu(x, -1)),
    "parameters that broadcast": own(
        "mul add",
        _scaled,
        lambda: {
            "a": nn.Linear(5, 6),
            "b": nn.Linear(6, 2),
            "gain": nn.Parameter(torch.randn(6)),
            "place": nn.Parameter(torch.randn(3, 1)),
        },
        (2, 3, 5),
        {"a.weight": 6},
    ),
    "a gate of one value": own(
        "mul",
        lambda s, x: s.b(s.a(x) * s.gate(x).sigmoid()),
        lambda: {"a": nn.Linear(5, 6), "gate": nn.Linear(5, 1), "b": nn.Linear(6, 2)},
        (2, 3, 5),
        {"a.weight": 6},
    ),
    "a gate of each head": own(
        "mul unsqueeze unflatten",
        lambda s, x: s.b((s.a(x).unflatten(-1, (3, 4)) * s.gate(x).unsqueeze(-1)).flatten(-2)),
        lambda: {"a": nn.Linear(5, 12), "gate": nn.Linear(5, 3), "b": nn.Linear(12, 2)},
        (2, 5),
        {"a.weight": 3, "a.weight#2": 4},
    ),
    "outer sum": own(
        "add unsqueeze",
        lambda s, x: s.b((s.a(x).unsqueeze(-1) + s.c(x).unsqueeze(-2)).relu().flatten(1)),
        lambda: {"a": nn.Linear(5, 3), "c": nn.Linear(5, 4), "b": nn.Linear(12, 2)},
        (2, 5),
        {"a.weight": 3, "c.weight": 4},
    ),
    "the same layer twice": sequence("add mul", lambda x: x + x * 2),
}
