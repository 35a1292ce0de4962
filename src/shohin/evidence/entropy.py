"""The clipping range whose quantized histogram says most of what the histogram says."""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.evidence.histogram import Histogram
from shohin.formats import Format


def entropy_range(histogram: Histogram, format: Format, most: int = 32) -> tuple[float, float]:
    """The clipping range with the least Kullback-Leibler divergence of the quantized histogram from the clipped one: Migacz, "8-bit
    Inference with TensorRT" (GTC 2017), the slides on entropy calibration and their pseudocode.

    For each candidate, P is the histogram inside the range, with what lies outside added to the bin at its own edge. Q is the
    histogram inside the range without what lies outside, merged into the format's levels; the sum of each level is spread evenly
    over those of its bins in which P is not empty. The candidate with the least KL(P || Q) wins, the widest one of equals.

    What the slides leave open, since they treat magnitudes and 128 levels, and where this departs from them:

    - The bins of a level are those whose centres the format's own grid rounds to it (`grid`, zero point included).
    - One-sided values (after a ReLU): the other end stays zero, every bin edge is a candidate.
    - Values on both sides, asymmetric format: both ends move, each on its own; first every n-th bin edge, then, around the best
      pair, ever finer steps down to one bin.
    - Values on both sides, symmetric format: one threshold for both; every bin edge is a candidate.
    - Exact zeros are left out. Every grid holds them exactly; counted, the many zeros of a ReLU would drown the rest.
    - Q is divided by the number of all values, not of those inside, which adds log(all / inside) to the divergence. Where little is
      clipped it is the same; without it a range that clips all values but those of one bin would seem to lose nothing.
    - A candidate spans at least one bin for each level (as in the slides): below, rounding would be invisible. So outliers that
      make the bins wide limit how much can be clipped.
    - A candidate with clipped values in a level that has no others is none: its divergence is infinite.

    The shape of a histogram counts here, not the size of errors: the tails of long-tailed values are clipped far more than by
    `mse_range`, and with few values (thousands) chance decides.

    Args:
        histogram: of the tensor.
        format: integer format.
        most: candidates for each end in the first round if both ends move.

    Returns:
        ``(low, high)`` with ``low <= 0 <= high``; minimum and maximum if no candidate is narrower.

    Raises:
        DataError: if no value was seen.
    """
    histogram.require_data()
    used = histogram.counts.nonzero().reshape(-1) + histogram.first
    if not used.numel():
        return 0.0, 0.0
    below, above = max(-int(used[0]), 0), max(int(used[-1]) + 1, 0)
    counts = torch.zeros(below + above, dtype=torch.float64)
    counts[used + below] = histogram.counts[used - histogram.first].double()
    if format.symmetric or not below or not above:
        ends = torch.arange(max(below, above), 0, -1)
        a, b = _best(counts, below, ends.clamp_max(below), ends.clamp_max(above), format)
    else:
        a, b, step = below, above, -(-max(below, above) // most)
        reach = max(below, above)
        while True:
            pairs = torch.cartesian_prod(_near(a, below, reach, step), _near(b, above, reach, step))
            a, b = _best(counts, below, pairs[:, 0], pairs[:, 1], format)
            if step == 1:
                break
            reach, step = step, max(step // 8, 1)
    # the outermost bins reach beyond the outermost values
    return max(-a * histogram.width, min(histogram.low, 0.0)), min(b * histogram.width, max(histogram.high, 0.0))


def _near(centre: int, widest: int, reach: int, step: int) -> Tensor:
    """Bin edges in steps around one, from 1 to the widest, descending."""
    top = centre + (min(reach, widest - centre) // step) * step
    return torch.arange(top, max(centre - reach, 1) - 1, -step)


def _best(counts: Tensor, below: int, a: Tensor, b: Tensor, format: Format) -> tuple[int, int]:
    """The pair of bins kept below and above zero with the least divergence; the widest one if none is admissible."""
    above = len(counts) - below
    width = 2 * torch.maximum(a, b) if format.symmetric else a + b
    fine = width > format.high - format.low
    a, b = a[fine], b[fine]
    if not len(a):
        return below, above
    found = torch.cat([divergences(counts, below, p, q, format) for p, q in zip(torch.split(a, 1024), torch.split(b, 1024), strict=True)])
    i = int(found.argmin())
    return int(a[i]), int(b[i])


def divergences(counts: Tensor, below: int, a: Tensor, b: Tensor, format: Format) -> Tensor:
    """KL(P || Q) in nats for ranges that keep ``a`` bins below zero and ``b`` bins above, as in `entropy_range`.

    All sums over bins are differences of running sums, so a range costs as much as the format has levels, not bins.

    Args:
        counts: float64 ``[bins]``, of which the first ``below`` lie below zero.
        a, b: int64 ``[n]``; at least as many bins in each range as the format has levels.

    Returns:
        float64 ``[n]``; infinite where P has values in a level in which Q has none. Both P and Q are divided by the sum of P, which
        leaves the sum of ``P (log P - log Q)`` over counts, divided by that sum.
    """
    sums, filled, logs = (torch.cat([t.new_zeros(1), t.cumsum(0)]) for t in (counts, (counts > 0).double(), torch.xlogy(counts, counts)))
    start, stop = below - a, below + b
    under, over = sums[start], sums[-1] - sums[stop]
    first, last = counts[start], counts[stop - 1]
    entropy = logs[stop] - logs[start]
    for plain, clipped in ((first, under), (last, over)):
        entropy = entropy + torch.xlogy(plain + clipped, plain + clipped) - torch.xlogy(plain, plain)
    edges = _level_edges(below, a, b, format)
    inside, end = edges > start.unsqueeze(1), edges == stop.unsqueeze(1)
    q = sums[edges].diff(dim=1)
    p = q + (inside * under.unsqueeze(1) + end * over.unsqueeze(1)).diff(dim=1)
    spread = filled[edges].double()
    spread = spread + inside * ((first == 0) & (under > 0)).unsqueeze(1) + end * ((last == 0) & (over > 0)).unsqueeze(1)
    cross = torch.where(p > 0, p * (q.log() - spread.diff(dim=1).clamp_min(1).log()), torch.zeros_like(p)).sum(1)
    return (entropy - cross) / sums[-1]


def _level_edges(below: int, a: Tensor, b: Tensor, format: Format) -> Tensor:
    """Where the bins of each level begin, and the last one's end: int64 ``[n, levels + 1]``. A bin belongs to the level to which its centre
    is rounded; in whole numbers, so that no rounding error moves a bin.
    """
    if format.symmetric:
        steps, bins, zero = format.high, torch.maximum(a, b), torch.zeros_like(a)
    else:
        steps, bins = format.high - format.low, a + b
        zero = (format.low + (a * steps).double() / bins).round().to(torch.int64)
    codes = torch.arange(format.low, format.high)
    between = (2 * (codes - zero.unsqueeze(1)) + 1) * bins.unsqueeze(1)  # upper end of each code, in bins times twice the steps
    inner = -((steps - between) // (2 * steps)) + below
    start, stop = (below - a).unsqueeze(1), (below + b).unsqueeze(1)
    return torch.cat([start, torch.minimum(torch.maximum(inner, start), stop), stop], 1)
