"""Ranges of activations, streamed: a histogram that grows with the data, extremes of all values, and extremes of each channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shohin.errors import DataError


class Histogram:
    """A histogram in bounded memory whose range grows: bin edges are multiples of a power of two, and when a value falls
    outside, neighbouring bins are merged. Counts are therefore exact, as if all data had been binned at once: width, first bin
    and counts depend on the values alone, not on how they came in batches. The bins reach to zero, as every grid does.

    Exact zeros (a ReLU gives many) are counted apart, since every quantization grid holds zero exactly.

    Memory: ``16 * bins`` bytes (32 KiB with 2048 bins) and a few numbers, for any number of batches.

    Args:
        bins: most bins kept; even.
        name: of the tensor, for errors.
    """

    def __init__(self, bins: int = 2048, name: str = "") -> None:
        if bins < 16 or bins % 2:
            raise DataError(f"a histogram needs an even number of at least 16 bins; got {bins}")
        self.bins, self.name = bins, name
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
        low, high = _extremes(x, self.name)
        self.low, self.high = min(self.low, low), max(self.high, high)
        values = x[x != 0].cpu()
        self.zeros += x.numel() - values.numel()
        if not values.numel():
            return
        self._cover()
        exact = values if values.dtype == torch.float32 and 2.0**-100 < self.width < 2.0**100 else values.double()  # powers of two
        index = (exact / self.width).floor().to(torch.int64) - self.first
        self.counts += torch.bincount(index, minlength=self.bins)
        self.sums += torch.bincount(index, weights=values.double(), minlength=self.bins)

    def _cover(self) -> None:
        """Takes the least power of two at which the bins cover zero and all values seen, and moves the counts to those bins."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        width = 2.0 ** max(math.frexp((high - low) / self.bins)[1] - 1, -1000)
        while math.floor(high / width) - math.floor(low / width) >= self.bins:
            width *= 2
        first = math.floor(low / width)
        if self.width and (width, first) != (self.width, self.first):
            merged = int(min(width / self.width, 2.0**40))  # indices are far below 2**40, so more changes nothing
            used = self.counts.nonzero().reshape(-1)
            target = (used + self.first) // merged - first
            self.counts = torch.zeros_like(self.counts).index_add_(0, target, self.counts[used])
            self.sums = torch.zeros_like(self.sums).index_add_(0, target, self.sums[used])
        self.width, self.first = width, first

    def require_data(self) -> None:
        """Raises DataError if no value was seen."""
        _require(self.low <= self.high, self.name)

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


class Extremes:
    """The smallest and largest value over all batches, or a moving average of each batch's smallest and largest value.

    Memory: two numbers, for any number of batches.

    Args:
        momentum: None for all batches; m in [0, 1) for ``m * old + (1 - m) * batch``, from the first batch's extremes on.
        name: of the tensor, for errors.
    """

    def __init__(self, momentum: float | None = None, name: str = "") -> None:
        if momentum is not None and not 0 <= momentum < 1:
            raise DataError(f"the momentum of a moving average must be in [0, 1); got {momentum}")
        self.momentum, self.name = momentum, name
        self.low, self.high = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        """Takes all values of a tensor of any shape as one batch. Raises DataError if one is NaN or Inf."""
        if not x.numel():
            return
        low, high = _extremes(x.detach(), self.name)
        if self.momentum is None or self.low > self.high:
            self.low, self.high = min(self.low, low), max(self.high, high)
        else:  # written so that equal batches leave exactly their extremes
            self.low += (1 - self.momentum) * (low - self.low)
            self.high += (1 - self.momentum) * (high - self.high)

    def require_data(self) -> None:
        """Raises DataError if no value was seen."""
        _require(self.low <= self.high, self.name)


class ChannelRange:
    """Minimum and maximum of each channel, over batches.

    Args:
        axis: the channel axis.
        name: of the tensor, for errors.
    """

    def __init__(self, axis: int = 1, name: str = "") -> None:
        self.axis, self.name = axis, name
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Takes a tensor with ``x.shape[axis]`` channels. Raises DataError if it holds NaN or Inf."""
        flat = x.detach().movedim(self.axis, 0).flatten(1) if x.dim() > 1 else x.detach().unsqueeze(1)
        low, high = flat.amin(1), flat.amax(1)
        _require_finite(bool((torch.isfinite(low) & torch.isfinite(high)).all()), self.name)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def _extremes(x: Tensor, name: str) -> tuple[float, float]:
    low, high = (float(v) for v in torch.aminmax(x))
    _require_finite(math.isfinite(low) and math.isfinite(high), name)
    return low, high


def _require_finite(finite: bool, name: str) -> None:
    if not finite:
        raise DataError(
            f"an activation is NaN or Inf on the calibration data{f' at {name!r}' if name else ''}: check the data and the model"
        )


def _require(data: bool, name: str) -> None:
    if not data:
        raise DataError(f"no calibration data reached {repr(name) if name else 'this tensor'}: give Data(train=loader) with batches")
