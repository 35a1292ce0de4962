"""Arguments of graph nodes as plain values: torch.fx's own union type says nothing that a rule can use."""

from __future__ import annotations

from typing import Any

from torch import fx


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments."""
    return tuple(node.args)


def argument(node: fx.Node, position: int, default: Any = None) -> Any:
    """One positional argument, or ``default`` where the call left it out."""
    return node.args[position] if len(node.args) > position else default


def run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The operator of a node, called."""
    target: Any = node.target
    return target(*args, **kwargs)


def flatten(value: Any) -> list[Any]:
    """Nested tuples and lists as one list, in order."""
    return [x for v in value for x in flatten(v)] if isinstance(value, (tuple, list)) else [value]
