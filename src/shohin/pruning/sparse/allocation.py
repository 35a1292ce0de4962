"""How many elements of each weight stay within one total. Pure: sizes, scores and measured losses in, counts out.

Every rule keeps exactly ``round(keep * total)`` elements (at least one of each weight), between one and all of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shohin.errors import PlanError
from shohin.pruning.sparse import scores
from shohin.pruning.sparse.patterns import Pattern, keep_largest

Sizes = Mapping[str, int]


def uniform(sizes: Sizes, keep: float) -> dict[str, int]:
    """The same share of each."""
    return _rounded(sizes, {n: keep * size for n, size in sizes.items()}, _total(sizes, keep))


def globally(element_scores: Mapping[str, Tensor], keep: float) -> dict[str, int]:
    """One threshold for the elements of all weights; the largest of each stays in any case.

    Args:
        element_scores: weight name -> one score for each element, comparable between weights.
    """
    sizes = {n: s.numel() for n, s in element_scores.items()}
    total = _total(sizes, keep)
    flat = [s.detach().double().flatten().cpu().clone() for s in element_scores.values()]
    if any(bool(s.isnan().any()) for s in flat):
        raise PlanError("a score of an element is NaN: look for NaN in the weights or the data")
    for s in flat:
        s[s.argmax()] = math.inf
    kept = torch.split(keep_largest(torch.cat(flat), total), [len(s) for s in flat])
    return {n: int(k.sum()) for n, k in zip(sizes, kept, strict=True)}


def lamp(weights: Mapping[str, Tensor], keep: float) -> dict[str, int]:
    """One threshold for LAMP scores (Lee et al., 2021, arXiv 2010.07611)."""
    return globally({n: scores.lamp(w) for n, w in weights.items()}, keep)


def erk(shapes: Mapping[str, Sequence[int]], keep: float) -> dict[str, int]:
    """Erdos-Renyi-Kernel (Evci et al., 2020, arXiv 1911.11134): the density of a weight is proportional to the sum of its sides
    over their product, ``(O + I + k1 + ...) / (O * I * k1 * ...)``; weights that would be denser than whole stay whole.
    """
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    total = _total(sizes, keep)
    sides = {n: float(sum(s)) for n, s in shapes.items()}
    return _rounded(sizes, _filled(sizes, total, lambda scale: {n: scale * side for n, side in sides.items()}), total)


def sensitive(sizes: Sizes, losses: Mapping[str, Sequence[tuple[float, float]]], keep: float) -> dict[str, int]:
    """The least predicted loss from what was measured on single weights.

    The loss of a weight with a share z of zeros is modelled as ``a * (z / (1 - z))**2``: convex, zero for a whole weight and
    without bound for an empty one. Its scale is the geometric mean over the measurements; the sum of all is then minimized exactly
    under the total, all weights paying the same loss for the last element (Lagrange).

    Args:
        sizes: elements of each weight.
        losses: weight name -> (share of zeros in (0, 1), divergence measured with this weight alone sparse); at least one each.

    Raises:
        PlanError: if a weight was not measured, or a measurement is no finite loss of a share in (0, 1).
    """
    missing = sorted(sizes.keys() - losses.keys())
    if missing or any(not losses[n] for n in sizes):
        raise PlanError(f"no loss was measured for {missing[0] if missing else next(n for n in sizes if not losses[n])!r}")
    for name in sizes:
        for share, loss in losses[name]:
            if not (0 < share < 1 and math.isfinite(loss)):
                raise PlanError(f"{name}: a measurement is (share of zeros in (0, 1), finite loss); got {(share, loss)}")
    top = max(loss for n in sizes for _, loss in losses[n])
    floor = max(top * 1e-9, 1e-300)
    scale = {n: _geometric_mean([max(loss, floor) / (z / (1 - z)) ** 2 for z, loss in losses[n]]) for n in sizes}
    total = _total(sizes, keep)

    def kept(price: float) -> dict[str, float]:
        return {n: size * (1 - _share(size / (price * 2 * scale[n]))) for n, size in sizes.items()}

    return _rounded(sizes, _filled(sizes, total, kept), total)


def patterns_of(kept: Mapping[str, int], sizes: Sizes) -> dict[str, Pattern]:
    """Unstructured patterns that keep exactly these counts."""
    return {n: Pattern.unstructured((sizes[n] - count) / sizes[n]) for n, count in kept.items()}


def _total(sizes: Sizes, keep: float) -> int:
    if not sizes or min(sizes.values()) < 1:
        raise PlanError("an allocation needs weights that are not empty")
    if not 0 <= keep <= 1:
        raise PlanError(f"keep is a share in [0, 1]; got {keep!r}")
    return max(round(keep * sum(sizes.values())), len(sizes))


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _share(slope: float) -> float:
    """The z in [0, 1) with ``z / (1 - z)**3 == slope``; the left side grows from 0 without bound."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < slope * (1 - middle) ** 3 else (low, middle)
    return low


def _filled(sizes: Sizes, total: int, kept: Callable[[float], Mapping[str, float]]) -> dict[str, float]:
    """What is kept at the scale at which it fills the total, between one and all of each; kept grows with the scale."""

    def clipped(scale: float) -> dict[str, float]:
        return {n: min(max(k, 1.0), float(sizes[n])) for n, k in kept(scale).items()}

    low, high = -690.0, 690.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(math.exp(middle)).values()) < total else (low, middle)
    return clipped(math.exp(high))


def _rounded(sizes: Sizes, wanted: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole counts nearest to what is wanted that add up to the total, between one and all of each."""
    counts = {n: min(max(math.floor(wanted[n]), 1), size) for n, size in sizes.items()}
    left = total - sum(counts.values())
    step = 1 if left > 0 else -1
    order = sorted(sizes, key=lambda n: step * (counts[n] - wanted[n]))
    while left:
        for name in order:
            if left and 1 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                left -= step
    return counts
