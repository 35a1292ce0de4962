"""Weights, scales and zero points by groups of outputs, as Hessians are."""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.formats import Quantizer


def grouped(values: Tensor, hessian: Tensor) -> Tensor:
    """``[O, I, *kernel]`` as float64 ``[G, O / G, F]``; a copy."""
    return torch.unflatten(values.detach().to("cpu", torch.float64).flatten(1), 0, (len(hessian), -1)).clone()


def spread(weight: Tensor, quantizer: Quantizer, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, ``[G, O / G, F]``."""
    like = torch.empty(weight.shape, dtype=torch.float64)
    scale, zero = (quantizer.spread(v, like).expand(weight.shape) for v in (quantizer.scale.float(), quantizer.zero_point))
    return grouped(scale, hessian), grouped(zero, hessian)
