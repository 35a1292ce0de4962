"""In-place operators become functional ones, without decomposing anything else.

``run_decompositions`` would do it too, but loses the switch that puts batch normalization into training mode.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from shohin.errors import ModelError
from shohin.program.memory import Memory, Spot, aten, example_value, name_of, spread, where
from shohin.program.nodes import argument, arguments

#: operators whose functional form answers with booleans, where the in-place one keeps its type
_COMPARING = frozenset(
    f"{n}_"
    for n in (
        *("eq", "ne", "lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal", "not_equal"),
        *("logical_and", "logical_or", "logical_xor", "logical_not"),
    )
)
#: functional operators that have another name
_OTHER_NAMES = {"normal": "normal_functional"}
#: in-place operators that change the shape of a tensor, not its contents
_RESHAPING = frozenset(["squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_"])


def make_functional(graph: fx.Graph, buffers: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Rewrites every in-place operator of the graph, in place, so that later readers of the changed memory read the result.

    Args:
        buffers: placeholders that may be changed: the program computes with the change, and does not keep it.

    Returns:
        The buffer placeholders that forward changes, and {node made again: node that it repeats}.

    Raises:
        ModelError: where an input, a parameter or another buffer is changed, or an operator or a view has no functional form, with its line.
    """
    memory, changed, dead = Memory(graph), dict[str, None](), []
    for node in list(graph.nodes):
        present = {n: memory.now(n, node) for n in node.all_input_nodes}
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            memory.add(node, present)
            _replace_inputs(node, present)
            continue
        target, name = _changed(node), name_of(node)
        base = memory.base(target)
        if base.op == "placeholder" and base.name not in buffers and name != "detach_":
            raise ModelError(
                f"an input, parameter or buffer ({base.name}) is changed in place{where(node)}; use the operator without the underscore"
            )
        if base.op == "placeholder" and name != "detach_":
            changed[base.name] = None
        _replace_inputs(node, present)
        if name == "detach_" and base.op == "placeholder":  # a constant: there is nothing to detach
            memory.add_same(node, target, present[target])
            dead.append(node)
            continue
        value = _functional(graph, node, present[target], target.meta["val"])
        if name in _RESHAPING:
            if not memory.is_alone(target):
                raise ModelError(
                    f"a tensor that has views gets another shape in place{where(node)}; use the operator without the underscore"
                )
            memory.rename(target, value)
        else:
            memory.change(target, value, node)
        memory.add_same(node, target, value)
        dead.append(node)
    for node in reversed(dead):
        schema = getattr(node.target, "_schema", None)
        if not node.users and schema is not None and schema.is_mutable:
            graph.erase_node(node)
    graph.lint()
    return list(changed), memory.again


def _replace_inputs(node: fx.Node, present: Mapping[fx.Node, fx.Node]) -> None:
    node.args = fx.map_arg(node.args, lambda n: present[n])
    node.kwargs = fx.map_arg(node.kwargs, lambda n: present[n])


def _changed(node: fx.Node) -> fx.Node:
    """The one tensor that an operator changes."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    written = []
    for position, declared in enumerate(schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            written.append(node.kwargs.get(declared.name, argument(node, position)))
    if len(written) != 1 or not isinstance(written[0], fx.Node):
        raise ModelError(f"{schema.name} changes several tensors in place and has no functional form{where(node)}")
    return written[0]


def _functional(graph: fx.Graph, node: fx.Node, old: fx.Node, like: Tensor) -> fx.Node:
    """The node that holds what the changed tensor, ``old`` before, holds afterwards; it keeps its type and shape."""
    name, spot = name_of(node), Spot(graph, node, node)
    if name == "zero_":
        return spot.emit(aten.zeros_like.default, old)
    if name == "fill_" and not isinstance(node.args[1], fx.Node):
        return spot.emit(aten.full_like.default, old, node.args[1])
    if name in ("copy_", "fill_"):
        return spread(spot, arguments(node)[1], old)
    overload = functional_overload(node.target)
    if overload is None:
        schema: Any = node.target._schema  # type: ignore[union-attr]
        raise ModelError(f"{schema.name} changes a tensor in place and has no functional form{where(node)}")
    node.target = overload
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "out"}
    tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if all(t.dtype == like.dtype for t in tensors) and name not in _COMPARING:
        return node
    result = example_value(node)
    if result.dtype == like.dtype:
        return node
    node.meta["val"] = result
    return Spot(graph, node.next, node).emit(aten.to.dtype, node, like.dtype)


def functional_overload(target: Any) -> Any:
    """The overload without side effects that computes what an in-place or ``out=`` overload writes; None if there is none."""
    schema = target._schema
    namespace, name = schema.name.split("::")
    base = name.removesuffix("_")
    wanted = [str(a.type) for a in schema.arguments if not a.is_out]
    for candidate in (base, _OTHER_NAMES.get(base, base)):
        packet = getattr(getattr(torch.ops, namespace), candidate, None)
        if packet is None:
            continue
        overloads = sorted(packet.overloads(), key=lambda o: o != (schema.overload_name or "default"))
        for found in (getattr(packet, o) for o in overloads):
            if not found._schema.is_mutable and [str(a.type) for a in found._schema.arguments] == wanted:
                return found
    return None
