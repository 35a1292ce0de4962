"""In-place operators become functional ones, without decomposing anything else.

``run_decompositions`` would do it too, but loses the switch that puts batch normalization into training mode.
"""

from __future__ import annotations

from torch import fx

from shohin.errors import ModelError

#: operators whose result may share memory with their first argument
ALIASES = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "expand",
        "expand_as",
        "slice",
        "select",
        "unbind",
        "split",
        "split_with_sizes",
        "chunk",
        "squeeze",
        "unsqueeze",
        "detach",
        "alias",
        "movedim",
        "swapaxes",
        "narrow",
        "diagonal",
        "unfold",
        "view_as",
        "contiguous",
        "to",
        "dropout",
        "getitem",
        "as_strided",
    ]
)


def make_functional(graph: fx.Graph) -> fx.Graph:
    """Rewrites every in-place operator of the graph, in place, so that later readers of the mutated tensor read the result.

    Raises:
        ModelError: where a tensor that shares memory with the mutated one is read later: the result would differ.
    """
    import torch

    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        namespace, name = schema.name.split("::")
        packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
        overload = getattr(packet, schema.overload_name or "default", None) if name.endswith("_") and packet is not None else None
        if overload is None:
            raise ModelError(f"{schema.name} changes a tensor in place and has no functional form{_where(node)}")
        mutated = node.args[0]
        _check_aliases(node, mutated, order)
        node.target = overload
        for user in list(mutated.users):
            if user is not node and order.get(user, -1) > order[node]:
                user.replace_input_with(mutated, node)
    graph.lint()
    return graph


def _check_aliases(node: fx.Node, mutated: fx.Node, order: dict[fx.Node, int]) -> None:
    """Refuses if anything else that shares the mutated tensor's memory is read after the mutation."""
    base = mutated
    while _is_alias(base) and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    if base.op == "placeholder":
        raise ModelError(f"an input or parameter ({base.name}) is changed in place{_where(node)}; use the operator without the underscore")
    family = [base]
    for member in family:
        family.extend(u for u in member.users if _is_alias(u) and u not in family and order.get(u, -1) < order[node])
    for member in family:
        if member is mutated:
            continue
        if any(order.get(user, -1) > order[node] for user in member.users):
            raise ModelError(
                f"a tensor that shares memory with {member.name} is changed in place and read later{_where(node)}; use the operator without the underscore"
            )


def _is_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema else getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in ALIASES


def _where(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return f" (at {lines[-2]}: {lines[-1]})" if len(lines) >= 2 else ""
