"""One pattern for all weights, its zeros shared out among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

from shohin.data import Call
from shohin.errors import DataError
from shohin.evidence import Divergence
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.pruning.sparse import allocation, scores
from shohin.pruning.sparse.patterns import Pattern
from shohin.pruning.sparse.sequential import sparsify
from shohin.surgery import view

ALLOCATIONS = ("uniform", "global", "lamp", "erk", "sensitivity")
#: shares of zeros at which each weight alone is looked at, as powers of the share that stays
LOOKS = (1.0, 2.0)


def allocated(
    graph: Graph, calls: Sequence[Call], patterns: Mapping[str, Pattern], how: str = "uniform", *, seed: int = 0
) -> dict[str, Pattern]:
    """The patterns with shares of zeros that together leave what they would leave alike.

    Args:
        calls: for "sensitivity": each weight alone is made sparse twice, and the answers are compared.
        patterns: of one kind and share, by weight.
        how: one of `ALLOCATIONS`. "global" compares magnitudes, "lamp" magnitudes within what is left of their layer, "erk" looks at
            shapes alone.

    Raises:
        DataError: if "sensitivity" has no batches.
    """
    if how == "uniform" or not patterns:
        return dict(patterns)
    tensors = {n: graph.program.tensors[n].detach() for n in patterns}
    sizes = {n: t.numel() for n, t in tensors.items()}
    keep = 1 - next(iter(patterns.values())).zeros
    if how == "global":
        kept = allocation.globally({n: scores.magnitude(t) for n, t in tensors.items()}, keep)
    elif how == "lamp":
        kept = allocation.lamp(tensors, keep)
    elif how == "erk":
        kept = allocation.erk({n: tuple(t.shape) for n, t in tensors.items()}, keep)
    else:
        kept = allocation.sensitive(sizes, _losses(graph, calls, patterns, seed), keep)
    return {n: replace(p, zeros=max(0.0, 1 - kept[n] / sizes[n])) for n, p in patterns.items()}


def _losses(graph: Graph, calls: Sequence[Call], patterns: Mapping[str, Pattern], seed: int) -> dict[str, list[tuple[float, float]]]:
    """Weight -> (share of zeros, divergence of the answers) when it alone is sparse."""
    if not calls:
        raise DataError("allocation='sensitivity' needs batches: give Data(train=loader)")
    whole = deepcopy(view(graph, Plan(graph.program.fingerprint)))  # a view without cuts holds the model's own weights
    divergence = Divergence(whole, calls)
    own = dict(whole.named_parameters(remove_duplicate=False))
    found: dict[str, list[tuple[float, float]]] = {}
    for name, pattern in patterns.items():
        before = own[name].detach().clone()
        for power in LOOKS:
            zeros = 1 - (1 - pattern.zeros) ** power
            values = sparsify(graph, calls, {name: replace(pattern, zeros=zeros)}, criterion="magnitude", update=False, seed=seed)
            own[name].data.copy_(values[name])
            found.setdefault(name, []).append((zeros, divergence(whole)))
        own[name].data.copy_(before)
    return found
