"""What ONNX Runtime asks of activation quantizers before it runs integer kernels.

Each of these, when broken, silently costs integer kernels; all were found by measurement:

- a ReLU or clip is absorbed by the convolution before it only if the quantizer's range lies inside the clip's:
  zero point 0 behind a ReLU, and also ``255 * scale <= 6`` behind a ReLU6;
- an operator that moves codes (MaxPool, Flatten, Reshape, Transpose) needs the same scale and zero point on both sides.

A quantizer that a moving operator implies is added; this changes no value, since codes that are moved stay on their grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from shohin.formats import Quantizer
from shohin.targets.onnx.edges import CLIPS, CONTRACTIONS, MOVEMENT, Edges, Layer, array
from shohin.targets.onnx.lower import Rules
from shohin.targets.onnx.qdq import same

if TYPE_CHECKING:
    import onnx

#: operators with an integer kernel of their own, which a quantizer may be moved up to
_INTEGER = CONTRACTIONS | CLIPS | {"Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool", "Sigmoid"}


def conform(
    model: onnx.ModelProto, activations: Mapping[str, Quantizer], quantized: Iterable[Layer]
) -> tuple[dict[str, Quantizer], dict[str, str]]:
    """Activation quantizers that the runtime can use, for every tensor that needs one.

    Args:
        activations: tensor name -> per-tensor quantizer, as asked.
        quantized: the layers whose weights are quantized.

    Returns:
        The quantizers by tensor name, and name -> reason for each that is not the one asked for.
    """
    edges = Edges(model)
    out, why = dict(activations), dict[str, str]()
    for node in reversed(edges.order):  # a quantizer behind a moving operator is also right before it
        if node.op_type in MOVEMENT and node.output[0] in out and node.input[0] not in out:
            source = edges.producer.get(node.input[0])
            alone = len(edges.reads(node.input[0])) == 1 and node.input[0] not in edges.outputs
            if source is not None and alone and source.op_type in (_INTEGER | MOVEMENT) - {"MatMul"}:
                out[node.input[0]] = out[node.output[0]]
    needed = _needed(edges, out, {id(layer.node) for layer in quantized})
    for node in edges.order:
        name = node.output[0] if node.output else ""
        if node.op_type in CLIPS and name in out:
            low, high = _bounds(node, edges)
            fitted = inside(out[name], low, high)
            if not same(fitted, out[name]):
                out[name] = fitted
                why[name] = (
                    f"its range was fitted into the {node.op_type} before it, [{low:g}, {high:g}], so that the runtime can absorb it"
                )
        elif node.op_type in MOVEMENT and node.input[0] in out:
            if name in out and not same(out[name], out[node.input[0]]):
                why[name] = f"{node.op_type} keeps codes: it takes the scale and zero point of its input {node.input[0]!r}"
                out[name] = out[node.input[0]]
            elif name in needed and name not in out:
                out[name] = out[node.input[0]]
    for name in [n for n in out if not edges.reads(n)]:
        why[name] = "dropped: the outputs of the file stay float"
        del out[name]
    return out, why


def _needed(edges: Edges, quantized: Mapping[str, Quantizer], layers: set[int]) -> set[str]:
    """Tensors that an integer kernel reads, through moving operators."""
    needed: set[str] = set()
    for node in reversed(edges.order):
        if not node.output or not node.input:
            continue
        behind = {node.output[0], edges.after_clip(node.output[0])}
        if id(node) in layers or (node.op_type in MOVEMENT and behind & needed):
            needed.add(node.input[0])
        elif node.op_type in _INTEGER - CONTRACTIONS - CLIPS and behind & (needed | quantized.keys()):
            needed.update(node.input)
    return needed


def _bounds(node: onnx.NodeProto, edges: Edges) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, float("inf")
    limits = [-float("inf"), float("inf")]
    for index, name in enumerate(node.input[1:3]):
        if name in edges.initializers:
            limits[index] = float(array(edges.initializers[name]))
    return limits[0], limits[1]


def inside(quantizer: Quantizer, low: float, high: float) -> Quantizer:
    """The quantizer with its range cut to [low, high], if ``low`` is 0 and the format has no negative codes.

    Only then can the runtime absorb the clip; any other quantizer is returned as it is.
    """
    fmt = quantizer.format
    if low != 0.0 or fmt.low != 0:
        return quantizer
    top = min(float((fmt.high - quantizer.zero_point) * quantizer.scale.float()), high)
    if int(quantizer.zero_point) == 0 and float(np.float32(fmt.high) * np.float32(quantizer.scale)) <= high:
        return quantizer
    scale = np.float32(max(top, 1e-12) / fmt.high)
    while float(np.float32(fmt.high) * scale) > high:  # in float32, as the runtime compares
        scale = np.nextafter(scale, np.float32(0))
    return Quantizer(fmt, torch.tensor(float(scale), dtype=torch.float64), torch.tensor(0), None)


def remarks(model: onnx.ModelProto, activations: Mapping[str, Quantizer], layers: Iterable[Layer], weights: Iterable[str]) -> list[str]:
    """Layers that will not run as asked, as far as the graph alone tells."""
    edges, chosen, out = Edges(model), set(weights), []
    for layer in layers:
        behind = edges.after_clip(layer.output)
        if layer.weight in chosen:
            if layer.input not in activations:
                out.append(f"{layer.weight}: its input {layer.input!r} has no quantizer, so it computes in float from integer weights")
            elif layer.node.op_type == "Conv" and behind not in activations:
                out.append(f"{layer.weight}: a convolution whose output {behind!r} has no quantizer stays float")
            if behind != layer.output and layer.output in activations:
                out.append(f"{layer.weight}: a quantizer before the ReLU or clip keeps the runtime from absorbing it")
        elif layer.input in activations and behind in activations:
            out.append(
                f"{layer.weight}: a single float layer between quantized tensors costs two conversions, which a small layer does not earn"
            )
    return out


RULES = Rules(conform, remarks, flat=True)
