"""Grids for weights: scales and zero points of tensors, channels or groups, with the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shohin.formats import Format, Quantizer
from shohin.formats.scheme import Scheme

#: shares of a group's full range that are tried
SHARES = 40
#: of the shares; below half the range the clipped weights are lost
_SMALLEST = 0.4


def fitted_grid(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantizer:
    """Scales (and zero points) with the least weighted squared error of rounding to the nearest code.

    Ranges are shrunk on a grid of shares of the full one, both ends together (the full range is among them), and each is then
    refitted to its own codes by least squares.

    Args:
        weight: ``[O, I, *kernel]``.
        importance: ``[I * taps]`` or ``[O, I * taps]``: weight of each input's squared error, such as the diagonal of the Hessian;
            None counts all alike.
    """
    parts, factors = in_parts(weight, scheme, importance)
    form = scheme.format
    low, high = parts.amin(-1).clamp_max(0.0), parts.amax(-1).clamp_min(0.0)
    best, zero = _grid(low, high, form)
    error = _error(parts, best, zero, form, factors)
    for share in torch.linspace(_SMALLEST, 1.0, SHARES, dtype=torch.float64).tolist():
        scale, offset = _grid(low * share, high * share, form)
        scale = _refitted(parts, scale, offset, form, factors)
        now = _error(parts, scale, offset, form, factors)
        better = now < error
        best, zero, error = torch.where(better, scale, best), torch.where(better, offset, zero), torch.where(better, now, error)
    best, zero = best.float().double(), zero.to(torch.int64)
    if scheme.granularity == "tensor":
        return Quantizer(form, best.reshape(()), zero.reshape(()))
    if scheme.granularity == "channel":
        return Quantizer(form, best.reshape(-1), zero.reshape(-1), 0)
    return Quantizer(form, best, zero, 0, scheme.group)


def in_parts(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights that share a scale in the last axis, and what their errors weigh: float64 ``[O, groups, size]``; fill weighs nothing."""
    flat = weight.detach().to("cpu", torch.float64).flatten(1)
    factors = torch.ones_like(flat) if importance is None else importance.to("cpu", torch.float64).expand_as(flat)
    if scheme.granularity == "tensor":
        return flat.reshape(1, 1, -1), factors.reshape(1, 1, -1)
    size = scheme.group or flat.shape[1]
    fill = -flat.shape[1] % size
    parts, weights = (torch.unflatten(F.pad(t, (0, fill)), 1, (-1, size)) for t in (flat, factors))
    return parts, weights


def _grid(low: Tensor, high: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    tiny = 2.0**-60
    if form.symmetric:
        return torch.maximum(high / form.high, low / form.low).clamp_min(tiny), torch.zeros_like(low)
    scale = ((high - low) / (form.high - form.low)).clamp_min(tiny)
    return scale, (form.low - low / scale).round().clamp(form.low, form.high)


def _codes(parts: Tensor, scale: Tensor, zero: Tensor, form: Format) -> Tensor:
    """Codes less their zero points."""
    offset = zero.unsqueeze(-1)
    return torch.clamp(torch.round(parts / scale.unsqueeze(-1)) + offset, form.low, form.high) - offset


def _refitted(parts: Tensor, scale: Tensor, zero: Tensor, form: Format, factors: Tensor) -> Tensor:
    """The scale with the least error for the codes that this one gives."""
    codes = _codes(parts, scale, zero, form)
    below = (factors * codes.square()).sum(-1)
    found = (factors * codes * parts).sum(-1) / below.clamp_min(torch.finfo(below.dtype).tiny)
    return torch.where((below > 0) & (found > 0), found, scale)


def _error(parts: Tensor, scale: Tensor, zero: Tensor, form: Format, factors: Tensor) -> Tensor:
    return ((_codes(parts, scale, zero, form) * scale.unsqueeze(-1) - parts).square() * factors).sum(-1)
