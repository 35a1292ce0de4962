"""The least divergent range against a slow independent calculation, bin by bin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shohin.evidence.entropy import divergences, entropy_range
from shohin.evidence.histogram import Histogram
from shohin.formats import FORMATS, Format


def slow_divergence(values: np.ndarray, width: float, a: int, b: int, form: Format) -> float:
    """KL(P || Q) for the range from ``-a * width`` to ``b * width``, from the values themselves."""
    bins = np.floor(values[values != 0] / width).astype(int)
    steps = form.high if form.symmetric else form.high - form.low
    step = (max(a, b) if form.symmetric else a + b) / steps  # of the grid, in bins
    zero = 0 if form.symmetric else round(form.low + a / step)
    p, q, level = dict[int, int](), dict[int, int](), dict[int, int]()
    for k in bins:
        inside = min(max(int(k), -a), b - 1)
        p[inside] = p.get(inside, 0) + 1
        q[inside] = q.get(inside, 0) + (inside == k)
    for k in p:  # a centre halfway between two codes goes up
        level[k] = min(max(math.floor((k + 0.5) / step + 0.5 + 1e-9) + zero, form.low), form.high)
    found = 0.0
    for k in p:
        mates = [m for m in p if level[m] == level[k]]
        spread = sum(q[m] for m in mates) / len(mates)
        if not spread:
            return math.inf
        found += p[k] / len(bins) * math.log(p[k] / spread)
    return found


def sides(values: np.ndarray, width: float) -> tuple[int, int]:
    return max(-math.floor(values.min() / width), 0), max(math.floor(values.max() / width) + 1, 0)


def seen(values: Tensor, bins: int) -> tuple[Histogram, np.ndarray, int, int]:
    histogram = Histogram(bins)
    histogram.update(values)
    raw = values.double().numpy()
    return histogram, raw, *sides(raw[raw != 0], histogram.width)


def distribution(kind: str, n: int = 600, seed: int = 0) -> Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    y = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1))
    return {
        "normal": x,
        "relu": x.relu(),
        "negative": -x.abs() - 0.01,
        "skew": torch.where(x < 0, x / 3, x),
        "long tail": x / (y + 0.05),
        "positive tail": x.exp(),
        "far": 5 + y,
        "outlier": torch.cat([x, torch.tensor([40.0])]),
        "gaps": torch.where(y < 0.5, y.mul(8).round() / 4, x),
    }[kind]


KINDS = ("normal", "relu", "negative", "skew", "long tail", "positive tail", "far", "outlier", "gaps")


@pytest.mark.parametrize("form", ["uint4", "int4", "uint3", "int3"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_calculation_finds_the_same_range(kind: str, form: str) -> None:
    f = FORMATS[form]
    for seed in (0, 5):
        histogram, raw, below, above = seen(distribution(kind, seed=seed), 48)
        low, high = entropy_range(histogram, f)
        if f.symmetric:
            pairs = [(min(t, below), min(t, above)) for t in range(1, max(below, above) + 1) if 2 * t > f.high - f.low]
        else:
            pairs = [(a, b) for a in range(below and 1, below + 1) for b in range(above and 1, above + 1) if a + b > f.high - f.low]
        found = {pair: slow_divergence(raw, histogram.width, *pair, f) for pair in pairs}
        least = min(found.values())
        best = [p for p, e in found.items() if e <= least + 1e-9]
        w = histogram.width
        expected = [(max(-a * w, min(raw.min(), 0.0)), min(b * w, max(raw.max(), 0.0))) for a, b in best]
        assert (low, high) in expected, (low, high, expected)


@pytest.mark.parametrize("form", ["uint8", "int8", "int7"])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_divergences(kind: str, form: str) -> None:
    f = FORMATS[form]
    histogram, raw, below, above = seen(distribution(kind), 1024)
    index = np.floor(raw[raw != 0] / histogram.width).astype(int) + below
    counts = torch.from_numpy(np.bincount(index, minlength=below + above)).double()
    shares = [(1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.61, 0.77), (0.5, 0.5), (0.31, 0.31)]
    pairs = [(math.ceil(below * s), math.ceil(above * t)) for s, t in shares]
    if f.symmetric:
        pairs = [(min(m, below), min(m, above)) for m in (max(p) for p in pairs)]
    pairs = [p for p in pairs if (2 * max(p) if f.symmetric else sum(p)) > f.high - f.low]
    found = divergences(counts, below, torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs]), f)
    expected = [slow_divergence(raw, histogram.width, a, b, f) for a, b in pairs]
    assert len(pairs) > 1 and found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_both_ends_settle_where_no_neighbour_is_better() -> None:
    f = FORMATS["uint8"]
    for kind in ("normal", "skew", "long tail"):
        histogram, raw, below, above = seen(distribution(kind, 2000), 2048)
        low, high = entropy_range(histogram, f)
        a, b = (round(math.ceil(-low / histogram.width)), round(math.ceil(high / histogram.width)))
        here = slow_divergence(raw, histogram.width, a, b, f)
        assert here <= slow_divergence(raw, histogram.width, below, above, f) + 1e-12
        near = [(a + i, b + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if 0 < a + i <= below and 0 < b + j <= above]
        assert all(here <= slow_divergence(raw, histogram.width, *pair, f) + 1e-12 for pair in near)


def test_exact_zeros_do_not_move_the_range() -> None:
    x = distribution("relu", 5000)
    with_zeros, without = Histogram(), Histogram()
    with_zeros.update(torch.cat([x, torch.zeros(100_000)]))
    without.update(x[x != 0])
    assert entropy_range(with_zeros, FORMATS["uint8"]) == entropy_range(without, FORMATS["uint8"])


def test_outliers_are_clipped_and_mass_is_not() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    for form, most in (("uint4", 8.0), ("int8", 8.0)):
        h = Histogram(8192)
        h.update(torch.cat([x, torch.tensor([60.0])]))
        assert entropy_range(h, FORMATS[form])[1] < most
    h = Histogram(8192)  # a tenth of the values lies far off: clipping them to the rest would leave one bin
    h.update(torch.cat([0.1 + torch.rand(9000) / 1e4, 10 + torch.rand(1000)]))
    assert entropy_range(h, FORMATS["uint4"])[1] > 10


def test_too_few_bins_give_minimum_and_maximum() -> None:
    h = Histogram(64)
    h.update(torch.linspace(-1, 3, 500))
    assert entropy_range(h, FORMATS["uint8"]) == (-1.0, 3.0) == entropy_range(h, FORMATS["int32"])
    h = Histogram()
    h.update(torch.zeros(7))
    assert entropy_range(h, FORMATS["uint8"]) == (0.0, 0.0)
