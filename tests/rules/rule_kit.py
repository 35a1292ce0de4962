# mypy: ignore-errors
"""Small modules with one operator between layers with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

aten = torch.ops.aten


class Between(nn.Module):
    """Layers by name, and a function of the module and its inputs as forward."""

    def __init__(self, function, layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            if isinstance(layer, torch.Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Example:
    """A module around operators.

    Args:
        families: operator families whose rules must run on prunable labels here.
        build: makes the module.
        inputs: makes the arguments of one call.
        groups: name -> number of units of every group that must be found.
    """

    families: tuple[str, ...]
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    groups: Mapping[str, int]


def own(families, function, layers, shape, groups, *more):
    """An example written by hand: ``layers()`` gives the layers by name; ``shape`` is that of the input, or a function that makes all."""
    inputs = shape if callable(shape) else lambda: (torch.randn(shape), *(m() for m in more))
    return Example(tuple(families.split()), lambda: Between(function, layers()), inputs, groups)


def vector(families, function, units=6, out=None, groups=None):
    """``[batch, 5] -> a -> [batch, units] -> function -> [..., out] -> b``."""
    layers = lambda: {"a": nn.Linear(5, units), "b": nn.Linear(out or units, 2)}  # noqa: E731
    return own(families, lambda s, x: s.b(function(s.a(x))), layers, (2, 5), {"a.weight": units} if groups is None else groups)


def sequence(families, function, units=6, out=None, groups=None):
    """``[batch, 3, 5] -> a -> [batch, 3, units] -> function -> [..., out] -> b``."""
    layers = lambda: {"a": nn.Linear(5, units), "b": nn.Linear(out or units, 2)}  # noqa: E731
    return own(families, lambda s, x: s.b(function(s.a(x))), layers, (2, 3, 5), {"a.weight": units} if groups is None else groups)


def image(families, function, units=6, out=None, groups=None, dims=2, size=4):
    """``[batch, 2, *space] -> a -> [batch, units, *space] -> function -> [batch, out, *space] -> b``, with kernels of 1."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layers = lambda: {"a": conv(2, units, 1), "b": conv(out or units, 3, 1)}  # noqa: E731
    shape = (2, 2, *[size] * dims)
    return own(families, lambda s, x: s.b(function(s.a(x))), layers, shape, {"a.weight": units} if groups is None else groups)


def pair(families, function, groups=None):
    """Two layers that meet: ``function(a(x), c(x)) -> b``, all of 6 units."""
    layers = lambda: {"a": nn.Linear(5, 6), "c": nn.Linear(5, 6), "b": nn.Linear(6, 2)}  # noqa: E731
    return own(families, lambda s, x: s.b(function(s.a(x), s.c(x))), layers, (2, 5), groups or {"a.weight": 6})


def whole(function, shape=(2, 3, 5), out=6):
    """``z -> a -> function -> b``, where ``function`` mixes what ``a`` makes: only ``z`` can be cut."""
    layers = lambda: {"z": nn.Linear(5, 4), "a": nn.Linear(4, 6), "b": nn.Linear(out, 2)}  # noqa: E731
    return own("", lambda s, x: s.b(function(s.a(s.z(x)))), layers, shape, {"z.weight": 4})
