"""Features for latency regression: MACs and elements by class of operation and precision."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from shohin.errors import PlanError
from shohin.graph.costs import Edge, Operator
from shohin.planning.choice import Choice
from shohin.planning.options import groups_of
from shohin.planning.polynomials import Polynomials

Floats = npt.NDArray[np.float64]
PRECISIONS = ("float32", "int8")
MACS_SCALE, ELEMENTS_SCALE = 1e5, 1e4


class Features:
    """Maps a choice to the feature vector of the latency regression.

    For every class ``kind/precision`` that can occur: MACs / 1e5, elements / 1e4 and the share of operations that are alive
    (``fixed/precision``: the cost of starting an operation, which skipping a region saves; it sums to 1 if nothing is
    skipped, so it is the regression's intercept). With edges also ``boundary``: elements / 1e4 of the tensors that change
    precision.

    Args:
        operators: all operations that cost time; addresses are distinct.
        edges: tensors between them, for mixed precision.
    """

    def __init__(self, operators: Sequence[Operator], edges: Sequence[Edge] = ()) -> None:
        if not operators:
            raise PlanError("there are no operations whose latency could be predicted; the graph has no costs")
        self.operators, self.edges = tuple(operators), tuple(edges)
        self.position = {op.address: i for i, op in enumerate(self.operators)}
        if len(self.position) != len(self.operators):
            raise PlanError("two operations have the same address; costs need distinct addresses")
        for address in sorted({a for e in edges for a in (e.source, e.target)} - {"", *self.position}):
            raise PlanError(f"an edge names the operation {address!r}, which has no costs")
        self.groups = tuple(sorted({g for op in operators for g in groups_of(op)} | _edge_groups(edges)))
        self.regions = tuple(sorted({r for op in operators for r in op.regions}))
        self.kinds = tuple(sorted({op.kind for op in operators}))
        self.names = (
            *(f"fixed/{p}" for p in PRECISIONS),
            *(f"{kind}/{p}:{what}" for kind in self.kinds for p in PRECISIONS for what in ("macs", "elements")),
            *(("boundary",) if edges else ()),
        )
        ops = self.operators
        sums = [*(op.macs for op in ops), *(op.elements for op in ops), *(op.weights for op in ops), *(e.elements for e in self.edges)]
        self._polynomials = Polynomials(sums, self.groups)
        self._inside = np.array([[r in op.regions for op in ops] for r in self.regions], dtype=bool).reshape(len(self.regions), len(ops))
        self._kind = np.array([self.kinds.index(op.kind) for op in ops])

    def rows(self, choices: Sequence[Choice]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """(widths of shape (batch, groups), skipped of shape (batch, regions)). Raises PlanError if a group has no width."""
        for choice in choices:
            for group in self.groups:
                if group not in choice.kept:
                    raise PlanError(f"the choice says nothing of the unit group {group!r}; give it its full size")
        kept = np.array([[c.kept[g] for g in self.groups] for c in choices], dtype=np.int64).reshape(len(choices), len(self.groups))
        skipped = np.array([[r in c.skipped for r in self.regions] for c in choices], dtype=bool).reshape(len(choices), len(self.regions))
        return kept, skipped

    def amounts(self, kept: npt.ArrayLike, skipped: npt.NDArray[np.bool_]) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """(MACs, elements, weights, alive) of shape (batch, operators) and edge elements (batch, edges); zero if skipped."""
        n = len(self.operators)
        values = self._polynomials.at(kept)
        alive = 1.0 - (skipped @ self._inside).astype(np.float64)
        macs, elements, weights = (values[:, i * n : (i + 1) * n] * alive for i in range(3))
        edges = values[:, 3 * n :].copy()
        for i, edge in enumerate(self.edges):
            for end in (edge.source, edge.target):
                if end:
                    edges[:, i] *= alive[:, self.position[end]]
        return macs, elements, weights, alive, edges

    def is_int8(self, int8: Collection[str]) -> npt.NDArray[np.bool_]:
        """Which operators run in int8; addresses without costs are no error (a reshape has a format but costs nothing)."""
        return np.array([op.address in int8 for op in self.operators], dtype=bool)

    def crossing(self, int8: Collection[str]) -> npt.NDArray[np.bool_]:
        """Which edges change precision."""
        return np.array([(e.source in int8) != (e.target in int8) for e in self.edges], dtype=bool)

    def columns(self, int8: Collection[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each operator the columns of its fixed share and of its MACs; its elements follow in the next column."""
        precision = self.is_int8(int8).astype(np.int64)
        return precision, 2 + (self._kind * len(PRECISIONS) + precision) * 2

    def table(self, kept: npt.ArrayLike, skipped: npt.NDArray[np.bool_], int8: Collection[str]) -> Floats:
        """Features of many widths in one assignment of precisions; shape (batch, len(names))."""
        macs, elements, _, alive, edges = self.amounts(kept, skipped)
        fixed, first = self.columns(int8)
        out = np.zeros((len(self.names), len(macs)))
        np.add.at(out, fixed, alive.T / len(self.operators))
        np.add.at(out, first, macs.T / MACS_SCALE)
        np.add.at(out, first + 1, elements.T / ELEMENTS_SCALE)
        if self.edges:
            out[-1] = edges @ self.crossing(int8) / ELEMENTS_SCALE
        return out.T

    def matrix(self, choices: Sequence[Choice]) -> Floats:
        """Features of several choices; shape (len(choices), len(names))."""
        return np.concatenate([np.zeros((0, len(self.names))), *(self.table(*self.rows([c]), c.int8) for c in choices)])


def _edge_groups(edges: Sequence[Edge]) -> set[str]:
    return {group for edge in edges for term in edge.elements for extent in term.extents for group in extent.per_unit}
