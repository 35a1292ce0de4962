"""Layers that compute on few-bit floating-point numbers, in simulation: fp16, bf16, 8-bit floats, blocks that share a power of two.

Weights are rounded in the program, inputs as the layer reads them; sums and biases stay float32, as accelerators keep them. Formats of 8
bits and fewer have a scale that takes the largest value to the format's: one for each output of a weight, one for an activation, from data
(Micikevicius et al. 2022, 2209.05433, section 3). fp16 and bf16 have none, and blocks have their own, along the axis that a layer sums over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call
from shohin.errors import DataError
from shohin.evidence.layer_rows import channel_axis
from shohin.formats import BLOCK_FORMATS, FLOAT_FORMATS
from shohin.program import Program, call_inputs, family, interpret
from shohin.quantization.sites import held_by, table_of

Rounding = Callable[[Tensor], Tensor]


def is_float_form(text: str) -> bool:
    """True for the name of a floating-point or block format."""
    return text in FLOAT_FORMATS or text in BLOCK_FORMATS


def needs_scale(text: str) -> bool:
    """True for a format whose activations need a scale from data."""
    return text in FLOAT_FORMATS and FLOAT_FORMATS[text].bits <= 8


def round_floats(
    program: Program, original: Program, calls: Sequence[Call], formats: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Rounding]]:
    """Tensors with the weights and tables of these layers rounded, and layer node -> how its input is.

    Args:
        program: folded; its values are rounded.
        original: the same before anything was rounded; largest values of activations are its.
        calls: batches, for formats that need a scale.
        formats: address -> name.

    Raises:
        DataError: if a format needs a scale and there are no batches, or what a layer reads is NaN or infinite.
    """
    tensors, rounding = dict(program.tensors), dict[str, Rounding]()
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and program.origins[n.name].address in formats]
    scaled = [n for n in nodes if table_of(program, n) is None and needs_scale(formats[program.origins[n.name].address])]
    if scaled and not calls:
        text = formats[program.origins[scaled[0].name].address]
        raise DataError(f"{text!r} needs calibration batches for the scales of activations: give Data(train=loader)")
    largest = _largest(original, {n.name for n in scaled}, calls) if scaled else {}
    for node in nodes:
        text = formats[program.origins[node.name].address]
        name = held_by(program, node)
        if name is None:
            continue
        value = _weight(program.tensors[name].detach(), text)
        tensors |= {alias: value for alias, tensor in program.tensors.items() if tensor is program.tensors[name]}
        if table_of(program, node) is None:
            axis = -1 if family(node) == "linear" else channel_axis(node, node.meta["val"])
            rounding[node.name] = _input(text, axis, largest.get(node.name, 0.0))
    return tensors, rounding


def _weight(value: Tensor, text: str) -> Tensor:
    if text in BLOCK_FORMATS:
        return BLOCK_FORMATS[text].rounded(value, 1)
    form = FLOAT_FORMATS[text]
    if not needs_scale(text):
        return form.rounded(value)
    scale = (value.flatten(1).abs().amax(1) / form.largest).clamp_min(2.0**-100).reshape(-1, *[1] * (value.dim() - 1))
    return form.rounded(value / scale) * scale


def _input(text: str, axis: int, largest: float) -> Rounding:
    if text in BLOCK_FORMATS:
        return lambda x: BLOCK_FORMATS[text].rounded(x, axis)
    form = FLOAT_FORMATS[text]
    scale = max(largest / form.largest, 2.0**-100) if needs_scale(text) else 1.0
    return lambda x: form.rounded(x / scale) * scale


def _largest(program: Program, names: set[str], calls: Sequence[Call]) -> dict[str, float]:
    found = dict.fromkeys(names, 0.0)

    def feed(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if node.name in found:
            most = float(args[0].abs().max()) if args[0].numel() else 0.0
            if most != most or most == float("inf"):
                raise DataError(f"{program.origins[node.name].address} reads NaN or infinity on the calibration batches")
            found[node.name] = max(found[node.name], most)
        return args

    with torch.no_grad():
        for call in calls:
            interpret(program, program.graph, program.tensors, call_inputs(program, call), feed=feed)
    return found
