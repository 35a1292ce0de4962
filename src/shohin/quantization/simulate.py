"""The view with bits: a program whose sites snap to their grids, and the same program with taps for lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from shohin.formats import Quantizer
from shohin.program import Program, ProgramModule
from shohin.program.nodes import callable_of
from shohin.quantization.sites import base


class _Snap(torch.autograd.Function):
    """Rounds to a grid; gradients pass inside the range and stop outside (straight-through)."""

    @staticmethod
    def forward(ctx: object, x: Tensor, scale: float, zero: int, low: int, high: int) -> Tensor:
        codes = torch.clamp(torch.round(x / scale) + zero, low, high)
        ctx.save_for_backward(x >= (low - zero) * scale, x <= (high - zero) * scale)  # type: ignore[attr-defined]
        return (codes - zero) * scale

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        above, below = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * (above & below), None, None, None, None


def snap(x: Tensor, scale: float, zero: int, low: int, high: int) -> Tensor:
    """``x`` on a grid, with straight-through gradients."""
    result: Tensor = _Snap.apply(x, scale, zero, low, high)  # type: ignore[no-untyped-call]
    return result


Insert = Callable[[fx.Graph, fx.Node], fx.Node]
"""(graph, node) -> a new node with the rounded values of the node."""


def with_snaps(program: Program, inserts: Mapping[str, Insert], readers: Mapping[str, frozenset[str]]) -> fx.Graph:
    """A copy of the program's graph with something after some nodes.

    Args:
        inserts: node name -> what follows it. All that read the node read that instead, but for outputs of the model, which files keep float.
        readers: node name -> the operations that alone read it so; of all others, all do.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: mapping[n]))
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    for node in program.graph.nodes:
        insert = inserts.get(node.name)
        if insert is None:
            continue
        place = source = mapping[node]
        while place.op == "placeholder" and place.next.op == "placeholder":
            place = place.next
        with graph.inserting_after(place):
            snapped = insert(graph, source)
        chosen = readers.get(node.name)
        if chosen is not None:
            for reader in program.graph.nodes:
                if reader.name in chosen:
                    for argument in reader.all_input_nodes:
                        if base(argument) is node:
                            mapping[reader].replace_input_with(mapping[argument], snapped)
            continue
        for user in list(source.users):
            if user is not snapped and user.op != "output":
                user.replace_input_with(source, snapped)
    return graph


def _inserted(quantizer: Quantizer) -> Insert:
    if quantizer.axis is None:
        constants = (float(quantizer.scale.float()), int(quantizer.zero_point), quantizer.format.low, quantizer.format.high)
        return lambda graph, source: graph.call_function(snap, (source, *constants))

    def snap_channels(x: Tensor) -> Tensor:  # its own for each grid: the compiled graph holds no tensors as arguments
        return quantizer.fake(x)

    return lambda graph, source: graph.call_function(snap_channels, (source,))


def simulated_graph(
    program: Program, activations: Mapping[str, Quantizer], readers: Mapping[str, frozenset[str]] | None = None
) -> fx.Graph:
    """The program's graph with a snap after each site.

    Args:
        activations: node name -> per-tensor quantizer, or one with a scale for each channel of the last axis. Outputs of the model stay
            unsnapped, as files keep them float.
        readers: see `Sites.readers`; of smoothed nodes.
    """
    return with_snaps(program, {name: _inserted(q) for name, q in activations.items()}, read_apart(activations, readers or {}))


def read_apart(activations: Mapping[str, Quantizer], readers: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Of `Sites.readers` those of smoothed nodes, whose codes they alone read."""
    return {name: readers[name] for name, q in activations.items() if q.axis is not None and name in readers}


def simulate(
    program: Program,
    activations: Mapping[str, Quantizer],
    readers: Mapping[str, frozenset[str]] | None = None,
    inputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> ProgramModule:
    """A module that computes what the integer file computes. The program's tensors are used as they are (snapped by the caller).

    Args:
        inputs: layer node -> how it rounds its input, see `Quantized.inputs`.
    """
    graph = simulated_graph(program, activations, readers)
    for node in graph.nodes:
        if inputs and node.name in inputs:
            node.target = _reading(node, inputs[node.name])
    return ProgramModule(program, graph, {n: t.detach().clone() for n, t in program.tensors.items()})


def _reading(node: fx.Node, rounding: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    run = callable_of(node)

    def rounded_layer(x: Tensor, *rest: Any, **options: Any) -> Any:
        return run(rounding(x), *rest, **options)

    return rounded_layer
