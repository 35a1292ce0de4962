"""Steps from an exported graph to that of a narrower program. Each changes a graph in place, or raises `CannotNarrow`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from shohin.program import Program, family
from shohin.program.nodes import argument, arguments
from shohin.targets.base import CannotNarrow
from shohin.targets.onnx.edges import Edges, array, attribute

if TYPE_CHECKING:
    import onnx

CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d", "convolution"))
#: the exporter writes the sizes of these out, even where the program does not
SIZES = frozenset(("view", "reshape", "expand", "unflatten", "flatten"))
PIECES = frozenset(("split", "split_with_sizes", "chunk"))
#: relative to the largest value of a tensor: the same operations in another order, not other ones
TOLERANCE = 1e-3


def changed_nodes(full: Program, program: Program, skips: Mapping[str, str]) -> frozenset[str]:
    """Nodes of the narrower program whose result in the graph follows integers: those that differ, and the pieces of splits.

    Raises:
        CannotNarrow: if the programs differ in anything but integers and the skipped regions.
    """
    before = {n.name: n for n in full.graph.nodes}
    out: set[str] = set()

    def plain(value: Any, skipped: Mapping[str, str]) -> Any:
        if isinstance(value, fx.Node):
            name = value.name
            while name in skipped:
                name = skipped[name]
            return f"%{name}"
        if isinstance(value, (list, tuple)):
            return [plain(v, skipped) for v in value]
        return {k: plain(v, skipped) for k, v in value.items()} if isinstance(value, dict) else value

    for node in program.graph.nodes:
        old = before.get(node.name)
        if old is not None and family_of(node) in PIECES and family_of(old) in PIECES:  # the sizes of the pieces say all
            if plain(node.args[0], {}) != plain(old.args[0], skips):
                raise CannotNarrow(f"{node.name} splits another tensor")
            out.update(user.name for user in node.users)
            continue
        if old is None or (node.op, node.target) != (old.op, old.target) or program.names.get(node.name) != full.names.get(node.name):
            raise CannotNarrow(f"{node.name} is not the operation that was exported")
        if node.op not in ("call_function", "output"):
            continue
        if plain(node.kwargs, {}) != plain(old.kwargs, skips):
            raise CannotNarrow(f"{node.name}: named arguments changed")
        now, then = plain(node.args, {}), plain(old.args, skips)
        if now != then:
            if not _integers_only(now, then):
                raise CannotNarrow(f"{node.name}: more than integers changed")
            if node.op == "output":
                raise CannotNarrow("the outputs changed")
            if family(node) not in CONVOLUTIONS:
                out.add(node.name)
    return frozenset(out)


def family_of(node: fx.Node) -> str:
    """The family of an operation, or "" for placeholders and the output."""
    return family(node) if node.op == "call_function" else ""


def _integers_only(now: Any, then: Any) -> bool:
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(_integers_only(a, b) for a, b in zip(now, then, strict=True))
    return bool(now == then) or (type(now) is int and type(then) is int)


def cut_out(model: onnx.ModelProto, skips: Mapping[str, str]) -> None:
    """Lets the readers of each region's output (a tensor name) read its input."""
    for out in skips:
        source = out
        for _ in range(len(skips) + 1):
            source = skips.get(source, source)
        if source == out or source in skips:
            raise CannotNarrow(f"the region that ends in {out!r} has no input of its own in the graph")
        for node in model.graph.node:
            node.input[:] = [source if i == out else i for i in node.input]


def fill(model: onnx.ModelProto, full: Program, program: Program) -> None:
    """Gives each initializer that is a tensor of the full program the narrower program's value."""
    from onnx import numpy_helper

    for index, initializer in enumerate(model.graph.initializer):
        if initializer.name not in full.tensors:
            continue
        if initializer.name not in program.tensors:
            raise CannotNarrow(f"the graph needs the parameter {initializer.name!r}, which the narrower program lacks")
        value = program.tensors[initializer.name].detach().cpu().contiguous().numpy()
        model.graph.initializer[index].CopyFrom(numpy_helper.from_array(value, initializer.name))


