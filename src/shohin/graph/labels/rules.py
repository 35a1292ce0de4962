"""The table of label rules: operator family -> function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from shohin.graph.labels.context import Context

Rule = Callable[["Context", fx.Node, tuple[Any, ...]], Any]
RULES: dict[str, Rule] = {}


def rule(*families: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operator families ("conv2d", "add").

    A rule gets (context, node, evaluated arguments), where tensors are `Labels` (activations), `Parameter` (the model's own
    and constants) or known integer tensors, and returns the `Labels` of the node's value (a list for several results), or
    NotImplemented: then everything that the operator touches is frozen, by name.
    """

    def register(function: Rule) -> Rule:
        for name in families:
            RULES[name] = function
        return function

    return register
