"""What may be chosen: the counts that a unit group may keep and the regions that may be skipped, with their loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from shohin.errors import PlanError
from shohin.graph.costs import Operator

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GroupOptions:
    """The allowed widths of one unit group.

    Args:
        name: of the group.
        size: number of units it has now.
        counts: allowed kept counts, ascending, the last one equal to ``size``.
        loss: estimated increase of the loss for each count; shape (len(counts),), finite.

    Raises:
        PlanError: if the counts are not ascending, do not end with the size, or the loss does not match them.
    """

    name: str
    size: int
    counts: tuple[int, ...]
    loss: Floats

    def __post_init__(self) -> None:
        counts = tuple(int(c) for c in self.counts)
        loss = np.asarray(self.loss, dtype=np.float64)
        if not counts or counts[0] < 1 or list(counts) != sorted(set(counts)) or counts[-1] != self.size:
            raise PlanError(f"group {self.name!r}: counts must be ascending, positive and end with the size {self.size}; got {counts[:8]}")
        if loss.shape != (len(counts),) or not np.isfinite(loss).all():
            raise PlanError(f"group {self.name!r}: needs one finite loss for each of its {len(counts)} counts; got shape {loss.shape}")
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "loss", loss)

    def index(self, count: int) -> int:
        """Position of a count. Raises PlanError if it is not allowed."""
        try:
            return self.counts.index(count)
        except ValueError:
            raise PlanError(f"group {self.name!r} cannot keep {count} units; allowed: {', '.join(map(str, self.counts))}") from None

    def nearest(self, fraction: float) -> int:
        """The allowed count nearest to ``fraction * size`` (the larger one on a tie)."""
        return min(self.counts, key=lambda c: (abs(c - fraction * self.size), -c))


@dataclass(frozen=True)
class RegionOption:
    """A region that may be skipped.

    Args:
        name: of the region.
        loss: estimated increase of the loss if it is skipped; it includes everything inside.
        private: groups that live entirely inside; skipping the region makes their width cost and lose nothing.
        conflicts: regions that share operations with it; at most one of them is skipped.
    """

    name: str
    loss: float
    private: frozenset[str] = field(default_factory=frozenset)
    conflicts: frozenset[str] = field(default_factory=frozenset)


def aligned_counts(size: int, multiple: int, minimum_fraction: float = 0.15, most: int | None = None) -> tuple[int, ...]:
    """Multiples of ``multiple`` from ``minimum_fraction * size`` up, and the full size.

    A size below the multiple can only stay whole: narrower widths would not fill a vector.

    Args:
        size: number of units, at least 1.
        multiple: vector width of the target (and, for divided axes, their common multiple).
        minimum_fraction: smallest fraction to keep, 0 to 1.
        most: thin out evenly to at most this many counts (at least 2); the smallest and the full size stay.

    Raises:
        PlanError: if an argument is out of range.
    """
    if size < 1 or multiple < 1 or not 0 <= minimum_fraction <= 1 or (most is not None and most < 2):
        raise PlanError(f"no widths for size {size}, multiple {multiple}, minimum {minimum_fraction}, most {most}")
    first = max(1, math.ceil(minimum_fraction * size / multiple - 1e-9)) * multiple
    counts = [*range(first, size, multiple), size]
    if most is not None and len(counts) > most:
        counts = [counts[i] for i in np.unique(np.linspace(0, len(counts) - 1, most).round().astype(int))]
    return tuple(counts)


def place_regions(regions: Iterable[RegionOption], operators: Collection[Operator]) -> list[RegionOption]:
    """The regions with ``private`` and ``conflicts`` read off the operators' own lists of regions and widths."""
    shared: dict[str, set[str]] = {}
    for op in operators:
        for region in op.regions:
            shared.setdefault(region, set()).update(set(op.regions) - {region})
    private = homes(operators)
    known = list(regions)
    names = {r.name for r in known}
    return [
        replace(
            r,
            private=frozenset(g for g, places in private.items() if r.name in places),
            conflicts=frozenset(shared.get(r.name, set()) & names),
        )
        for r in known
    ]


def homes(operators: Collection[Operator]) -> dict[str, frozenset[str]]:
    """Group -> the regions in which it lives entirely: all operations whose costs depend on it are inside."""
    out: dict[str, frozenset[str]] = {}
    for op in operators:
        inside = frozenset(op.regions)
        for group in groups_of(op):
            out[group] = out.get(group, inside) & inside
    return out


def groups_of(operator: Operator) -> set[str]:
    """Names of the groups on which an operator's costs depend."""
    terms = (*operator.macs, *operator.elements, *operator.weights)
    return {group for term in terms for extent in term.extents for group in extent.per_unit}
