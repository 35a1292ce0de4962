"""Static costs of an operation as polynomials of the widths that are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Extent:
    """A size that depends on widths: ``fixed + sum(per_unit[g] * kept[g])``.

    A plain channel axis of group g has fixed 0 and per_unit {g: 1}; a concatenation of two streams has both groups;
    an axis that never changes has only ``fixed``.
    """

    fixed: int
    per_unit: Mapping[str, int]

    def at(self, kept: Mapping[str, int]) -> int:
        """The size when ``kept[g]`` units of each group stay."""
        return self.fixed + sum(n * kept[g] for g, n in self.per_unit.items())


@dataclass(frozen=True)
class Term:
    """``coefficient * product of extents``."""

    coefficient: float
    extents: tuple[Extent, ...]

    def at(self, kept: Mapping[str, int]) -> float:
        """The value when ``kept[g]`` units of each group stay."""
        value = self.coefficient
        for extent in self.extents:
            value *= extent.at(kept)
        return value


@dataclass(frozen=True)
class Operator:
    """One operation that costs time, at batch 1.

    Args:
        address: of the operation.
        kind: class for latency regression ("conv1x1", "conv3x3", "depthwise3x3", "linear", "matmul", "add", "norm"...).
        macs: multiply-accumulates (0 terms for pointwise operations).
        elements: elements read and written, activations only.
        weights: parameter elements.
        region: names of the skippable regions that contain it; skipped regions cost nothing.
        module: path of the module that runs it.
    """

    address: str
    kind: str
    macs: tuple[Term, ...]
    elements: tuple[Term, ...]
    weights: tuple[Term, ...]
    regions: tuple[str, ...]
    module: str

    def amounts(self, kept: Mapping[str, int]) -> tuple[float, float, float]:
        """(MACs, elements, weight elements) at these widths."""
        return sum(t.at(kept) for t in self.macs), sum(t.at(kept) for t in self.elements), sum(t.at(kept) for t in self.weights)

    def moved(self, kept: Mapping[str, int], batch: int = 1, element: float = 4.0, weight: float | None = None) -> float:
        """Bytes read and written: activations of ``batch`` samples, and each weight once.

        Args:
            element: bytes of an activation element.
            weight: bytes of a weight element; default as for activations.
        """
        _, elements, weights = self.amounts(kept)
        return batch * elements * element + weights * (element if weight is None else weight)

    def intensity(self, kept: Mapping[str, int], batch: int = 1, element: float = 4.0, weight: float | None = None) -> float:
        """Arithmetic intensity: MACs per byte moved (Williams et al. 2009, the roofline model). Below the ratio of a machine's
        arithmetic to its memory bandwidth, memory decides the time. 0 where nothing is moved.
        """
        moved = self.moved(kept, batch, element, weight)
        return batch * self.amounts(kept)[0] / moved if moved else 0.0


@dataclass(frozen=True)
class Edge:
    """A tensor that goes from one operation to another; it costs a conversion where the precisions differ.

    Args:
        source, target: addresses; "" is the outside of the model, which is float32.
        elements: its size.
    """

    source: str
    target: str
    elements: tuple[Term, ...]
