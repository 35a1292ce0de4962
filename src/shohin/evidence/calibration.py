"""Calibration: what watches the values of an activation, and the methods that choose its range. `METHODS` holds them all.

``minmax``      smallest and largest value of all batches.
``moving``      moving average of each batch's smallest and largest value, ``0.9 * old + 0.1 * batch`` (Jacob et al., 1712.05877, section 3.1).
``percentile``  99.99 % of all values, as many cut at each end; ``percentile 99.9`` for another share.
``entropy``     least divergence of the quantized histogram (Migacz, GTC 2017): `entropy_range`.
``mse``         least squared quantization error: `mse_range`.

Whatever the method, a range holds zero and does not reach beyond the values seen, and memory does not depend on the number of batches:
nothing but two numbers for ``minmax`` and ``moving``, 32 KiB for ``percentile`` and ``mse``, 128 KiB for ``entropy``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shohin.addresses import match
from shohin.errors import DataError, PlanError, closest
from shohin.evidence.entropy import entropy_range
from shohin.evidence.histogram import Extremes, Histogram
from shohin.evidence.ranges import mse_range, percentile_range
from shohin.formats import Format

Observer = Histogram | Extremes
Range = tuple[float, float]
#: one method for all, or patterns of addresses to methods
Ranges = str | Mapping[str, str]


@dataclass(frozen=True)
class Method:
    """A way to choose ranges.

    Args:
        observer: makes what watches one tensor, of the tensor's name.
        choose: of a format, the range of what was watched.
    """

    observer: Callable[[str], Observer]
    choose: Callable[[Observer, Format], Range]


def minmax(observer: Observer, format: Format) -> Range:
    """The observer's extremes."""
    return observer.low, observer.high


def moving(observer: Observer, format: Format) -> Range:
    """The averaged extremes of each batch."""
    if not isinstance(observer, Extremes) or observer.momentum is None:
        raise DataError("the range method 'moving' needs what Extremes(momentum=...) watched: a moving average cannot be had afterwards")
    return observer.low, observer.high


def percentile(observer: Observer, format: Format, share: float = 0.9999) -> Range:
    """The range of a share of all values."""
    return percentile_range(_histogram(observer), share)


def entropy(observer: Observer, format: Format) -> Range:
    """The range whose quantized histogram diverges least."""
    return entropy_range(_histogram(observer), format)


def mse(observer: Observer, format: Format) -> Range:
    """The range with the least squared error."""
    return mse_range(_histogram(observer), format)


def _histogram(observer: Observer) -> Histogram:
    if not isinstance(observer, Histogram):
        raise DataError("this range method needs a Histogram: smallest and largest values say nothing of those between")
    return observer


def _watch(name: str, bins: int = 2048) -> Observer:
    return Histogram(bins, name)


def _average(name: str) -> Observer:
    return Extremes(0.9, name)


#: most values of a batch that a histogram takes
OBSERVED = 2**17

METHODS: Mapping[str, Method] = {
    "mse": Method(_watch, mse),
    "percentile": Method(_watch, percentile),
    # at least the 16 bins for each level that Migacz has, with 256 levels
    "entropy": Method(partial(_watch, bins=8192), entropy),
    "minmax": Method(lambda name: Extremes(None, name), minmax),
    "moving": Method(_average, moving),
}


def range_method(text: str) -> Method:
    """The method of a name; ``percentile`` may be followed by the per cent of the values that the range keeps, ``percentile 99.9``.

    Raises:
        PlanError: for an unknown name, or a percentile that is not between 50 and 100.
    """
    name, _, rest = str(text).strip().partition(" ")
    if name == "percentile" and rest.strip():
        try:
            percent = float(rest.strip().removesuffix("%"))
        except ValueError:
            percent = 0.0
        if not 50 <= percent <= 100:  # "percentile 0.9999" is meant to be a share, and would cut nearly everything
            raise PlanError(f"range method {text!r}: write the per cent of the values to keep, from 50 to 100, such as 'percentile 99.9'")
        return Method(_watch, partial(percentile, share=percent / 100))
    if str(text) not in METHODS:
        raise PlanError(f"unknown range method {text!r}; known: {', '.join(METHODS)}{closest(str(text), METHODS)}")
    return METHODS[text]


def site_methods(ranges: Ranges, addresses: Sequence[str], shared: Mapping[str, str]) -> dict[str, Method]:
    """The method of each site: the one given for all, or that of the last pattern that matches its address; "mse" where none does.

    Args:
        ranges: a method, or patterns of addresses to methods.
        addresses: of the sites.
        shared: address of a tensor that has another one's range -> that one's address.

    Raises:
        PlanError: for an unknown method, a pattern that matches nothing, or one that matches only tensors with another one's range.
    """
    if not isinstance(ranges, Mapping):
        return dict.fromkeys(addresses, range_method(ranges))
    chosen = dict.fromkeys(addresses, METHODS["mse"])
    for pattern, text in ranges.items():
        method = range_method(text)
        found = match(pattern, [*addresses, *shared])
        own = [a for a in found if a in chosen]
        if not own:
            raise PlanError(f"ranges: {found[0]!r} has the range of {shared[found[0]]!r}: write a pattern that matches that one")
        chosen.update(dict.fromkeys(own, method))
    return chosen


def observe(observer: Observer, value: Tensor, most: int = OBSERVED) -> None:
    """Shows a batch's values to an observer: to a histogram the extremes and ``most`` evenly spaced values of a large tensor, else all.

    Raises:
        DataError: if a value is NaN or Inf.
    """
    flat = _flat(value.detach())
    if isinstance(observer, Histogram) and len(flat) > most:
        observer.update(torch.stack(torch.aminmax(flat)))
        flat = flat[:: len(flat) // most | 1]  # an odd stride does not fall in step with even widths
    observer.update(flat)


def _flat(x: Tensor) -> Tensor:
    """All values, without a copy where channels come last in memory: their order does not matter here."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return (x.permute(0, 2, 3, 1) if last else x).reshape(-1)


def chosen_range(observer: Observer, format: Format, method: str | Method) -> Range:
    """The range of a tensor.

    It holds zero, as every grid does, and lies inside the values seen (and zero). If all values are equal, it reaches from zero to that
    value, which is then a code of the grid; if all are zero, it is ``(0, 0)``, for which `grid` has a scale that is not zero.

    Args:
        observer: what the method's observer saw.
        format: integer format.
        method: one of `METHODS`, or as `range_method` reads it.

    Returns:
        ``(low, high)`` with ``low <= 0 <= high``.

    Raises:
        DataError: if no value was seen, or the observer is not one of the method's.
        PlanError: for an unknown method.
    """
    observer.require_data()
    choose = (method if isinstance(method, Method) else range_method(method)).choose
    low, high = choose(observer, format)
    if observer.low == observer.high:
        low, high = observer.low, observer.high
    least, most = min(observer.low, 0.0), max(observer.high, 0.0)
    return min(max(low, least), 0.0), max(min(high, most), 0.0)
