"""Ranges of activations, streamed: a histogram that grows with the data, and minimum and maximum of each channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shohin.errors import DataError


class Histogram:
    """A histogram in bounded memory whose range grows: bin edges are multiples of a power of two, and when a value falls
    outside, pairs of bins are merged. Counts are therefore exact, as if all data had been binned at once.

    Exact zeros (a ReLU gives many) are counted apart, since every quantization grid holds zero exactly.

    Args:
        bins: most bins kept; even.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 16 or bins % 2:
            raise DataError(f"a histogram needs an even number of at least 16 bins; got {bins}")
        self.bins = bins
        self.width = 0.0  # a power of two, 0 before the first value other than zero
        self.first = 0  # index of the first bin: bin i covers [(first + i) * width, (first + i + 1) * width)
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.sums = torch.zeros(bins, dtype=torch.float64)
        self.zeros = 0
        self.low, self.high = math.inf, -math.inf

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self.zeros + int(self.counts.sum())

    def update(self, x: Tensor) -> None:
        """Takes all values of a tensor of any shape. Raises DataError if one is NaN or Inf."""
        x = x.detach().reshape(-1)
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError("an activation is NaN or Inf on the calibration data: check the data and the model")
        self.low, self.high = min(self.low, low), max(self.high, high)
        values = x[x != 0].to("cpu", torch.float64)
        self.zeros += x.numel() - values.numel()
        if not values.numel():
            return
        self._cover(low, high)
        index = (values / self.width).floor().to(torch.int64) - self.first
        self.counts += torch.bincount(index, minlength=self.bins)
        self.sums += torch.bincount(index, weights=values, minlength=self.bins)

    def _cover(self, low: float, high: float) -> None:
        if self.width == 0.0:
            extent = max(high - low, abs(low), abs(high), 1e-290)
            self.width = 2.0 ** max(math.ceil(math.log2(extent / (self.bins - 2))), -1000)
            self.first = math.floor(low / self.width)
        start, stop = math.floor(low / self.width), math.floor(high / self.width)
        used = self.counts.nonzero()
        if used.numel():
            start, stop = min(start, self.first + int(used[0])), max(stop, self.first + int(used[-1]))
        while stop - start + 1 > self.bins:
            self._merge()
            start, stop = start // 2, stop // 2
        if start < self.first or stop >= self.first + self.bins:
            self._shift(start - (self.bins - (stop - start + 1)) // 2)

    def _merge(self) -> None:
        first = self.first // 2
        target = (torch.arange(self.bins) + self.first) // 2 - first
        self.counts = torch.zeros_like(self.counts).index_add_(0, target, self.counts)
        self.sums = torch.zeros_like(self.sums).index_add_(0, target, self.sums)
        self.first, self.width = first, self.width * 2

    def _shift(self, first: int) -> None:
        used = self.counts.nonzero().reshape(-1)
        target = used + self.first - first
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        counts[target], sums[target] = self.counts[used], self.sums[used]
        self.counts, self.sums, self.first = counts, sums, first

    def require_data(self) -> None:
        """Raises DataError if no value was seen."""
        if not self.count:
            raise DataError("no calibration data reached this tensor: give Data(train=loader) with batches")

    def points(self) -> tuple[Tensor, Tensor]:
        """Mean value and count of each bin that is not empty, ascending, zeros included: float64 ``[n]``, ``[n]``.

        Raises:
            DataError: if no value was seen.
        """
        self.require_data()
        used = self.counts > 0
        values, counts = self.sums[used] / self.counts[used], self.counts[used].double()
        if self.zeros:
            values = torch.cat([values, values.new_zeros(1)])
            counts = torch.cat([counts, counts.new_tensor([float(self.zeros)])])
        order = values.argsort()
        return values[order], counts[order]


class ChannelRange:
    """Minimum and maximum of each channel, over batches.

    Args:
        axis: the channel axis.
    """

    def __init__(self, axis: int = 1) -> None:
        self.axis = axis
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Takes a tensor with ``x.shape[axis]`` channels. Raises DataError if it holds NaN or Inf."""
        flat = x.detach().movedim(self.axis, 0).flatten(1) if x.dim() > 1 else x.detach().unsqueeze(1)
        low, high = flat.amin(1), flat.amax(1)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise DataError("an activation is NaN or Inf on the calibration data: check the data and the model")
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
