"""What every schedule of units checks before it trains."""

from __future__ import annotations

from numbers import Integral, Real

from torch import nn

from shohin.errors import ModelError, PlanError
from shohin.graph import Graph


def check_amounts(of: str, align: int, keep: object = None) -> None:
    """Raises PlanError for a share, a quantity or a multiple that cannot be; a function in place of a share is not looked at."""
    if of not in ("macs", "params"):
        raise PlanError(f"of={of!r} is not known; one of 'macs', 'params'")
    if not isinstance(align, Integral) or isinstance(align, bool) or align < 1:
        raise PlanError(f"align must be a whole number, at least 1; got {align!r}")
    if keep is not None and not callable(keep):
        share = float(keep) if isinstance(keep, Real) and not isinstance(keep, bool) else 0.0
        if not 0 < share <= 1:
            raise PlanError(f"keep must be a share in (0, 1]; got {keep!r}")


def check_graph(model: nn.Module, graph: Graph) -> None:
    """Raises ModelError if a graph was made from another model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(graph.program.trainable):
        if name not in parameters or parameters[name].shape != graph.program.tensors[name].shape:
            raise ModelError(
                f"the graph was made from another model: it has a parameter {name!r} {tuple(graph.program.tensors[name].shape)} that this "
                "one has not; use shohin.understand(model, x)"
            )
