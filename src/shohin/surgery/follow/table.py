"""The table of rewriting rules: operator family -> function."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from shohin.surgery.work import Work

Follow = Callable[[Work, fx.Node, fx.Node], None]
FOLLOW: dict[str, Follow] = {}


def follow(*families: str) -> Callable[[Follow], Follow]:
    """Registers how an operator's integers follow a plan. The function gets (work, original node, its copy) and changes the copy.

    An operator without one keeps its arguments. Raise `CannotRewrite` where the arguments cannot follow.
    """

    def register(function: Follow) -> Follow:
        for name in families:
            FOLLOW[name] = function
        return function

    return register
