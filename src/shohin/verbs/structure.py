"""What can be chosen in a model, and the model through a plan."""

from __future__ import annotations

from typing import Any

from torch import nn

from shohin.errors import CaptureError, ModelError, PlanError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.surgery import Parts, understand_parts
from shohin.surgery import understand as _understand
from shohin.verbs.common import GRAPHS, as_call


def understand(model: nn.Module, example: Any) -> Graph | Parts:
    """What can be chosen in a model: ``.groups``, ``.regions``, ``.sites``, ``.costs``, ``.frozen``.

    A model that cannot be captured as a whole (a branch or a size that depends on values) gives `Parts`: the groups and
    regions of the largest sub-modules that can, and in ``.frozen`` what refused, and why. `cut` takes plans for either.

    Args:
        example: arguments of one call: a tensor, a tuple, or a `shohin.Data`. Dimension 0 is the batch.

    Raises:
        ModelError: if the model does not run on the example or cannot be captured.
    """
    call = as_call(example)
    try:
        graph: Graph | Parts = _understand(model, call)
    except CaptureError:
        graph = understand_parts(model, call)
        if not graph.groups and not graph.regions:
            raise
    GRAPHS[model] = graph
    return graph


def _graph(model: nn.Module, example: Any) -> Graph | Parts:
    if example is not None:
        return understand(model, example)
    if model not in GRAPHS:
        raise ModelError("this model has not been understood yet: give example=(x,), or call shohin.understand(model, (x,)) first")
    return GRAPHS[model]


def cut(model: nn.Module, plan: Plan, example: Any = None) -> nn.Module:
    """A physically smaller copy: the user's own class where it could be repaired and proved, else the program as a module.

    Args:
        plan: its widths and skips are applied; formats are for `quantize` and `export`.
        example: arguments of one call; not needed after `understand`.

    Raises:
        PlanError: if the plan is for another model. ModelError: if there is no example, if the model has changed since it was
            understood, or if what comes out cannot be proved to be what the plan means.
    """
    from shohin.surgery import cut as cut_
    from shohin.surgery import cut_parts

    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a shohin.Plan, not {type(plan).__name__}: Plan(graph.program.fingerprint, {{group: kept units}})")
    graph = _graph(model, example)
    made = cut_parts(model, graph, graph.split(plan)) if isinstance(graph, Parts) else cut_(model, graph, plan)
    if not made.proof.holds:
        raise ModelError(
            f"the cut could not be proved ({made.proof.where}, relative error {made.proof.error:.1e}): keep more units of groups that a "
            "normalization or a standard deviation sees, and give an example with usual values"
        )
    return made.model


def view(model: nn.Module, plan: Plan, example: Any = None) -> nn.Module:
    """The model seen through a plan, as a program with sliced tensors. Arguments and errors as for `cut`."""
    from shohin.surgery import view as view_

    graph = _graph(model, example)
    if isinstance(graph, Parts):
        raise ModelError("a model that is captured by its sub-modules has no program of its own to view: use shohin.cut(model, plan)")
    return view_(graph, plan)
