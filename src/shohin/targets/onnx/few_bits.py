"""Weights of few bits beside float activations: linear layers become the runtime's own MatMulNBits, with our codes and scales.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits: codes are unsigned, packed from
the lowest bit on, a block of a column after the other; a symmetric format is one with the zero point in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from shohin.errors import TargetError
from shohin.formats import Quantizer
from shohin.formats.scheme import Scheme
from shohin.targets.onnx.edges import Edges, Layer, array, attribute
from shohin.targets.onnx.rewrite import drop_unused

if TYPE_CHECKING:
    import onnx

OP, DOMAIN = "MatMulNBits", "com.microsoft"
BITS, GROUPS = (2, 4, 8), (16, 32, 64, 128, 256)


def misfit(scheme: Scheme, kind: str) -> str:
    """Why the runtime has no kernel for weights held so, with what it has; "" if it has one."""
    has = "linear layers, 'weights int4 group 32' or 'weights uint4 group 32' (2, 4 or 8 bits; groups of 16, 32, 64, 128 or 256)"
    if kind == "table":
        fits = scheme.granularity == "channel" and scheme.format.symmetric
        return "" if fits else f"it looks up tables in 'weights int8 channel', not in {str(scheme)!r}"
    if kind != "linear":
        return f"it has no convolution with weights of few bits and float activations; it has {has}, and 'int8' for convolutions"
    if scheme.granularity != "group" or scheme.group not in GROUPS or scheme.format.bits not in BITS:
        return f"it has no kernel for {str(scheme)!r}; it has {has}"
    return ""


def insert(model: onnx.ModelProto, weights: Mapping[str, Quantizer], layers: Sequence[Layer]) -> None:
    """Replaces the contraction of each layer whose weight is among ``weights``, in place.

    Raises:
        TargetError: for a weight that is read otherwise too, or an operation that is no plain product.
    """
    from onnx import helper, numpy_helper

    if not weights:
        return
    edges = Edges(model)
    mine = [layer for layer in layers if layer.weight in weights]
    for name in weights.keys() - {layer.weight for layer in mine}:
        raise TargetError(f"no linear layer of the graph contracts with the parameter {name!r}")
    held: dict[str, list[str]] = {}
    even: dict[tuple[str, bytes], str] = {}
    for layer in mine:
        if len(edges.reads(layer.initializer)) != sum(other.initializer == layer.initializer for other in mine):
            raise TargetError(f"{layer.weight!r} is also read by an operation that is no linear layer: leave it float")
        plain_product(layer, "weights of few bits")
        if layer.initializer not in held:
            held[layer.initializer] = _initializers(model, edges, layer, weights[layer.weight])
        columns = weights[layer.weight].columns
        if columns is not None:
            factors = columns.float().numpy()
            key = (layer.input, factors.tobytes())
            if key not in even:
                even[key] = f"{layer.input}.scaled{len(even)}"
                model.graph.initializer.append(numpy_helper.from_array(factors, f"{even[key]}_factors"))
                divided = helper.make_node("Mul", [layer.input, f"{even[key]}_factors"], [even[key]], name=even[key])
                model.graph.node.insert(list(model.graph.node).index(layer.node), divided)
            layer.node.input[0] = even[key]
        if layer.adder is not None:
            layer.adder.name = f"{layer.node.name}.bias"  # a runtime that fuses the two goes by this name
        _replaced(model, layer, held[layer.initializer], weights[layer.weight], _shape(edges, layer))
    if DOMAIN not in [o.domain for o in model.opset_import]:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    drop_unused(model)


def _shape(edges: Edges, layer: Layer) -> tuple[int, int]:
    """Outputs and inputs."""
    rows, columns = edges.initializers[layer.initializer].dims
    return (rows, columns) if layer.outputs_first else (columns, rows)


def plain_product(layer: Layer, what: str) -> None:
    """Raises TargetError for a layer that is no product of a matrix and an activation as it is, which alone has kernels for ``what``."""
    if layer.node.op_type not in ("Gemm", "MatMul"):
        raise TargetError(f"{layer.weight!r}: {layer.node.op_type} has no kernel for {what}")
    if layer.node.op_type == "Gemm" and (attribute(layer.node, "alpha", 1.0) != 1.0 or attribute(layer.node, "transA", 0)):
        raise TargetError(f"{layer.weight!r}: the runtime's kernel has no factor and no transposed input")


def _initializers(model: onnx.ModelProto, edges: Edges, layer: Layer, quantizer: Quantizer) -> list[str]:
    """Names of the codes, the scales and, for an asymmetric format, the zero points."""
    from onnx import numpy_helper

    value = array(edges.initializers[layer.initializer]).astype(np.float32)
    value = value if layer.outputs_first else value.T
    outputs, inputs = value.shape
    group, bits = quantizer.group, quantizer.format.bits
    if group is None or quantizer.scale.shape != (outputs, -(-inputs // group)):
        raise TargetError(
            f"weight {layer.weight!r} [{outputs}, {inputs}]: scales {tuple(quantizer.scale.shape)} do not fit groups of {group}"
        )
    middle = 2 ** (bits - 1) if quantizer.format.symmetric else 0
    codes = quantizer.codes(torch.from_numpy(np.ascontiguousarray(value))).numpy() + middle
    zero = quantizer.zero_point.numpy() + middle
    fill = np.repeat(zero, group, 1)[:, inputs:]  # what lies behind the last input is zero
    packed = _packed(np.concatenate([codes, fill], 1), bits).reshape(outputs, -1, group * bits // 8)
    name = layer.initializer
    made = {f"{name}_codes": packed, f"{name}_scale": quantizer.scale.float().numpy()}
    if not quantizer.format.symmetric:
        made[f"{name}_zero_point"] = _packed(zero, bits)
    for key, tensor in made.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(tensor), key))
    return list(made)


def _packed(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Unsigned codes ``[rows, n]`` as bytes ``[rows, ceil(n * bits / 8)]``, the first in the lowest bits."""
    each = 8 // bits
    filled = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each))).astype(np.uint8).reshape(len(codes), -1, each)
    out = np.zeros(filled.shape[:2], np.uint8)
    for i in range(each):
        out |= filled[:, :, i] << np.uint8(bits * i)
    return out


def _replaced(model: onnx.ModelProto, layer: Layer, held: Sequence[str], quantizer: Quantizer, shape: tuple[int, int]) -> None:
    from onnx import helper

    outputs, inputs = shape
    node, bias = layer.node, layer.node.input[2] if len(layer.node.input) > 2 else ""
    result = f"{node.output[0]}_product" if bias else node.output[0]
    made = [
        helper.make_node(
            OP,
            [node.input[0], *held],
            [result],
            name=node.name,
            domain=DOMAIN,
            K=inputs,
            N=outputs,
            bits=quantizer.format.bits,
            block_size=quantizer.group,
        )
    ]
    if bias:
        made.append(helper.make_node("Add", [result, bias], [node.output[0]], name=f"{node.name}.bias"))
    at = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    for offset, new in enumerate(made):
        model.graph.node.insert(at + offset, new)
