"""Arguments of graph nodes as plain values: torch.fx's own union type says nothing that a rule can use."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments."""
    return tuple(node.args)


def argument(node: fx.Node, position: int, default: Any = None) -> Any:
    """One positional argument, or ``default`` where the call left it out."""
    return node.args[position] if len(node.args) > position else default


def callable_of(node: fx.Node) -> Any:
    """What runs for a node: what stays of a tensor may lie in memory as a view would not allow, so views may copy."""
    return torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target


def run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The operator of a node, called."""
    target: Any = callable_of(node)
    return target(*args, **kwargs)


def flatten(value: Any) -> list[Any]:
    """Nested tuples and lists as one list, in order."""
    return [x for v in value for x in flatten(v)] if isinstance(value, (tuple, list)) else [value]
