"""Rounding whose scales learn: what quantization-aware training puts in the place of a grid.

Gradients pass straight through to values inside the range and stop outside. The scale's is that of LSQ (Esser et al. 2020, "Learned Step
Size Quantization", 1902.08153, equation 3): what the rounded value changes by where the codes stay; the zero point's is that of LSQ+
(Bhalgat et al. 2020, 2004.09576, equation 5). With ``clips`` alone the error of rounding inside the range is left out, which is how PACT
learns where to clip (Choi et al. 2018, 1805.06085, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rounded(torch.autograd.Function):
    """``Rounded.apply(x, scale, zero, low, high, clips)``: ``x`` on the grid, where scale and zero point are tensors that learn.

    Args:
        x: any shape.
        scale, zero: tensors that broadcast with ``x``; the zero points are whole.
        low, high: bounds of the codes, both numbers, or both tensors that broadcast with ``x``.
        clips: the scale learns from clipped values alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: Tensor | int, high: Tensor | int, clips: bool) -> Tensor:
        codes = torch.div(x, scale).round_()
        if zero.dim() == 0 and not isinstance(low, Tensor) and not isinstance(high, Tensor):
            out = codes.clamp_(low - float(zero), high - float(zero)).mul_(scale)  # numbers, which are faster than tensors
        else:
            out = torch.clamp(codes, low - zero, high - zero).mul_(scale)
        ctx.save_for_backward(x, out, scale, (low - zero) * scale, (high - zero) * scale)
        ctx.clips = clips
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].to_dense() if gradients[0].is_sparse else gradients[0]
        x, out, scale, least, most = ctx.saved_tensors
        inside = gradient * ((x >= least) & (x <= most))
        for_scale = for_zero = None
        if ctx.needs_input_grad[1]:
            moved = (gradient - inside) * out if ctx.clips else torch.addcmul(gradient * out, inside, x, value=-1)
            for_scale = (moved if scale.dim() == 0 else moved / scale).sum_to_size(scale.shape)
            for_scale = for_scale / scale if scale.dim() == 0 else for_scale
        if ctx.needs_input_grad[2]:
            outside = gradient - inside
            for_zero = -(outside.sum() * scale if scale.dim() == 0 else (outside * scale).sum_to_size(scale.shape))
        return inside, for_scale, for_zero, None, None, None


def rounded(x: Tensor, scale: Tensor, zero: Tensor, low: Tensor | int, high: Tensor | int, *, clips: bool = False) -> Tensor:
    """See `Rounded`."""
    result: Tensor = Rounded.apply(x, scale, zero, low, high, clips)  # type: ignore[no-untyped-call]
    return result


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, with its gradient times ``factor``."""
    return x * factor + (x * (1 - factor)).detach()


def whole(x: Tensor) -> Tensor:
    """Rounded to whole numbers, with the gradient of ``x``."""
    return x + (x.round() - x).detach()
