"""Small views of an ONNX graph: who makes a tensor, who reads it, and the layers that own weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

#: operators that move codes without changing them; MaxPool commutes with any quantizer because rounding is monotone
MOVEMENT = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"})
CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
CLIPS = frozenset({"Relu", "Clip"})


class Edges:
    """Producers, readers and initializers of a graph, by tensor name. A snapshot: make a new one after a change."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.order: list[onnx.NodeProto] = list(graph.node)
        self.producer: dict[str, onnx.NodeProto] = {o: n for n in graph.node for o in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.initializers: dict[str, onnx.TensorProto] = {i.name: i for i in graph.initializer}
        self.inputs: set[str] = {i.name for i in graph.input}
        self.outputs: set[str] = {o.name for o in graph.output}

    def reads(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor."""
        return self.readers.get(name, [])

    def after_clip(self, name: str) -> str:
        """The tensor behind a ReLU or clip that alone reads ``name``; otherwise ``name``."""
        readers = self.reads(name)
        if len(readers) == 1 and name not in self.outputs and readers[0].op_type in CLIPS and readers[0].input[0] == name:
            return str(readers[0].output[0])
        return name


@dataclass(frozen=True)
class Layer:
    """A contraction with a weight of the model.

    Args:
        weight: qualified parameter name.
        initializer: name of the tensor that holds it in the file.
        transposed: True if the file holds the transpose of the parameter (2-d).
        node: the Conv, ConvTranspose, Gemm or MatMul.
        adder: the Add that adds the bias of a MatMul, or None.
        bias: initializer name of the bias, or "".
    """

    weight: str
    initializer: str
    transposed: bool
    node: onnx.NodeProto
    adder: onnx.NodeProto | None
    bias: str

    @property
    def input(self) -> str:
        """Name of the activation that it reads."""
        return str(self.node.input[0])

    @property
    def outputs_first(self) -> bool:
        """True if the file holds the weight of a linear layer as ``[outputs, inputs]``, False for the transpose."""
        return self.node.op_type == "Gemm" and bool(attribute(self.node, "transB", 0))

    @property
    def output(self) -> str:
        """Name of the tensor that it computes, bias included."""
        return str((self.adder or self.node).output[0])


def array(tensor: onnx.TensorProto) -> NDArray[Any]:
    """The values of an initializer."""
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor))


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """The known shapes, by tensor name; None for a dimension that is free."""
    from onnx import shape_inference

    graph, out = model.graph, dict[str, list[int | None]]()
    made = {o for node in graph.node for o in node.output}
    bare = type(model).FromString(model.SerializeToString())
    del bare.graph.value_info[:]
    exported = [item for item in graph.value_info if item.name in made]
    for item in (*shape_inference.infer_shapes(bare).graph.value_info, *exported, *graph.input, *graph.output):
        if item.type.tensor_type.HasField("shape"):
            out[item.name] = [d.dim_value if d.HasField("dim_value") else None for d in item.type.tensor_type.shape.dim]
    return out


def layers(model: onnx.ModelProto, transposed: Mapping[str, str]) -> list[Layer]:
    """Every contraction whose weight is an initializer.

    Args:
        transposed: initializer name -> parameter name, for those that hold a parameter's transpose.
    """
    edges = Edges(model)
    found = []
    for node in edges.order:
        if node.op_type not in CONTRACTIONS or len(node.input) < 2 or node.input[1] not in edges.initializers:
            continue
        initializer = node.input[1]
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in edges.initializers else ""
        adder = None
        if node.op_type == "MatMul" and len(edges.initializers[initializer].dims) == 2:
            adder, bias = _adder(node, edges)
        name = transposed.get(initializer, initializer)
        found.append(Layer(name, initializer, initializer in transposed, node, adder, bias))
    return found


def _adder(node: onnx.NodeProto, edges: Edges) -> tuple[onnx.NodeProto | None, str]:
    """The Add behind a MatMul that adds a vector of the right length, and that vector."""
    readers = edges.reads(node.output[0])
    if len(readers) != 1 or readers[0].op_type != "Add" or node.output[0] in edges.outputs:
        return None, ""
    other = [i for i in readers[0].input if i != node.output[0]]
    width = edges.initializers[node.input[1]].dims[1]
    if len(other) == 1 and other[0] in edges.initializers and list(edges.initializers[other[0]].dims) == [width]:
        return readers[0], other[0]
    return None, ""
