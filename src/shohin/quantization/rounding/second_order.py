"""Rounding that makes up for itself: each column's error is moved to the columns that are not rounded yet, or were rounded before.

``gptq``: GPTQ (Frantar et al., 2023, arXiv 2210.17323, section 3), in the order of descending Hessian diagonal, with the grids of
groups fixed beforehand. ``descended``: cyclic coordinate descent on the same error from any rounding (QuantEase, Behdin et al.,
2023, arXiv 2309.01885, section 3). ``rescaled``: the scales with the least error for given codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from shohin.evidence.hessian import damped, factored
from shohin.formats import Quantizer
from shohin.quantization.rounding.groups import grouped, spread

#: columns whose errors are moved to the others in one product
BLOCK = 64


def gptq(weight: Tensor, hessian: Tensor, quantizer: Quantizer, *, damp: float = 1e-2, in_order: bool = False) -> Tensor:
    """Codes, int64 in the weight's shape.

    Args:
        weight: ``[O, I, *kernel]``.
        hessian: ``[G, F, F]``, second moments of the inputs of each of G groups of outputs.
        quantizer: of the weight.
        damp: share of the mean diagonal.
        in_order: True rounds columns as they come, False the most important first ("act order").
    """
    w = grouped(weight, hessian)
    scale, zero = spread(weight, quantizer, hessian)
    order = hessian.diagonal(dim1=-2, dim2=-1).mean(0).argsort(descending=True, stable=True)
    if in_order:
        order = torch.arange(w.shape[-1])
    w, scale, zero = w[..., order], scale[..., order], zero[..., order]
    inverse = torch.cholesky_inverse(factored(hessian.to("cpu", torch.float64)[:, order][:, :, order], damp))
    upper = torch.linalg.cholesky(inverse).transpose(-1, -2)
    codes = torch.empty_like(w)
    for start in range(0, w.shape[-1], BLOCK):
        stop = min(start + BLOCK, w.shape[-1])
        errors = torch.empty_like(w[..., start:stop])
        for i in range(start, stop):
            c = _rounded(w[..., i] / scale[..., i], zero[..., i], quantizer)
            codes[..., i] = c
            e = (w[..., i] - (c - zero[..., i]) * scale[..., i]) / upper[:, i, i, None]
            errors[..., i - start] = e
            w[..., i + 1 : stop] -= e.unsqueeze(-1) * upper[:, None, i, i + 1 : stop]
        w[..., stop:] -= errors @ upper[:, start:stop, stop:]
    out = torch.empty_like(codes)
    out[..., order] = codes
    return out.reshape(weight.shape).to(torch.int64)


def descended(weight: Tensor, hessian: Tensor, quantizer: Quantizer, codes: Tensor, *, damp: float = 1e-2, sweeps: int = 2) -> Tensor:
    """Codes with an error that is not above that of ``codes``: each column in turn is rounded to what is best beside all others."""
    h = damped(hessian.to("cpu", torch.float64), damp)
    w = grouped(weight, hessian)
    scale, zero = spread(weight, quantizer, hessian)
    c = grouped(codes, hessian)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    pull = (w - (c - zero) * scale) @ h  # minus half the gradient of the error
    for _ in range(sweeps):
        for start in range(0, w.shape[-1], BLOCK):
            stop = min(start + BLOCK, w.shape[-1])
            inside, moved = h[:, start:stop, start:stop], torch.empty_like(w[..., start:stop])
            near = pull[..., start:stop].clone()
            for i in range(start, stop):
                held = (c[..., i] - zero[..., i]) * scale[..., i]
                best = _rounded((held + near[..., i - start] / diagonal[:, i, None]) / scale[..., i], zero[..., i], quantizer)
                moved[..., i - start] = step = (best - c[..., i]) * scale[..., i]
                c[..., i] = best
                near -= step.unsqueeze(-1) * inside[:, None, i - start]
            pull -= moved @ h[:, start:stop]
    return c.reshape(weight.shape).to(torch.int64)


def rescaled(weight: Tensor, hessian: Tensor, quantizer: Quantizer, codes: Tensor, *, damp: float = 1e-2) -> Quantizer:
    """The same zero points, and for each output the scales of its groups that together leave the least error for these codes."""
    if quantizer.axis is None:
        return quantizer
    h = damped(hessian.to("cpu", torch.float64), damp)
    w = grouped(weight, hessian)
    outputs, features = len(weight), w.shape[-1]
    size = quantizer.group or features
    _, zero = spread(weight, quantizer, hessian)
    c = grouped(codes, hessian) - zero
    fill = -features % size
    groups = (features + fill) // size
    # column g of each output's design: its codes of group g, zero elsewhere; H times it, by groups, so that no [O, F, groups] is made
    target = w @ h
    parts = torch.unflatten(F.pad(c, (0, fill)), -1, (groups, size))
    padded = F.pad(h, (0, fill, 0, fill))
    normal = torch.empty(*c.shape[:2], groups, groups, dtype=torch.float64)
    for g in range(groups):
        ahead = parts[..., g, :] @ padded[:, g * size : (g + 1) * size]
        normal[..., g] = (torch.unflatten(ahead, -1, (groups, size)) * parts).sum(-1)
    right = (torch.unflatten(F.pad(target, (0, fill)), -1, (groups, size)) * parts).sum(-1)
    old = quantizer.scale.reshape(outputs, -1).reshape(*c.shape[:2], groups)
    ridge = 1e-6 * normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    normal.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    new = torch.linalg.solve(normal, right + ridge.unsqueeze(-1) * old)
    new = torch.where((new > 0.25 * old) & (new < 4 * old), new, old).reshape(quantizer.scale.shape).float().double()
    return _better(weight, hessian, replace(quantizer, scale=new), quantizer, codes)


def error_of(weight: Tensor, hessian: Tensor, quantizer: Quantizer, codes: Tensor) -> Tensor:
    """``tr(D H D^T)`` of each output, ``[O]``: mean squared change of the layer's outputs."""
    d = grouped(weight, hessian) - grouped(quantizer.decoded(codes), hessian)
    return ((d @ hessian.to("cpu", torch.float64)) * d).sum(-1).flatten()


def _better(weight: Tensor, hessian: Tensor, new: Quantizer, old: Quantizer, codes: Tensor) -> Quantizer:
    """Of each output the scales with the smaller error."""
    better = error_of(weight, hessian, new, codes) <= error_of(weight, hessian, old, codes)
    shape = (-1, *[1] * (new.scale.dim() - 1))
    return replace(new, scale=torch.where(better.reshape(shape), new.scale, old.scale))


def _rounded(x: Tensor, zero: Tensor, quantizer: Quantizer) -> Tensor:
    return torch.clamp(torch.round(x) + zero, quantizer.format.low, quantizer.format.high)
