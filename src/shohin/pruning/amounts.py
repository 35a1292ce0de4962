"""Shares, counts and graphs, checked before any work."""

from __future__ import annotations

import math
from numbers import Integral, Real

from torch import nn

from shohin.errors import ModelError, PlanError
from shohin.graph import Graph


def check_share(keep: object) -> None:
    """Raises PlanError for what is no share in (0, 1]."""
    share = float(keep) if isinstance(keep, Real) and not isinstance(keep, bool) else math.nan
    if not 0 < share <= 1:
        hint = f": for {share:g} % write keep={share / 100:g}" if 1 < share <= 100 else ""
        raise PlanError(f"keep must be a share in (0, 1]; got {keep!r}{hint}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises PlanError for what is no whole number, at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) < 2**63:
        raise PlanError(f"{name} must be a whole number, at least {least}; got {value!r}")


def check_amounts(of: str, align: int, keep: object = None) -> None:
    """Raises PlanError for a share, a quantity or a multiple that cannot be; a function in place of a share is not looked at."""
    if of not in ("macs", "params"):
        raise PlanError(f"of={of!r} is not known; one of 'macs', 'params'")
    check_count("align", align)
    if keep is not None and not callable(keep):
        check_share(keep)


def check_graph(model: nn.Module, graph: Graph) -> None:
    """Raises ModelError if a graph was made from another model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(graph.program.trainable):
        if name not in parameters or parameters[name].shape != graph.program.tensors[name].shape:
            raise ModelError(
                f"the graph was made from another model: it has a parameter {name!r} {tuple(graph.program.tensors[name].shape)} that this "
                "one has not; use shohin.understand(model, x)"
            )
