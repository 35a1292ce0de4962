"""One flat graph out of an export: scopes written out, node names that survive copies, no assertions, plain ints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from shohin.errors import ModelError
from shohin.program.memory import name_of, where
from shohin.program.nodes import flatten
from shohin.program.provenance import Tagged

Renamed = dict[str, fx.Node]


def flat_copy(module: fx.GraphModule) -> tuple[fx.Graph, Renamed]:
    """A copy of the graph in which ``no_grad`` and switched-off ``autocast`` scopes are written out, and old name -> new node.

    A copy renames what hides a builtin (``input``); names of the result survive further copies. Results of a ``no_grad`` scope
    are detached.

    Raises:
        ModelError: for a scope or a control-flow operator that cannot be written out, with its line.
    """
    graph, renamed = fx.Graph(), Renamed()
    graph.output(_copy_into(graph, module, {}, renamed, grad=True))
    return graph, renamed


def _copy_into(graph: fx.Graph, module: nn.Module, values: dict[fx.Node, Any], renamed: Renamed, *, grad: bool) -> Any:
    """Copies the operations of a module's graph; returns its outputs. Placeholders that have no value yet are copied too."""
    source: fx.Graph = module.graph  # type: ignore[assignment]
    for node in source.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: values[n])
        if node in values:
            continue
        scope = _scope(node, module)
        if scope is not None:
            inner, given, enabled = scope
            arguments: Any = fx.map_arg(list(given), lambda n: values[n])
            places = [n for n in inner.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
            results = _copy_into(graph, inner, dict(zip(places, arguments, strict=True)), renamed, grad=enabled and grad)
            results = [results] if isinstance(results, fx.Node) else list(results)
            values[node] = [_detached(graph, r) if grad and not enabled else r for r in results]
        elif name_of(node) == "getitem" and isinstance(values.get(node.all_input_nodes[0]), list):
            values[node] = values[node.all_input_nodes[0]][node.args[1]]
        elif node.op == "get_attr" and isinstance(_attribute(module, node), nn.Module):
            continue  # the body of a scope
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
            renamed[node.name] = values[node]
    raise ModelError("the exported graph has no output")


def _attribute(module: nn.Module, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _scope(node: fx.Node, module: nn.Module) -> tuple[nn.Module, tuple[Any, ...], bool] | None:
    """(body, its arguments, whether gradients flow) of a scope operator; None for other nodes."""
    bodies = [n for n in node.all_input_nodes if n.op == "get_attr" and isinstance(_attribute(module, n), nn.Module)]
    if node.op != "call_function" or not bodies:
        return None
    name, body = name_of(node), _attribute(module, bodies[0])
    args: Any = node.args
    after = args.index(bodies[0]) + 1
    inner_line = next((where(n) for n in body.graph.nodes if where(n)), "")
    if name == "wrap_with_set_grad_enabled":
        return body, args[after:], bool(args[0])
    if name == "wrap_with_autocast":
        if args[2] is not False:
            raise ModelError(
                f"forward switches autocast on{inner_line}: take it out of forward, and run the whole model under autocast instead"
            )
        return body, args[after:], True
    raise ModelError(
        f"the control-flow operator {name} cannot be followed{where(node) or inner_line}; write it with torch.where, or without"
    )


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor) or not value.meta["val"].is_floating_point():
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta.update({k: v for k, v in value.meta.items() if k in ("val", "stack_trace", "nn_module_stack")})
    return node


def clean(graph: fx.Graph) -> fx.Graph:
    """Plain ints for tagged ones; assertions and unused operations away, in place."""
    for node in graph.nodes:
        if any(type(v) is Tagged for v in flatten([*node.args, *node.kwargs.values()])):
            node.args = map_aggregate(node.args, _plain)
            node.kwargs = map_aggregate(node.kwargs, _plain)
    return without_unused(graph)


def without_unused(graph: fx.Graph) -> fx.Graph:
    """Assertions and operations that nobody reads away, in place."""
    for node in reversed(graph.nodes):
        name = str(node.target)
        if node.op == "call_function" and not node.users and ("_assert" in name or "sym_constrain" in name or not _impure(node)):
            graph.erase_node(node)
    return graph


def _plain(value: Any) -> Any:
    return int(value) if type(value) is Tagged else value


def _impure(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return not str(getattr(node.target, "__module__", "")).endswith(("operator", "math")) and not _is_symbolic(node)
    return bool(schema.is_mutable)


def _is_symbolic(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat, int, float, bool))


def renamed_sources(found: Mapping[tuple[str, int], Any], again: Mapping[str, str]) -> dict[tuple[str, int], Any]:
    """Sources of integers, also for the nodes that repeat another."""
    by_node: dict[str, list[tuple[int, Any]]] = {}
    for (name, position), source in found.items():
        by_node.setdefault(name, []).append((position, source))
    out = dict(found)
    for made, repeated in again.items():
        out.update({(made, position): source for position, source in by_node.get(repeated, [])})
    return out
