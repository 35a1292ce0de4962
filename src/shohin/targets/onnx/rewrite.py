"""Rewrites of the exported graph that change no value but decide which kernels can run."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shohin.targets.onnx.edges import Edges, Layer, array, attribute, shapes

if TYPE_CHECKING:
    import onnx


def fold_transposes(model: onnx.ModelProto) -> dict[str, str]:
    """Replaces ``Transpose(parameter)`` by an initializer.

    The initializer keeps the parameter's name if nothing else reads the parameter, otherwise it is named ``<name>.T``.

    Returns:
        initializer name -> parameter name, of the 2-d ones (axes swapped).
    """
    from onnx import numpy_helper

    graph, edges = model.graph, Edges(model)
    swapped: dict[str, str] = {}
    done: dict[tuple[str, tuple[int, ...]], str] = {}
    renamed: dict[str, str] = {}
    for node in edges.order:
        if node.op_type != "Transpose" or node.input[0] not in edges.initializers or node.output[0] in edges.outputs:
            continue
        name = node.input[0]
        value = array(edges.initializers[name])
        permutation = tuple(attribute(node, "perm", tuple(reversed(range(value.ndim)))))
        if (name, permutation) not in done:
            new = f"{name}.T" if permutation == (1, 0) else f"{name}.{''.join(map(str, permutation))}"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value.transpose(permutation)), new))
            done[name, permutation] = new
            if permutation == (1, 0):
                swapped[new] = name
        renamed[node.output[0]] = done[name, permutation]
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [renamed.get(i, i) for i in node.input]
    drop_unused(model)
    left = {i.name for i in graph.initializer}
    for new, name in list(swapped.items()):
        if name not in left:
            rename(model, new, name)
            swapped[name] = swapped.pop(new)
    return swapped


def pool_means(model: onnx.ModelProto) -> None:
    """Turns a mean over all spatial axes into GlobalAveragePool (and Flatten), which has an integer kernel; ReduceMean has none.

    In three dimensions only behind a convolution: a mean over the last axis of a sequence is not a pooling.
    """
    from onnx import helper

    graph, edges, known = model.graph, Edges(model), shapes(model)
    for node in edges.order:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in edges.initializers:
            continue
        rank = len(known.get(node.input[0], ()))
        axes = sorted(int(a) % max(rank, 1) for a in array(edges.initializers[node.input[1]]).reshape(-1))
        if rank < 3 or axes != list(range(2, rank)) or (rank == 3 and not _behind_convolution(node.input[0], edges)):
            continue
        out = node.output[0]
        keep = bool(attribute(node, "keepdims", 1))
        pooled = out if keep else f"{out}.pooled"
        new = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=f"{node.name}.pool")]
        if not keep:
            new.append(helper.make_node("Flatten", [pooled], [out], axis=1, name=f"{node.name}.flatten"))
        at = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, made in enumerate(new):
            graph.node.insert(at + offset, made)
    drop_unused(model)


def _behind_convolution(name: str, edges: Edges) -> bool:
    stack, seen = [name], set[str]()
    while stack:
        node = edges.producer.get(stack.pop())
        if node is None or node.output[0] in seen or node.op_type in ("MatMul", "Gemm", "LayerNormalization"):
            continue
        if node.op_type == "Conv":
            return True
        seen.add(node.output[0])
        stack += node.input
    return False


def flatten_linears(model: onnx.ModelProto, chosen: Sequence[Layer]) -> None:
    """Turns ``MatMul(x, W.T) + b`` on three and more dimensions into Reshape, Gemm, Reshape, in place.

    The runtime does this itself only if the batch is fixed; with a free batch the bias would be dequantized on each run.
    Layers whose input has more than one free dimension are left as they are.

    Args:
        chosen: MatMul layers to rewrite.
    """
    from onnx import helper, numpy_helper

    graph, known = model.graph, shapes(model)
    rows: dict[str, str] = {}  # layers that read one tensor (q, k and v) share its flat form
    for layer in chosen:
        shape = known.get(layer.input, [])
        if layer.adder is None or len(shape) < 3 or shape[-1] is None or sum(d is None for d in shape) > 1:
            continue
        width = next(i for i in graph.initializer if i.name == layer.initializer).dims[1]
        flat, back = f"{layer.input}.rows", f"{layer.output}.flat"
        new = []
        if layer.input not in rows:
            rows[layer.input] = flat
            graph.initializer.append(numpy_helper.from_array(np.asarray([-1, shape[-1]], dtype=np.int64), f"{flat}.shape"))
            new.append(helper.make_node("Reshape", [layer.input, f"{flat}.shape"], [flat], name=f"{layer.node.name}.rows"))
        size = [*(-1 if d is None else d for d in shape[:-1]), width]
        graph.initializer.append(numpy_helper.from_array(np.asarray(size, dtype=np.int64), f"{back}.shape"))
        new.append(helper.make_node("Gemm", [flat, layer.initializer, layer.bias], [back], name=f"{layer.node.name}.gemm"))
        new.append(helper.make_node("Reshape", [back, f"{back}.shape"], [layer.output], name=f"{layer.node.name}.back"))
        at = list(graph.node).index(layer.node)  # here, not at the Add: a later layer may share the rows
        graph.node.remove(layer.adder)
        graph.node.remove(layer.node)
        for offset, made in enumerate(new):
            graph.node.insert(at + offset, made)


def shield_float(model: onnx.ModelProto, floats: Sequence[Layer], quantized: Container[str]) -> None:
    """Keeps the runtime from quantizing a float layer that lies between quantized tensors, which it does on its own
    (per tensor, with all 8 bits), by a Max behind the layer: in place of its ReLU, or against the lowest float.

    Args:
        floats: layers that must stay float.
        quantized: names of the tensors with quantizers.
    """
    from onnx import helper, numpy_helper

    graph, edges = model.graph, Edges(model)
    for layer in floats:
        out, behind = layer.output, edges.after_clip(layer.output)
        if layer.input not in quantized or behind not in quantized or layer.node.op_type == "MatMul":  # MatMul is left alone
            continue
        clip = edges.producer[behind] if behind != out else None
        bound = f"{out}.bound"
        relu = clip is not None and clip.op_type == "Relu"
        graph.initializer.append(numpy_helper.from_array(np.asarray(0 if relu else np.finfo(np.float32).min, dtype=np.float32), bound))
        if clip is not None and relu:
            clip.op_type = "Max"
            clip.input.append(bound)
        else:
            at = list(graph.node).index(layer.node)
            layer.node.output[0] = f"{out}.float"
            graph.node.insert(at + 1, helper.make_node("Max", [f"{out}.float", bound], [out], name=f"{layer.weight}.max"))


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """Renames an initializer."""
    for initializer in model.graph.initializer:
        if initializer.name == old:
            initializer.name = new
    for node in model.graph.node:
        node.input[:] = [new if i == old else i for i in node.input]


def drop_outputs(model: onnx.ModelProto, names: set[str]) -> None:
    """Removes graph outputs (the tensors stay, unless nothing reads them)."""
    keep = [o for o in model.graph.output if o.name not in names]
    del model.graph.output[:]
    model.graph.output.extend(keep)


def drop_unused(model: onnx.ModelProto) -> None:
    """Removes nodes and initializers that no output depends on."""
    graph = model.graph
    needed = {o.name for o in graph.output}
    kept = []
    for node in reversed(list(graph.node)):
        if any(o in needed for o in node.output):
            kept.append(node)
            needed.update(node.input)
            for attr in node.attribute:  # bodies of If and Loop read outer tensors
                for sub in ([attr.g] if attr.HasField("g") else []) + list(attr.graphs):
                    needed.update(i for inner in sub.node for i in inner.input)
                    needed.update(o.name for o in sub.output)
    initializers = [i for i in graph.initializer if i.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(initializers)
