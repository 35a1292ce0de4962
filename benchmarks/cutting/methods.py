"""The methods by name."""

from __future__ import annotations

from functools import partial

from cutting import depgraph, ours, sparse
from cutting.common import Method
from cutting.fastnas import fastnas

OURS, DISTILLED = "shohin", "shohin, distilled"
#: methods that remove channels
CHANNELS: dict[str, Method] = {
    OURS: ours.prune,
    "shohin, any width": partial(ours.prune, align=1),
    "shohin, not compensated": partial(ours.prune, recover=None),
    DISTILLED: ours.distilled,
    "torch-pruning:magnitude": partial(depgraph.one_shot, importance="magnitude"),
    "torch-pruning:taylor": partial(depgraph.one_shot, importance="taylor"),
    "torch-pruning:taylor, widths of 8": partial(depgraph.one_shot, importance="taylor", round_to=8),
    "torch-pruning:taylor, iterative": depgraph.iterative,
    "torch-pruning:isomorphic": partial(depgraph.one_shot, importance="taylor", isomorphic=True),
    "torch-pruning:groupnorm": depgraph.group_norm,
    "modelopt:fastnas": fastnas,
}
#: methods that make weights zero
SPARSE: dict[str, Method] = {
    **{f"shohin:{name}": partial(ours.sparse, criterion=name, granularity="unstructured") for name in ("sparsegpt", "wanda", "magnitude")},
    "torch:l1_unstructured": partial(sparse.magnitude, everywhere=False),
    "torch:global_l1": partial(sparse.magnitude, everywhere=True),
}
PATTERN: dict[str, Method] = {
    f"shohin:{name}": partial(ours.sparse, criterion=name, granularity="2:4") for name in ("sparsegpt", "wanda", "magnitude")
}
#: budget -> the share that may be left, and its methods
BUDGETS: dict[str, tuple[float, dict[str, Method]]] = {
    "0.5": (0.5, CHANNELS),
    "0.3": (0.3, CHANNELS),
    "0.25": (0.25, CHANNELS),
    "sparse 0.5": (0.5, SPARSE),
    "2:4": (0.5, PATTERN),
}


def is_ours(method: str) -> bool:
    """Not of a peer."""
    return method.startswith("shohin")
