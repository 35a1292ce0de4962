"""What OpenVINO asks of activation quantizers, beside what ONNX Runtime asks.

A sum is fused into the two-dimensional convolution (and its ReLU or clip) that makes its first operand, or its second if the first comes
from none, and a quantizer between the two is then not applied: measured on a ResNet, a quarter of the sums came out one step off. So that
operand stays as the convolution makes it, which is also more exact; the other operand and the sum keep their codes. A view without that
quantizer equals the runtime.

Linear layers on sequences stay so: a reshape between a layer and a grid keeps the two from being fused, and grids on two dimensions take
ten times as long (MiniLM: 12.1 ms beside 13.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from shohin.formats import Quantizer
from shohin.targets.onnx.edges import Edges, Layer
from shohin.targets.onnx.lower import Rules
from shohin.targets.onnxruntime import rules as common

if TYPE_CHECKING:
    import onnx


def conform(
    model: onnx.ModelProto, activations: Mapping[str, Quantizer], quantized: Iterable[Layer]
) -> tuple[dict[str, Quantizer], dict[str, str]]:
    """See `shohin.targets.onnxruntime.rules.conform`."""
    layers = list(quantized)
    out, why = common.conform(model, activations, layers)
    edges = Edges(model)
    flat = [layer for layer in layers if layer.node.op_type == "Conv" and len(edges.initializers[layer.initializer].dims) == 4]
    made = {edges.after_clip(layer.output) for layer in flat}
    for node in edges.order:
        if node.op_type != "Add" or any(name in edges.initializers for name in node.input):
            continue
        for name in node.input:
            if name in out and name in made and len(edges.reads(name)) == 1 and name not in edges.outputs:
                why[name] = "dropped: the runtime adds inside the convolution, before it rounds"
                del out[name]
                break
    return out, why


def remarks(model: onnx.ModelProto, activations: Mapping[str, Quantizer], layers: Iterable[Layer], weights: Iterable[str]) -> list[str]:
    """See `shohin.targets.onnxruntime.rules.remarks`; a convolution into which a sum is fused needs no quantizer of its own."""
    edges = Edges(model)
    fused = {layer.weight for layer in layers if any(r.op_type == "Add" for r in edges.reads(edges.after_clip(layer.output)))}
    return common.remarks(model, activations, [layer for layer in layers if layer.weight not in fused], weights)


RULES = Rules(conform, remarks, flat=False)
