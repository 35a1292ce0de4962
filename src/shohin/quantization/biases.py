"""Biases of integer layers: corrected by the means that rounding moves, and on the grid of the sums that they are added to.

Bias correction follows Nagel et al., "Data-Free Quantization" (1906.04721), section 4.2, with measured means: each layer's bias absorbs the
mean shift that its snapped weights and already snapped inputs cause.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from shohin.evidence.layer_rows import channel_axis
from shohin.formats import Quantizer
from shohin.program import Program, interpret
from shohin.quantization.observation import channel_sums, channels_last
from shohin.quantization.sites import Sites, base

#: most steps of a bias: sums of 32 bits must not overflow
BIAS_LIMIT = 2**30


def corrected(
    program: Program,
    sites: Sites,
    activations: Mapping[str, Quantizer],
    samples: tuple[Any, ...],
    means: Mapping[str, tuple[Tensor, int]],
    masks: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Tensors with corrected biases. All these samples go through each layer before the next is corrected; the means are theirs, too."""
    tensors = dict(program.tensors)
    running = channels_last(program)
    grids: dict[str, Callable[[Tensor], Tensor]] = {name: partial(_snapped, q) for name, q in activations.items()}
    codes: dict[str, Tensor] = {}
    waiting: dict[str, set[str]] = {}  # readers that have not run yet: codes are let go behind the last of them

    def feed(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What integers read of a smoothed activation; all else goes on with its floats."""
        snapped = [
            codes[base(given).name]
            if isinstance(given, fx.Node) and base(given).name in codes and node.name in sites.readers[base(given).name]
            else value
            for given, value in zip(node.args, args, strict=True)
        ]
        for given in node.all_input_nodes:
            if (name := base(given).name) in codes:
                waiting[name].discard(node.name)
                if not waiting[name]:
                    del codes[name]
        return tuple(snapped)

    def kept(name: str, value: Tensor) -> Tensor:
        if name not in grids:
            return value
        if activations[name].axis is None:
            return grids[name](value)
        codes[name], waiting[name] = grids[name](value), set(sites.readers[name])
        return value

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in means and len(node.args) > 2 and isinstance(node.args[2], fx.Node):
            total, count = channel_sums(value, node, masks.get(node.name))
            shift = means[node.name][0] / means[node.name][1] - total / count
            name = program.names[node.args[2].name]
            tensors[name] = (tensors[name].detach().double() + shift).to(tensors[name].dtype)
            shape = [1] * value.dim()
            shape[channel_axis(node, value)] = -1
            value.add_(shift.to(value.dtype).reshape(shape))
        return kept(node.name, value)

    with torch.no_grad():
        inputs = [kept(name, x) for name, x in zip(program.inputs, samples, strict=True)]
        interpret(program, program.graph, running, tuple(inputs), visit, feed)
    return tensors


def on_the_grid_of_sums(
    program: Program, sites: Sites, activations: Mapping[str, Quantizer], weights: Mapping[str, Quantizer]
) -> dict[str, Tensor]:
    """Tensors with the biases of integer layers on the grid of their sums, input scale times weight scale, as files hold them.

    A bias that several layers read, or that needs more than `BIAS_LIMIT` steps, stays as it is.
    """
    tensors = dict(program.tensors)
    for node in program.graph.nodes:
        if node.op != "call_function" or program.origins[node.name].address not in sites.layers or len(node.args) < 3:
            continue
        source, _, bias = node.args[:3]
        if not isinstance(bias, fx.Node) or bias.name not in program.names or len(bias.users) > 1 or not isinstance(source, fx.Node):
            continue
        data = activations.get(base(source).name)
        if data is None:
            continue
        name = program.names[bias.name]
        step = (data.one_scale.scale.float() * weights[sites.layers[program.origins[node.name].address]].scale.float()).double()
        codes = (tensors[name].detach().double() / step).round()
        if bool((codes.abs() <= BIAS_LIMIT).all()):
            tensors[name] = (codes * step).to(tensors[name].dtype)
    return tensors


def _snapped(q: Quantizer, x: Tensor) -> Tensor:
    """On the grid in one pass over memory: where a value lies halfway between codes, it may be the other one than `simulate` takes."""
    if q.axis is not None:
        return q.fake(x)
    return torch.fake_quantize_per_tensor_affine(x, float(q.scale.float()), int(q.zero_point), q.format.low, q.format.high)
