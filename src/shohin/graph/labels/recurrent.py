"""Recurrent layers: a hidden unit owns its rows in every gate, its column of the recurrent weight and its place in the state.

The operators hold the states of all layers and directions in one tensor, so that hidden unit j of each of them is one unit: no
other choice leaves that tensor rectangular.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.contraction import consume
from shohin.graph.labels.core import Array, Labels, axes_of, line
from shohin.graph.labels.rules import rule
from shohin.program import concrete, family, shape_of
from shohin.program.nodes import arguments

#: operators that make a tensor of one value; their sizes follow a plan as integers do
FILLED = frozenset(["zeros", "ones", "full", "new_zeros", "new_ones", "new_full"])
COPIES = frozenset(["clone", "contiguous", "detach", "alias", "to", "_to_copy"])


@dataclass(frozen=True)
class _Weights:
    """The tensors of one direction of one layer; ``project`` maps cells to hidden states (LSTM with ``proj_size``)."""

    input: Any
    hidden: Any
    biases: tuple[Any, ...]
    project: Any = None


@rule("new_zeros", "new_ones", "new_full")
def filled(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """A tensor of one value, like another in type only; its axes get labels from what they meet."""
    shape = shape_of(node)
    symbolic = {d for d, n in enumerate(node.meta["val"].shape) if not isinstance(n, int)}
    return Parameter(node.name, shape, bound=symbolic, constant=True)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``(x [time, batch, in], states [layers * directions, batch, hidden], weights, has biases, layers, ..., batch first)``.

    Returns:
        Labels of the output ``[time, batch, directions * hidden]`` and of the last states.
    """
    if getattr(node.target, "_overloadname", "") != "input":
        return NotImplemented
    x, listed, biases, directions = args[0], list(args[2]), bool(args[3]), 1 + bool(args[7])
    states, given = _listed(args[1]), _listed(arguments(node)[1])
    count = len(listed) // (args[4] * directions)
    if count * args[4] * directions != len(listed) or count - 2 - 2 * biases not in (0, 1):
        return NotImplemented
    parts = [listed[i : i + count] for i in range(0, len(listed), count)]
    weights = [_Weights(p[0], p[1], tuple(p[2:4]) if biases else (), p[-1] if count % 2 else None) for p in parts]
    hidden, cells = _hidden_units(context, weights)
    below = _input(context, node, x, len(x.shape) - 1)
    for layer in range(args[4]):
        for one in weights[layer * directions : (layer + 1) * directions]:
            context.bind(one.input, 1, below)
        below = np.tile(hidden, directions)
    for value, source, units in zip(states, given, (hidden, cells), strict=False):
        _state(context, node, source, value, units)
    found = [tuple(concrete(s) for s in v.shape) for v in node.meta["val"]]
    lines = (np.tile(hidden, directions), hidden, cells)
    return [context.tidy([line(2, labels, 3)], shape) for labels, shape in zip(lines, found, strict=False)]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """One step: ``(x [batch, in], states [batch, hidden], weight_ih, weight_hh, biases)``."""
    states, given = _listed(args[1]), _listed(arguments(node)[1])
    weights = _Weights(args[2], args[3], tuple(args[4:6]))
    hidden, cells = _hidden_units(context, [weights])
    context.bind(weights.input, 1, _input(context, node, args[0], len(args[0].shape) - 1))
    for value, source, units in zip(states, given, (hidden, cells), strict=False):
        _state(context, node, source, value, units)
    val = node.meta["val"]
    shapes = [tuple(concrete(s) for s in v.shape) for v in _listed(val)]
    found = [context.tidy([line(len(s) - 1, units, len(s))], s) for s, units in zip(shapes, (hidden, cells), strict=False)]
    return found[0] if isinstance(val, torch.Tensor) else found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _hidden_units(context: Context, weights: list[_Weights]) -> tuple[Array, Array]:
    """Labels of the hidden state and of the cell state (the same without projection), bound to all that they own."""
    first = weights[0]
    cells = context.made(first.input, 0)
    gates = first.input.shape[0] // (first.hidden if first.project is None else first.project).shape[1]
    grid = cells.reshape(gates, -1)
    context.classes.unite(grid, grid[:1])
    cells = context.classes.find(grid[0])
    hidden = cells if first.project is None else context.made(first.project, 0)
    rows = np.tile(cells, gates)
    for one in weights:
        for tensor in (one.input, one.hidden, *one.biases):
            context.bind(tensor, 0, rows)
        context.bind(one.hidden, 1, hidden)
        if one.project is not None:
            context.bind(one.project, 0, hidden)
            context.bind(one.project, 1, cells)
    return context.classes.find(hidden), context.classes.find(cells)


def _input(context: Context, node: fx.Node, value: Any, axis: int) -> Array | None:
    """Labels of the input columns; time and batch stay whole."""
    rest, vector = consume(context, context.labels(value), axis)
    for plane in rest.planes:
        context.freeze(node, f"{node.target} runs along a prunable axis", plane)
    return vector


def _state(context: Context, node: fx.Node, source: Any, value: Any, units: Array) -> None:
    """An initial state has the units of the last one. One that is filled with a value follows by the integer that sizes it."""
    axis = len(value.shape) - 1
    for plane in value.planes if isinstance(value, (Labels, Parameter)) else ():
        if set(axes_of(plane)) - {axis}:
            context.freeze(node, f"the initial state of {node.target} differs along another prunable axis", plane)
    context.fixed(value, range(axis))
    if isinstance(value, Labels) and axis not in context.labels(value).varying:
        context.freeze(node, f"the initial state of {node.target} is whole", units)
    context.bind(value, axis, context.classes.find(units))
    if _constant(value) and isinstance(source, fx.Node):
        _size(context, source)


def _constant(value: Any) -> bool:
    return isinstance(value, Parameter) and value.constant


def _size(context: Context, source: fx.Node) -> None:
    """A tensor of one value and its copies become activations, unless another constant is computed from it."""
    while family(source) in COPIES and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    made = [source]
    for node in made:
        made += [u for u in node.users if _constant(context.values.get(u))]
    found = [context.values[node] for node in made]
    if family(source) not in FILLED or any(family(node) not in COPIES for node in made[1:]):
        return
    if any(len(axes_of(plane)) > 1 for value in found for plane in value.planes):
        return
    labels = context.labels(found[0])
    for value in found[1:]:
        for axis in range(len(value.shape)):
            context.bind(value, axis, labels.along(axis))
    for node, value in zip(made, found, strict=True):
        context.values[node] = context.labels(value)
