"""Linear layers that round their input in the range that it has itself: DynamicQuantizeLinear, then MatMulInteger on our codes.

Layers that read one tensor share its codes. ONNX Runtime fuses the rest (MatMulInteger, Cast, Mul) to MatMulIntegerToFloat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from shohin.errors import TargetError
from shohin.formats import Quantizer
from shohin.targets.onnx.edges import Edges, Layer, array
from shohin.targets.onnx.few_bits import plain_product
from shohin.targets.onnx.rewrite import drop_unused

if TYPE_CHECKING:
    import onnx


def insert(model: onnx.ModelProto, weights: Mapping[str, Quantizer], layers: Sequence[Layer]) -> None:
    """Replaces the contraction of each layer whose weight is among ``weights``, in place.

    Raises:
        TargetError: for an operation that is no plain product, or a grid that the kernel does not take.
    """
    from onnx import TensorProto, helper

    if not weights:
        return
    graph, edges = model.graph, Edges(model)
    mine = [layer for layer in layers if layer.weight in weights]
    for name in weights.keys() - {layer.weight for layer in mine}:
        raise TargetError(f"no linear layer of the graph contracts with the parameter {name!r}")
    held: set[str] = set()
    codes: dict[str, list[str]] = {}
    for layer in mine:
        node, source, result = layer.node, layer.input, layer.node.output[0]
        plain_product(layer, "ranges of the values at hand: 'int8' has one")
        made = []
        if source not in codes:
            codes[source] = [f"{source}_{part}" for part in ("dynamic", "dynamic_scale", "dynamic_zero")]
            made.append(helper.make_node("DynamicQuantizeLinear", [source], codes[source], name=f"{source}_dynamic"))
        rounded, scale, zero = codes[source]
        name = layer.initializer
        if name not in held:
            held.add(name)
            _codes(model, edges, layer, weights[layer.weight])
        whole, number, step = (f"{result}_{part}" for part in ("sums", "numbers", "steps"))
        bias = node.input[2] if len(node.input) > 2 else ""
        product = f"{result}_product" if bias else result
        made += [
            helper.make_node("MatMulInteger", [rounded, f"{name}_codes", zero], [whole], name=node.name),
            helper.make_node("Cast", [whole], [number], name=f"{node.name}:cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [scale, f"{name}_scale"], [step], name=f"{node.name}:steps"),
            helper.make_node("Mul", [number, step], [product], name=f"{node.name}:scaled"),
        ]
        if bias:
            made.append(helper.make_node("Add", [product, bias], [result], name=f"{node.name}:bias"))
        at = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, new in enumerate(made):
            graph.node.insert(at + offset, new)
    drop_unused(model)


def _codes(model: onnx.ModelProto, edges: Edges, layer: Layer, quantizer: Quantizer) -> None:
    """Adds the codes ``[inputs, outputs]`` and the scale of each output."""
    from onnx import numpy_helper

    if quantizer.axis != 0 or quantizer.group is not None or quantizer.columns is not None or not quantizer.format.symmetric:
        raise TargetError(f"{layer.weight!r}: the runtime's kernel takes one scale for each output, and no zero points")
    value = array(edges.initializers[layer.initializer]).astype(np.float32)
    found = quantizer.codes(torch.from_numpy(np.ascontiguousarray(value if layer.outputs_first else value.T))).numpy().astype(np.int8)
    for part, tensor in (("codes", found.T), ("scale", quantizer.scale.float().numpy())):
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(tensor), f"{layer.initializer}_{part}"))
