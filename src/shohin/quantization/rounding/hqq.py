"""Half-quadratic quantization: grids without data that bear outliers (HQQ, Badri & Shaji, 2023, "Half-Quadratic Quantization")."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shohin.formats import Format, Quantizer
from shohin.formats.scheme import Scheme
from shohin.quantization.grids import fitted_grid, in_parts

#: the norm of the error, its weight in the first step and that weight's growth, and the number of steps
P, BETA, GROWTH, STEPS = 0.7, 10.0, 1.01, 20


def hqq(weight: Tensor, scheme: Scheme) -> Quantizer:
    """Scales and zero points with a small ``|error|_0.7``, by groups: the best of `fitted_grid` and of the zero points that the iteration
    gives for the scales of the full range. A symmetric format has no zero points to move, and keeps `fitted_grid`.

    The error is split into a sparse part (by the generalized soft threshold of the norm) and a quadratic part that gives the zero
    point as a mean. Zero points are whole numbers here, as runtimes hold them.
    """
    start = fitted_grid(weight, scheme)
    if scheme.format.symmetric:
        return start
    form = scheme.format
    parts = in_parts(weight, scheme)[0]
    shape = (*parts.shape[:-1], 1)
    low, high = parts.amin(-1, keepdim=True).clamp_max(0.0), parts.amax(-1, keepdim=True).clamp_min(0.0)
    full = ((high - low) / (form.high - form.low)).clamp_min(2.0**-60).float().double()
    best_scale, best_zero = start.scale.reshape(shape), start.zero_point.double().reshape(shape)
    least = _norm(parts, best_scale, best_zero, form)
    zero, beta = form.low - low / full, BETA
    for _ in range(STEPS):
        whole = zero.round().clamp(form.low, form.high)
        norm = _norm(parts, full, whole, form)
        better = norm < least
        best_scale, best_zero, least = (
            torch.where(better, new, old) for new, old in ((full, best_scale), (whole, best_zero), (norm, least))
        )
        codes = torch.clamp(torch.round(parts / full + zero), form.low, form.high)
        error = parts - (codes - zero) * full
        sparse = error.sign() * (error.abs() - error.abs().clamp_min(1e-12).pow(P - 1) / beta).clamp_min(0.0)
        zero = (codes - (parts - sparse) / full).mean(-1, keepdim=True)
        beta *= GROWTH
    return replace(start, scale=best_scale.reshape(start.scale.shape), zero_point=best_zero.to(torch.int64).reshape(start.scale.shape))


def _norm(parts: Tensor, scale: Tensor, zero: Tensor, form: Format) -> Tensor:
    codes = torch.clamp(torch.round(parts / scale) + zero, form.low, form.high) - zero
    return (codes * scale - parts).abs().pow(P).mean(-1, keepdim=True)
