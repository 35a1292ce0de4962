"""What OpenVINO really executes, read off the model that it compiled, and compared with what the plan says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from shohin.targets.base import KernelRow
from shohin.targets.onnx.check import departures, match_layer, metadata
from shohin.targets.openvino.session import compiled

#: what takes no time of its own
_SILENT = frozenset({"Const", "Input", "Output"})
#: kinds that contract with a weight
CONTRACTIONS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
#: element types of codes, and of weights that stay few bits in the kernel
_CODES = ("u8", "i8")
_FEW = (*_CODES, "u4", "i4", "u2", "i2")
#: what `KernelRow.op` ends with for such a kernel
FEW_BITS = " (weights of few bits)"


def inspect(path: str | Path, threads: int = 1) -> list[KernelRow]:
    """Every operation of the compiled model, in order; ``op`` is OpenVINO's kind, ``outputs`` the names of what was fused into it, and
    it is integer if it reads codes.

    Raises:
        TargetError: if the file cannot be loaded.
    """
    names = sorted(metadata(path)[0], key=len, reverse=True)
    rows = []
    for node in compiled(path, threads).get_runtime_model().get_ordered_ops():
        kind, merged = (str(node.get_rt_info()[key].value) for key in ("layerType", "originalLayersNames"))
        if kind in _SILENT:
            continue
        fused = tuple(merged.split(","))
        layer = next((found for text in fused if kind in CONTRACTIONS and (found := match_layer(text, names))), None)
        types = [x.get_element_type().get_type_name() for x in node.inputs()]
        integer = bool(types) and types[0] in _CODES
        few = kind in CONTRACTIONS and not integer and len(types) > 1 and types[1] in _FEW
        rows.append(KernelRow(kind + FEW_BITS * few, integer, fused, layer, node.get_friendly_name()))
    return rows


def check(path: str | Path, expected: Mapping[str, str], threads: int = 1) -> list[str]:
    """Where the runtime departs from the plan: see `shohin.targets.onnx.check.departures`; and which grids it does not apply exactly."""
    table = inspect(path, threads)
    found = departures(path, expected, partial(_of_layer, table), partial(_of_tensor, table), lambda row: row.op.endswith(FEW_BITS))
    for row in table:
        merged = [name for name in row.outputs if not name.startswith(("Multiply", "Subtract"))]
        rounded = [a for a, b in itertools.pairwise(merged) if a.endswith("_Q") and b.startswith("Add")]
        found += [f"{name}: the runtime does not round here, inside {row.name}" for name in rounded]
    return found


def _of_layer(table: list[KernelRow], name: str, tensor: str) -> KernelRow | None:
    """The contraction of a layer; of several with one weight the float one is the one to report."""
    rows = [row for row in table if row.layer == name]
    return min(rows, key=lambda row: row.integer) if rows else _of_tensor(table, tensor)


def _of_tensor(table: list[KernelRow], tensor: str) -> KernelRow | None:
    return next((row for row in table if tensor in row.outputs or f"{tensor}_Q" in row.outputs), None)