def regroup(model: onnx.ModelProto, full: Program, program: Program) -> None:
    """Sets the groups of convolutions, found by their weight."""
    groups: dict[str, tuple[int, int]] = {}
    before = {n.name: n for n in full.graph.nodes}
    for node in program.graph.nodes:
        if family_of(node) in CONVOLUTIONS:
            weight: Any = node.args[1]
            pair = (argument(before[node.name], 6, 1), argument(node, 6, 1))
            if weight.name in program.names and groups.setdefault(program.names[weight.name], pair) != pair:
                raise CannotNarrow(f"{node.name}: two convolutions of one weight have different groups")
    for node in model.graph.node:
        if node.op_type != "Conv" or groups.get(node.input[1], (1, 1))[0] == groups.get(node.input[1], (1, 1))[1]:
            continue
        old, new = groups[node.input[1]]
        found = [a for a in node.attribute if a.name == "group"]
        if len(found) != 1 or found[0].i != old:
            raise CannotNarrow(f"the convolution with {node.input[1]!r} has not the {old} groups of the program")
        found[0].i = new


def set_integers(
    model: onnx.ModelProto,
    full: Program,
    program: Program,
    tensors: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Tensor],
) -> None:
    """Changes literal integers before the tensors of nodes.

    Args:
        tensors: node name -> tensor name, of the nodes that `changed_nodes` found.
        shapes: node name -> shape in the full program.
        values: node name -> value in the narrower program.
    """
    edges = Edges(model)
    before = {n.name: n for n in full.graph.nodes}
    nodes = {n.name: n for n in program.graph.nodes}
    done: set[str] = set()
    for name, tensor in tensors.items():
        producer = edges.producer.get(tensor)
        if producer is None:
            raise CannotNarrow(f"no operation of the graph makes {name}")
        kind, node = family_of(nodes[name]), nodes[name]
        if kind == "getitem":
            _split(model, edges, producer, tensors, values, done)
        elif kind in SIZES and shapes[name] == tuple(values[name].shape):
            continue
        elif kind in SIZES and producer.op_type in ("Reshape", "Expand", "Flatten"):
            if producer.op_type != "Flatten":
                _sizes(model, edges, producer, shapes[name], tuple(values[name].shape))
        elif kind in ("slice", "select") and producer.op_type in ("Slice", "Gather"):
            _bounds(model, edges, producer, kind, before[name], node)
        elif kind not in ("layer_norm", "rms_norm"):  # these take the size from their scale
            raise CannotNarrow(f"{name}: its integers are not followed into {producer.op_type}")


