"""QuantizeLinear/DequantizeLinear insertion: our scales in an ONNX graph, in the form that ONNX Runtime fuses.

Every reader of a quantized tensor reads its DequantizeLinear; outputs of the file stay float. A quantized weight is an
int8 initializer of the parameter's name behind a DequantizeLinear. Its bias becomes int32 with scale
``input scale * weight scale``: with a float bias, MatMul + Add is merged to a float Gemm before the runtime looks for
integer kernels, which is twice as slow as no quantization.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from shohin.errors import TargetError
from shohin.formats import Quantizer
from shohin.targets.onnx.edges import Edges, Layer, array
from shohin.targets.onnx.rewrite import drop_unused

if TYPE_CHECKING:
    import onnx

#: int32 biases stay below this, so that sums cannot overflow
_BIAS_LIMIT = 2.0**30


def same(a: Quantizer, b: Quantizer) -> bool:
    """True if two quantizers hold the same grid in the same codes."""
    return (
        a.format.name == b.format.name
        and torch.equal(a.scale.float(), b.scale.float())
        and torch.equal(a.zero_point.to(torch.int64), b.zero_point.to(torch.int64))
    )


def insert_qdq(
    model: onnx.ModelProto, activations: Mapping[str, Quantizer], weights: Mapping[str, Quantizer], layers: Sequence[Layer]
) -> None:
    """Inserts Q/DQ pairs in place.

    Args:
        activations: tensor name -> per-tensor quantizer (8 bits).
        weights: parameter name -> quantizer, per tensor or per channel on the parameter's own axis.
        layers: the contractions of ``model`` (those whose weight is not in ``weights`` are left alone).

    Raises:
        TargetError: for a quantizer that ONNX cannot hold, or a tensor that does not exist.
    """
    edges = Edges(model)
    for name, quantizer in activations.items():
        if name not in edges.producer and name not in edges.inputs:
            raise TargetError(f"no tensor {name!r} to quantize in the graph")
        if quantizer.axis is not None or quantizer.scale.numel() != 1 or quantizer.format.bits > 8:
            raise TargetError(
                f"activation {name!r}: needs one scale and at most 8 bits; got {quantizer.format.name}, axis {quantizer.axis}"
            )
    chosen = [layer for layer in layers if layer.weight in weights]
    owned = {layer.initializer for layer in chosen}
    for layer in chosen:
        _quantize_layer(model, edges, layer, weights[layer.weight], activations.get(layer.input))
    for name in weights.keys() - {layer.weight for layer in chosen}:
        _quantize_other(model, edges, name, weights[name], owned)
    _quantize_activations(model, activations)
    drop_unused(model)


def _dtype(quantizer: Quantizer) -> Any:
    return np.uint8 if quantizer.format.low >= 0 else np.int8


def _add(model: onnx.ModelProto, name: str, value: NDArray[Any]) -> str:
    from onnx import numpy_helper

    # not ascontiguousarray: it gives a scalar a dimension, and the runtime fuses Add and Clip with scalar scales only
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, order="C"), name))
    return name


def _replace(model: onnx.ModelProto, name: str, value: NDArray[Any]) -> None:
    for index, initializer in enumerate(model.graph.initializer):
        if initializer.name == name:
            del model.graph.initializer[index]
            break
    _add(model, name, value)


def _quantize_activations(model: onnx.ModelProto, activations: Mapping[str, Quantizer]) -> None:
    from onnx import helper

    made: dict[str, list[onnx.NodeProto]] = {}
    read: dict[str, str] = {}
    for name, quantizer in activations.items():
        scale = _add(model, f"{name}_scale", np.asarray(float(quantizer.scale), dtype=np.float32))
        zero = _add(model, f"{name}_zero_point", np.asarray(int(quantizer.zero_point), dtype=_dtype(quantizer)))
        made[name] = [
            helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_quantized"], name=f"{name}_Q"),
            helper.make_node("DequantizeLinear", [f"{name}_quantized", scale, zero], [f"{name}_dequantized"], name=f"{name}_DQ"),
        ]
        read[name] = f"{name}_dequantized"
    nodes: list[onnx.NodeProto] = []
    for item in model.graph.input:
        nodes += made.get(item.name, [])
    for node in model.graph.node:
        node.input[:] = [read.get(i, i) for i in node.input]
        nodes.append(node)
        for name in node.output:
            nodes += made.get(name, [])
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _weight_axis(layer: Layer, quantizer: Quantizer) -> int | None:
    if quantizer.axis is None:
        return None
    return 1 - quantizer.axis if layer.transposed else quantizer.axis


def smooth(
    model: onnx.ModelProto, activations: Mapping[str, Quantizer], layers: Sequence[Layer], weights: Container[str]
) -> tuple[dict[str, Quantizer], dict[str, list[str]]]:
    """Divides activations that have a scale for each channel by their factors, in place, for the layers that read their codes.

    Args:
        activations: tensor name -> quantizer; of those with an axis the largest scale is that of the codes.
        layers: of the model; they read such a tensor, or its rows (see `shohin.targets.onnx.rewrite.flatten_linears`).
        weights: names of the weights that are quantized.

    Returns:
        Quantizers with one scale, by the names of the tensors that now hold what is quantized; and activation -> these tensors.

    Raises:
        TargetError: if no quantized linear layer reads such an activation.
    """
    from onnx import helper

    out, made = dict(activations), dict[str, list[str]]()
    for name, quantizer in activations.items():
        if quantizer.axis is None:
            continue
        readers = [layer for layer in layers if layer.weight in weights and layer.input in (name, f"{name}.rows")]
        if not readers:
            raise TargetError(f"activation {name!r} needs one scale: no quantized linear layer reads its codes")
        factors = _add(model, f"{name}_factors", quantizer.factors.float().numpy())
        del out[name]
        for source in dict.fromkeys(layer.input for layer in readers):
            mine = [layer.node for layer in readers if layer.input == source]
            at = min(list(model.graph.node).index(node) for node in mine)
            for node in mine:
                node.input[0] = f"{source}.even"
            model.graph.node.insert(at, helper.make_node("Mul", [source, factors], [f"{source}.even"], name=f"{source}.even"))
            out[f"{source}.even"] = quantizer.one_scale
            made.setdefault(name, []).append(f"{source}.even")
    return out, made


def _codes(quantizer: Quantizer, value: NDArray[Any], axis: int | None) -> NDArray[Any]:
    if quantizer.columns is not None:  # a matrix [O, I], or its transpose
        oriented = value if axis == quantizer.axis else value.T
        found = quantizer.codes(torch.from_numpy(np.array(oriented))).numpy().astype(_dtype(quantizer))
        return np.asarray(found if axis == quantizer.axis else found.T)
    moved = Quantizer(quantizer.format, quantizer.scale, quantizer.zero_point, axis)
    return np.asarray(moved.codes(torch.from_numpy(np.array(value))).numpy().astype(_dtype(quantizer)))


def _dequantize(
    model: onnx.ModelProto, name: str, codes: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], axis: int | None
) -> onnx.NodeProto:
    """An initializer of codes and the node that dequantizes it; ``name`` is replaced if it exists."""
    from onnx import helper

    _replace(model, name, codes)
    inputs = [name, _add(model, f"{name}_scale", scale), _add(model, f"{name}_zero_point", zero)]
    extra: dict[str, Any] = {} if axis is None else {"axis": axis}
    return helper.make_node("DequantizeLinear", inputs, [f"{name}_dequantized"], name=f"{name}_DQ", **extra)


def _quantize_layer(model: onnx.ModelProto, edges: Edges, layer: Layer, quantizer: Quantizer, data: Quantizer | None) -> None:
    value = array(edges.initializers[layer.initializer]).astype(np.float32)
    axis = _weight_axis(layer, quantizer)
    if axis is not None and value.shape[axis] != quantizer.scale.numel():
        raise TargetError(
            f"weight {layer.weight!r}: {quantizer.scale.numel()} scales for {value.shape[axis]} channels on axis {quantizer.axis}"
        )
    bias = array(edges.initializers[layer.bias]) if layer.bias else None
    if bias is not None and data is not None:
        quantizer = _room_for_bias(quantizer, bias, data)
    scale = quantizer.scale.float().numpy()
    zero = quantizer.zero_point.numpy().astype(_dtype(quantizer))
    tensor = layer.initializer
    if any(n.op_type == "DequantizeLinear" and n.input[0] == tensor for n in model.graph.node):  # one weight, several layers
        layer.node.input[1] = f"{tensor}_dequantized"
    else:
        model.graph.node.insert(0, _dequantize(model, tensor, _codes(quantizer, value, axis), scale, zero, axis))
        for reader in edges.reads(tensor):
            reader.input[:] = [f"{tensor}_dequantized" if i == tensor else i for i in reader.input]
    if bias is None or data is None:
        return
    factor = (np.float32(float(data.scale)) * scale).astype(np.float32)
    codes = np.clip(np.rint(bias.astype(np.float64) / factor), -(2.0**31), 2.0**31 - 1).astype(np.int32)
    shared = len(edges.reads(layer.bias)) > 1  # equal scales are needed to share a bias: each layer gets its own
    name = f"{layer.bias}.{layer.output}" if shared else layer.bias
    node = _dequantize(model, name, codes, factor, np.zeros_like(factor, dtype=np.int32), 0 if factor.ndim else None)
    model.graph.node.insert(0, node)
    reader = layer.adder or layer.node
    reader.input[:] = [node.output[0] if i == layer.bias else i for i in reader.input]


def _room_for_bias(quantizer: Quantizer, bias: NDArray[Any], data: Quantizer) -> Quantizer:
    """The weight quantizer with scales large enough that the bias fits 32 bits.

    Only a channel whose weights are some 1e-7 of its bias is touched; what its weights lose is below float32's resolution of the sum.
    """
    least = torch.from_numpy(np.abs(bias.astype(np.float64))) / (float(data.scale) * _BIAS_LIMIT)
    least = least.max() if quantizer.axis is None else least
    if bool((quantizer.scale >= least).all()):
        return quantizer
    return replace(quantizer, scale=torch.maximum(quantizer.scale, least))


def _quantize_other(model: onnx.ModelProto, edges: Edges, name: str, quantizer: Quantizer, owned: set[str]) -> None:
    """A weight that no contraction reads (an embedding): codes and a DequantizeLinear."""
    if name not in edges.initializers or name in owned or not edges.reads(name):
        raise TargetError(f"no layer of the graph contracts with the parameter {name!r}")
    value = array(edges.initializers[name]).astype(np.float32)
    scale, zero = quantizer.scale.float().numpy(), quantizer.zero_point.numpy().astype(_dtype(quantizer))
    node = _dequantize(model, name, _codes(quantizer, value, quantizer.axis), scale, zero, quantizer.axis)
    model.graph.node.insert(0, node)
    for reader in edges.reads(name):
        reader.input[:] = [node.output[0] if i == name else i for i in reader.input]
