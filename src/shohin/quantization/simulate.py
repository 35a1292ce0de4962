"""The view with bits: a program whose sites snap to their grids, and the same program with taps for lowering."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from shohin.formats import Quantizer
from shohin.program import Program, ProgramModule


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


def simulated_graph(program: Program, activations: Mapping[str, Quantizer]) -> fx.Graph:
    """The program's graph with a snap after each site.

    Args:
        activations: node name -> per-tensor quantizer. Outputs of the model stay unsnapped, as files keep them float.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    raw: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: raw[n]))
            continue
        raw[node] = mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    for node in program.graph.nodes:
        q = activations.get(node.name)
        if q is None:
            continue
        source = raw[node]
        place = source
        while place.op == "placeholder" and place.next.op == "placeholder":
            place = place.next
        scale = float(q.scale.float())
        with graph.inserting_after(place):
            snapped = graph.call_function(snap, (source, scale, int(q.zero_point), q.format.low, q.format.high))
        for user in list(source.users):
            if user is not snapped and user.op != "output":
                user.replace_input_with(source, snapped)
    return graph


def simulate(program: Program, activations: Mapping[str, Quantizer]) -> ProgramModule:
    """A module that computes what the integer file computes. The program's tensors are used as they are (snapped by the caller)."""
    return ProgramModule(program, simulated_graph(program, activations), {n: t.detach().clone() for n, t in program.tensors.items()})