def _add(model: onnx.ModelProto, name: str, value: NDArray[Any]) -> str:
    from onnx import numpy_helper

    held = {i.name for i in model.graph.initializer}
    while name in held:
        name += "_"
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _sizes(model: onnx.ModelProto, edges: Edges, node: onnx.NodeProto, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """The shape that a Reshape or Expand reads: a constant, or constants and computed sizes side by side."""
    from onnx import helper

    def follow(size: int, at: int) -> int:
        if old[at] != new[at] and size > 0:
            if size != old[at]:
                raise CannotNarrow(f"{node.output[0]}: its size {size} is not that of the program, {old[at]}")
            return new[at]
        return size

    name = node.input[1]
    if name in edges.initializers:
        sizes = array(edges.initializers[name])
        if sizes.shape != (len(old),):
            raise CannotNarrow(f"{node.output[0]}: its shape has another length")
        node.input[1] = _add(model, f"{node.output[0]}.shape", np.asarray([follow(int(s), i) for i, s in enumerate(sizes)], dtype=np.int64))
        return
    maker = edges.producer.get(name)
    if maker is None or maker.op_type != "Concat":
        raise CannotNarrow(f"{node.output[0]}: its shape is computed")
    inputs, at = [], 0
    for item in maker.input:
        held = array(edges.initializers[item]).reshape(-1) if item in edges.initializers else None
        if held is None:
            inputs.append(item)
            at += 1
            continue
        sizes = np.asarray([follow(int(s), at + i) for i, s in enumerate(held)], dtype=np.int64)
        inputs.append(item if np.array_equal(sizes, held) else _add(model, f"{node.output[0]}.shape.{at}", sizes))
        at += len(held)
    if at != len(old):
        raise CannotNarrow(f"{node.output[0]}: its shape has another length")
    node.input[1] = f"{node.output[0]}.shape.all"
    made = helper.make_node("Concat", inputs, [node.input[1]], name=node.input[1], axis=0)
    model.graph.node.insert(list(model.graph.node).index(node), made)


def _split(
    model: onnx.ModelProto,
    edges: Edges,
    node: onnx.NodeProto,
    tensors: Mapping[str, str],
    values: Mapping[str, Tensor],
    done: set[str],
) -> None:
    if node.output[0] in done:
        return
    if node.op_type != "Split":
        raise CannotNarrow(f"{node.output[0]}: a piece that is made by {node.op_type}")
    by_tensor = {tensor: values[n] for n, tensor in tensors.items() if n in values}
    pieces = [by_tensor.get(o) for o in node.output]
    if any(p is None for p in pieces):
        raise CannotNarrow(f"{node.output[0]}: a piece of the split is not known")
    axis = int(attribute(node, "axis", 0))
    sizes = np.asarray([p.shape[axis] for p in pieces if p is not None], dtype=np.int64)
    given = len(node.input) > 1 and node.input[1] in edges.initializers
    if not given and len(node.input) > 1 and node.input[1]:
        raise CannotNarrow(f"{node.output[0]}: the sizes of its split are computed")
    if given and np.array_equal(array(edges.initializers[node.input[1]]), sizes):
        return
    kept = [a for a in node.attribute if a.name != "num_outputs"]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.input[:] = [node.input[0], _add(model, f"{node.output[0]}.sizes", sizes)]
    done.add(node.output[0])


def _bounds(model: onnx.ModelProto, edges: Edges, node: onnx.NodeProto, kind: str, old: fx.Node, new: fx.Node) -> None:
    """Start and end of a Slice, or the index of a Gather."""
    places = ((2, 1), (3, 2)) if kind == "slice" else ((2, 1),)
    for place, index in places:
        a, b = argument(old, place), argument(new, place)
        if a == b:
            continue
        held = array(edges.initializers[node.input[index]]) if node.input[index] in edges.initializers else None
        if held is None or held.size != 1 or int(held.reshape(-1)[0]) != a:
            raise CannotNarrow(f"{node.output[0]}: the bounds in the graph are not those of the program")
        node.input[index] = _add(model, f"{node.output[0]}.bound{index}", np.full_like(held, b))
    if len(arguments(old)) != len(arguments(new)):
        raise CannotNarrow(f"{node.output[0]}: the bounds are given in another form")


def set_shapes(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Forgets the shapes inside the graph, and declares those of the outputs anew; free dimensions stay free."""
    del model.graph.value_info[:]
    for item in model.graph.output:
        dims = item.type.tensor_type.shape.dim
        if item.name not in shapes:
            continue
        if len(dims) != len(shapes[item.name]):
            raise CannotNarrow(f"{item.name} has another rank than in the program")
        for dim, size in zip(dims, shapes[item.name], strict=True):
            if dim.HasField("dim_value"):
                dim.dim_value = size
        model.graph.value_info.append(item)  # it stays known when the tap is no output any more


def compare(found: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> None:
    """Raises CannotNarrow if a tensor of the graph is not that of the program."""
    for name, value in wanted.items():
        if name not in found:
            raise CannotNarrow(f"{name} is no output of the narrowed graph")
        got = found[name]
        if got.shape != value.shape or got.dtype != value.dtype:
            raise CannotNarrow(f"{name}: {got.dtype} {got.shape} instead of {value.dtype} {value.shape}")
        if value.dtype.kind == "f":
            bound = TOLERANCE * float(np.abs(value).max(initial=0.0)) + 1e-7
            equal = bool((np.abs(got - value) <= bound).all())
        else:
            equal = bool(np.array_equal(got, value))
        if not equal:
            raise CannotNarrow(f"{name}: the narrowed graph computes other values than the program")
