"""Clipping ranges chosen from a histogram, and the integer grid that a range gives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shohin.errors import DataError
from shohin.evidence.histogram import Histogram
from shohin.formats import Format

#: least scale: the smallest float32 number with full precision, since files hold scales as float32
LEAST_SCALE = 2.0**-126


def grid(low: float, high: float, format: Format) -> tuple[float, int]:
    """Scale and zero point with which ``format`` covers ``[low, high]`` and zero.

    Symmetric formats use ``max(|low|, |high|)`` and zero point 0. A range of no extent gives a scale of ``2**-20``, so that
    zero stays exact; no scale is below `LEAST_SCALE`. The ends of a one-sided range are codes, so a tensor that holds nothing but
    zero and one constant is held exactly, to the rounding of the scale.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        return 2.0**-20, 0 if format.symmetric else format.low
    if format.symmetric:
        return max(max(-low, high) / format.high, LEAST_SCALE), 0
    scale = max((high - low) / (format.high - format.low), LEAST_SCALE)
    return scale, int(min(max(round(format.low - low / scale), format.low), format.high))


def quantization_error(histogram: Histogram, low: float, high: float, format: Format) -> float:
    """Mean squared error of quantizing the histogram's values with `grid`. Raises DataError if no value was seen."""
    histogram.require_data()
    ends = torch.tensor([[min(low, 0.0)], [max(high, 0.0)]], dtype=torch.float64)
    return float(_errors(histogram, ends[0], ends[1], format)[0])


def mse_range(histogram: Histogram, format: Format, steps: int = 64) -> tuple[float, float]:
    """The clipping range with the least mean squared quantization error.

    Both ends are shrunk (together for a symmetric format) on a grid of shares of the full range, then refined around the best.
    The full range is among the candidates, so the result is never worse than minimum-maximum.

    Args:
        histogram: of the tensor.
        format: integer format.
        steps: candidates for each end in each of three rounds; a third of them if both ends move.

    Returns:
        ``(low, high)`` with ``low <= 0 <= high``.
    """
    histogram.require_data()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if format.symmetric:
        high = max(-low, high)
        low = -high
    if high == low:
        return low, high
    if low < 0 < high and not format.symmetric:
        steps = max(steps // 3, 8)
    best_low, best_high, span, centre = 1.0, 1.0, 0.98, 0.51
    centre_low = centre
    for _ in range(3):
        shares_high = _shares(centre, span, steps) if high > 0 else torch.ones(1, dtype=torch.float64)
        if format.symmetric:
            pairs = torch.stack([shares_high, shares_high], 1)
        else:
            shares_low = _shares(centre_low, span, steps) if low < 0 else torch.ones(1, dtype=torch.float64)
            pairs = torch.cartesian_prod(shares_low, shares_high).reshape(-1, 2)
        pairs = torch.cat([pairs.new_tensor([[best_low, best_high], [1.0, 1.0]]), pairs])
        errors = _errors(histogram, pairs[:, 0] * low, pairs[:, 1] * high, format)
        best_low, best_high = (float(v) for v in pairs[int(errors.argmin())])
        centre_low, centre, span = best_low, best_high, span * 4 / steps
    return best_low * low, best_high * high


def percentile_range(histogram: Histogram, share: float = 0.9999) -> tuple[float, float]:
    """The range that holds a share of all values, cutting the same number from both ends; each end is a value that was seen.

    Args:
        histogram: of the tensor.
        share: in (0, 1]; 1, or so few values that none is cut, gives minimum and maximum.

    Returns:
        ``(low, high)``; exact to a bin's width.

    Raises:
        DataError: if no value was seen or the share is out of range.
    """
    if not 0 < share <= 1:
        raise DataError(f"share must be in (0, 1]; got {share}")
    values, counts = histogram.points()
    total = int(counts.sum())
    cut = min(math.floor(total * (1 - share) / 2 + 1e-6), (total - 1) // 2)  # 1 - share is not exact, and one value stays
    if not cut:
        return histogram.low, histogram.high
    cumulative = counts.cumsum(0)
    low = float(values[int(torch.searchsorted(cumulative, cut, right=True))])
    high = float(values[int(torch.searchsorted(cumulative, total - cut))])
    return max(low, histogram.low), min(high, histogram.high)


def _shares(centre: float, span: float, steps: int) -> Tensor:
    low, high = max(centre - span / 2, 0.005), min(centre + span / 2, 1.0)
    return torch.linspace(low, high, steps, dtype=torch.float64)


def _errors(histogram: Histogram, low: Tensor, high: Tensor, format: Format, block: int = 512) -> Tensor:
    """Mean squared error ``[n]`` of each of n ranges; the same arithmetic as `grid`, for many ranges at once.

    Values are taken as uniform inside a bin and the error is integrated: with one point for each bin, steps that are a
    multiple of the bin width would look better than they are, and the search would find just those.
    """
    used = histogram.counts.nonzero().reshape(-1)
    if not used.numel():
        return torch.zeros_like(low)
    first, last = int(used[0]), int(used[-1])
    edges = (torch.arange(first, last + 2, dtype=torch.float64) + histogram.first) * histogram.width
    weights = histogram.counts[first : last + 1].double() / (histogram.width * histogram.count)
    out = []
    for lo, hi in zip(torch.split(low, block), torch.split(high, block), strict=True):
        if format.symmetric:
            scale = (torch.maximum(-lo, hi) / format.high).clamp_min(LEAST_SCALE)
            zero = torch.zeros_like(scale)
        else:
            scale = ((hi - lo) / (format.high - format.low)).clamp_min(LEAST_SCALE)
            zero = (format.low - lo / scale).round().clamp(format.low, format.high)
        codes = edges / scale.unsqueeze(1)
        bottom, top = (format.low - zero).unsqueeze(1), (format.high - zero).unsqueeze(1)
        inside = torch.minimum(torch.maximum(codes, bottom), top)
        nearest = inside.round()
        integral = nearest / 12 + ((inside - nearest) ** 3 + (codes - inside) ** 3) / 3  # of the squared error, in units of the scale
        out.append((integral.diff(dim=1) @ weights) * scale**3)
    return torch.cat(out)
