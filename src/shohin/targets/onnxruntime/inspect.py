"""What ONNX Runtime really executes, compared with what the plan says.

Integer or float is decided by the runtime's optimizations up to the "extended" level; the last level only changes memory
layouts, and renames weights while it does. So layers are identified at the extended level, and kernels are counted at both.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shohin.errors import TargetError, closest
from shohin.formats.scheme import is_scheme
from shohin.targets.base import KernelRow
from shohin.targets.onnxruntime.few_bits import OP
from shohin.targets.onnxruntime.lower import ALIASES, LAYERS
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
    return rows(optimized_model(path, level=level), _metadata(path)[0])


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
        layer = next((found for text in (node.name, *(held[i] for i in node.input if i in held)) if (found := _match(text, names))), None)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            integer, layer = False, None
        out.append(KernelRow(node.op_type, integer, tuple(node.output), layer, node.name))
    return out


def _float_output(node: onnx.NodeProto) -> bool:
    """True for integer kernels that give float results: QGemm without an output scale, MatMulIntegerToFloat..."""
    if node.op_type == "QGemm":
        return len(node.input) < 8 or not node.input[7]
    return node.op_type in ("MatMulIntegerToFloat", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul")


def _match(initializer: str, names: Iterable[str]) -> str | None:
    """The layer whose weight an initializer holds: its own name, or one that the runtime derived from it by a prefix or suffix."""
    for name in names:  # longest first
        at = initializer.find(name)
        if at < 0:
            continue
        before, after = initializer[:at], initializer[at + len(name) :]
        if (
            (not before or before[-1] in "_/:")
            and (not after or after[0] in "_/:." or after == ".T")
            and not after.startswith(("_scale", "_zero"))
        ):
            return name
    return None


def _metadata(path: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """Layers (weight -> tensor) and aliases (tap -> tensor) that lowering left in a file."""
    import onnx

    if not Path(path).is_file():
        raise TargetError(f"there is no file {str(path)!r}")
    held = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    if LAYERS not in held:
        return {}, {}
    return json.loads(held[LAYERS]), json.loads(held[ALIASES])


def check(path: str | Path, expected: Mapping[str, str]) -> list[str]:
    """Where the runtime departs from the plan.

    Args:
        expected: weight name (a layer) or tap name (the operation that makes that tensor) -> "int8", "float32" or a weight scheme
            ("weights int4 group 32").

    Returns:
        One sentence for each disagreement; empty if the runtime does what the plan says.

    Raises:
        TargetError: for a name that the file does not know, or a file that Shohin did not lower.
    """
    layers, aliases = _metadata(path)
    if not layers and expected:
        raise TargetError(f"{path} holds no names of layers: it was not written by Shohin, so it cannot be compared with a plan")
    table = rows(optimized_model(path, level="layer"), layers)
    tensors = _tensors(path)
    out = []
    for name, wanted in expected.items():
        if wanted not in ("int8", "float32") and not is_scheme(wanted):
            raise TargetError(f"{name!r}: expected formats are 'int8', 'float32' or a weight scheme; got {wanted!r}")
        if (weight := aliases.get(name, name)) in layers:
            found = _of_layer(table, weight, layers[weight])
        elif (tensor := aliases.get(name, name)) in tensors:
            found = _of_tensor(table, tensor)
        else:
            raise TargetError(f"{path} knows no layer or tensor {name!r}{closest(name, [*layers, *tensors])}")
        if found is None:
            if wanted != "float32":
                out.append(f"{name}: should be {wanted}, but no operation of the optimized graph could be recognized as it")
        elif (found.op == OP) != is_scheme(wanted):
            out.append(f"{name}: should be {wanted}, but the runtime executes {found.op}")
        elif found.integer != (wanted == "int8"):
            out.append(f"{name}: should be {wanted}, but the runtime executes {found.op} ({'integer' if found.integer else 'float'})")
    return out


def _tensors(path: str | Path) -> set[str]:
    import onnx

    graph = onnx.load(str(path)).graph
    return {o for node in graph.node for o in node.output} | {i.name for i in graph.input}


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
    layers, _ = _metadata(path)
    found = [
        (_of_layer(rows_, name, tensor))
        for rows_ in [rows(optimized_model(path, level="layer"), layers)]
        for name, tensor in layers.items()
    ]
    integer = sum(row is not None and row.integer for row in found)
    return {"kernels": counts(table), "integer_layers": integer, "float_layers": len(layers) - integer}
