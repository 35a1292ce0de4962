"""Tables of embeddings in 8 bits: codes are looked up, and multiplied by the scale of their row. Plain operators, for any runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from shohin.errors import TargetError
from shohin.formats import Quantizer
from shohin.targets.onnx.edges import Edges, array, attribute
from shohin.targets.onnx.rewrite import drop_unused

if TYPE_CHECKING:
    import onnx


def looked_up(model: onnx.ModelProto, names: Collection[str]) -> set[str]:
    """Of these initializers those that nothing but lookups by row read."""
    edges = Edges(model)
    return {
        name
        for name in names
        if name in edges.initializers
        and edges.reads(name)
        and all(node.op_type == "Gather" and node.input[0] == name and attribute(node, "axis", 0) == 0 for node in edges.reads(name))
    }


def insert(model: onnx.ModelProto, quantizers: Mapping[str, Quantizer]) -> None:
    """Replaces these tables, of `looked_up`, by codes with a scale for each row, in place. Raises TargetError for another grid."""
    from onnx import TensorProto, helper, numpy_helper

    graph, edges = model.graph, Edges(model)
    for name, q in quantizers.items():
        value = array(edges.initializers[name]).astype(np.float32)
        if q.axis != 0 or q.group is not None or not q.format.symmetric or q.format.bits > 8 or q.columns is not None:
            raise TargetError(f"the table {name!r} is looked up, and kernels take 8 bits with a scale for each row: 'weights int8 channel'")
        codes = q.codes(torch.from_numpy(np.ascontiguousarray(value))).numpy().astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(codes, f"{name}_codes"))
        graph.initializer.append(numpy_helper.from_array(q.scale.float().numpy()[:, None], f"{name}_scale"))
        for node in edges.reads(name):
            result, rows = node.output[0], node.input[1]
            code, number, scale = (f"{result}_{part}" for part in ("codes", "numbers", "scales"))
            made = [
                helper.make_node("Gather", [f"{name}_codes", rows], [code], name=f"{result}:codes", axis=0),
                helper.make_node("Cast", [code], [number], name=f"{result}:cast", to=TensorProto.FLOAT),
                helper.make_node("Gather", [f"{name}_scale", rows], [scale], name=f"{result}:scales", axis=0),
                helper.make_node("Mul", [number, scale], [result], name=f"{result}:lookup"),
            ]
            at = list(graph.node).index(node)
            graph.node.remove(node)
            for offset, new in enumerate(made):
                graph.node.insert(at + offset, new)
    if quantizers:
        drop_unused(model)
