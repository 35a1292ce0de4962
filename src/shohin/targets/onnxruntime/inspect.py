"""What ONNX Runtime really executes, compared with what the plan says.

Integer or float is decided by the runtime's optimizations up to the "extended" level; the last level only changes memory
layouts, and renames weights while it does. So layers are identified at the extended level, and kernels are counted at both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shohin.targets.base import KernelRow
from shohin.targets.onnx.check import departures, match_layer, metadata
from shohin.targets.onnx.few_bits import OP
from shohin.targets.onnxruntime.session import optimized_model

if TYPE_CHECKING:
    import onnx

_INTEGER = frozenset(
    {"QGemm", "QAttention", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "NhwcMaxPool"}
)
_MOVES = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Concat", "Slice", "Split", "Gather", "Expand"}
)
_EIGHT = (2, 3)  # onnx.TensorProto.UINT8, INT8


def inspect(path: str | Path, *, level: str = "all") -> list[KernelRow]:
    """Every node of the graph that the runtime executes, in order.

    Args:
        level: "all" is what ships; "layer" keeps the names of weights and tensors.

    Raises:
        TargetError: if the file cannot be loaded.
    """
    return rows(optimized_model(path, level=level), metadata(path)[0])


def counts(table: Iterable[KernelRow]) -> dict[str, int]:
    """Number of nodes by operator, most frequent first."""
    return dict(Counter(row.op for row in table).most_common())


def rows(model: onnx.ModelProto, layers: Iterable[str] = ()) -> list[KernelRow]:
    """The nodes of an optimized graph; ``layers`` are the weight names to look for."""
    names = sorted(layers, key=len, reverse=True)
    codes = {i.name for i in model.graph.initializer if i.data_type in _EIGHT}
    initializers = {i.name for i in model.graph.initializer}
    held = {i: i for i in initializers}  # tensor -> initializer, through dequantization
    out = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers:
            held[node.output[0]] = node.input[0]
        integer = (
            node.op_type.startswith("QLinear")
            or node.op_type in _INTEGER
            or (node.op_type in _MOVES and any(i in codes for i in node.input[:1]))
        )
        if node.op_type == "QuantizeLinear" or (integer and not _float_output(node)):
            codes.update(node.output)
        layer = next(
            (found for text in (node.name, *(held[i] for i in node.input if i in held)) if (found := match_layer(text, names))), None
        )
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            integer, layer = False, None
        out.append(KernelRow(node.op_type, integer, tuple(node.output), layer, node.name))
    return out


def _float_output(node: onnx.NodeProto) -> bool:
    """True for integer kernels that give float results: QGemm without an output scale, MatMulIntegerToFloat..."""
    if node.op_type == "QGemm":
        return len(node.input) < 8 or not node.input[7]
    return node.op_type in ("MatMulIntegerToFloat", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul")


def check(path: str | Path, expected: Mapping[str, str]) -> list[str]:
    """Where the runtime departs from the plan: see `shohin.targets.onnx.check.departures`."""
    table = rows(optimized_model(path, level="layer"), metadata(path)[0])
    return departures(path, expected, partial(_of_layer, table), partial(_of_tensor, table), lambda row: row.op == OP)


def _of_layer(table: list[KernelRow], name: str, tensor: str) -> KernelRow | None:
    """The contraction of a layer: by its weight, else by the tensor that it makes."""
    by_weight = [row for row in table if row.layer == name and row.op not in ("Transpose", "Cast", "Gather")]
    if by_weight:  # one weight may serve several layers: the float one is the one to report
        return min(by_weight, key=lambda row: row.integer)
    return _of_tensor(table, tensor)


def _of_tensor(table: list[KernelRow], tensor: str) -> KernelRow | None:
    """The operation that makes a tensor, by the name of the tensor or of its codes."""
    makers = {output: row for row in table for output in row.outputs}
    row = makers.get(f"{tensor}_quantized") or makers.get(tensor)
    if row is not None and row.op == "QuantizeLinear":
        row = makers.get(tensor, row)
    return row


def summary(path: str | Path) -> dict[str, Any]:
    """JSON-able: kernels by operator as shipped, how many layers run in integers, and in float."""
    table = inspect(path)
    layers, _ = metadata(path)
    found = [
        (_of_layer(rows_, name, tensor))
        for rows_ in [rows(optimized_model(path, level="layer"), layers)]
        for name, tensor in layers.items()
    ]
    integer = sum(row is not None and row.integer for row in found)
    return {"kernels": counts(table), "integer_layers": integer, "float_layers": len(layers) - integer}
