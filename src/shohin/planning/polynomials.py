"""Evaluation of many cost polynomials at many widths at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shohin.errors import PlanError
from shohin.graph.costs import Extent, Term

Floats = npt.NDArray[np.float64]


class Polynomials:
    """Compiled sums of terms.

    Args:
        sums: one tuple of terms for each polynomial.
        groups: order of the groups in the columns of the widths.

    Raises:
        PlanError: if a term depends on a group that is not listed.
    """

    def __init__(self, sums: Sequence[tuple[Term, ...]], groups: Sequence[str]) -> None:
        import scipy.sparse  # here, because importing it is slow

        column = {g: i for i, g in enumerate(groups)}
        # Equal extents are evaluated once; number 0 is the constant one, which pads products of different lengths.
        rows: dict[tuple[int, tuple[tuple[str, int], ...]], int] = {(1, ()): 0}
        products: list[list[int]] = []
        coefficients: list[float] = []
        owners: list[int] = []

        def row(extent: Extent) -> int:
            for group in extent.per_unit:
                if group not in column:
                    raise PlanError(f"a cost depends on the unit group {group!r}, for which no widths are given; give it its full size")
            return rows.setdefault((extent.fixed, tuple(sorted(extent.per_unit.items()))), len(rows))

        for owner, terms in enumerate(sums):
            for term in terms:
                products.append([row(e) for e in term.extents])
                coefficients.append(term.coefficient)
                owners.append(owner)
        self.fixed = np.array([fixed for fixed, _ in rows], dtype=np.float64)
        self.slopes = np.zeros((len(column), len(rows)))
        for (_, per_unit), i in rows.items():
            for group, n in per_unit:
                self.slopes[column[group], i] = n
        depth = max((len(p) for p in products), default=0)
        self.factors = np.array([p + [0] * (depth - len(p)) for p in products], dtype=np.int64).reshape(len(products), depth)
        # A sparse (polynomials x terms) matrix sums the terms of each polynomial.
        self.sums = scipy.sparse.csr_matrix((coefficients, (owners, range(len(owners)))), shape=(len(sums), len(owners)))

    def at(self, kept: npt.ArrayLike) -> Floats:
        """Values; ``kept`` is (batch, groups), the result (batch, polynomials)."""
        widths = np.asarray(kept, dtype=np.float64)
        extents = (widths @ self.slopes + self.fixed).T
        values = np.ones((len(self.factors), len(widths)))
        for position in self.factors.T:
            values *= extents[position]
        return np.asarray((self.sums @ values).T, dtype=np.float64)
