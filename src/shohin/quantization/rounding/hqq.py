"""Half-quadratic quantization: grids without data that bear outliers (HQQ, Badri & Shaji, 2023, "Half-Quadratic Quantization")."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shohin.formats import Quantizer
from shohin.formats.scheme import Scheme
from shohin.quantization.grids import fitted_grid, in_parts

#: the norm of the error, its weight in the first step and that weight's growth, and the number of steps
P, BETA, GROWTH, STEPS = 0.7, 10.0, 1.01, 20


def hqq(weight: Tensor, scheme: Scheme) -> Quantizer:
    """Zero points with a small ``|error|_0.7`` for the scales of the full range; a symmetric format has none to move, and keeps `fitted_grid`.

    The error is split into a sparse part (by the generalized soft threshold of the norm) and a quadratic part that gives the zero
    point as a mean. Zero points are whole numbers here, as runtimes hold them.
    """
    if scheme.format.symmetric:
        return fitted_grid(weight, scheme)
    form = scheme.format
    parts = in_parts(weight, scheme)[0]
    low, high = parts.amin(-1, keepdim=True).clamp_max(0.0), parts.amax(-1, keepdim=True).clamp_min(0.0)
    scale = ((high - low) / (form.high - form.low)).clamp_min(2.0**-60)
    zero, beta = form.low - low / scale, BETA
    best, least = zero.clone(), torch.full_like(zero, torch.inf)
    for _ in range(STEPS):
        codes = torch.clamp(torch.round(parts / scale + zero), form.low, form.high)
        error = parts - (codes - zero) * scale
        sparse = error.sign() * (error.abs() - error.abs().clamp_min(1e-12).pow(P - 1) / beta).clamp_min(0.0)
        total = error.abs().pow(P).mean(-1, keepdim=True)
        best, least = torch.where(total < least, zero, best), torch.minimum(total, least)
        zero = (codes - (parts - sparse) / scale).mean(-1, keepdim=True)
        beta *= GROWTH
    whole = best.round().clamp(form.low, form.high).to(torch.int64)
    like = fitted_grid(weight, scheme)
    return replace(like, scale=scale.reshape(like.scale.shape).float().double(), zero_point=whole.reshape(like.zero_point.shape))
