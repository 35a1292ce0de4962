"""Scales along the inputs of weights of few bits: what a large activation multiplies is rounded more finely.

Lin et al., "AWQ" (2306.00978), section 3.2: the weights of an input are multiplied by ``s``, a power of the activation's magnitude, and
the input is divided by it, so that nothing but rounding changes. The power is searched, as there; here by the error that the rounding
which will be used leaves in some of the outputs, and all layers that read one activation have one ``s``, since it is divided once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shohin.formats import Quantizer

#: powers of the activation's magnitude that are tried
POWERS = (0.1, 0.2, 0.3, 0.4, 0.5)
#: outputs that the error is measured on
OUTPUTS = 64
#: least share of the error that must go, or nothing is divided
GAIN = 0.03

Round = Callable[[Tensor, Tensor], tuple[Quantizer, Tensor]]
"""A weight ``[O, F]`` and the moments of its inputs ``[1, F, F]`` to its grid and codes."""


def searched(weights: Sequence[Tensor], hessian: Tensor, rounded: Round) -> Tensor | None:
    """What the inputs of these weights are multiplied by before they are rounded, float64 ``[F]``; None where that gains too little.

    Args:
        weights: ``[O, F]`` of each layer that reads the activation.
        hessian: ``[F, F]``, second moments of it.
        rounded: how all of them are rounded.
    """
    h = hessian.to("cpu", torch.float64)
    weight = torch.cat([w.detach().to("cpu", torch.float64) for w in weights])
    weight = weight[:: -(-len(weight) // OUTPUTS)]
    magnitude = h.diagonal().clamp_min(0.0).sqrt()
    if not bool(magnitude.max() > 0):
        return None
    magnitude = magnitude.clamp_min(1e-3 * float(magnitude.max()))

    def error(factors: Tensor) -> float:
        q, codes = rounded(weight * factors, (h / (factors[:, None] * factors))[None])
        d = q.decoded(codes).double() / factors - weight
        return float(((d @ h) * d).sum())

    plain = error(torch.ones_like(magnitude))
    tried = [(error(factors), factors) for factors in (_even(magnitude**power) for power in POWERS)]
    best, factors = min(tried, key=lambda pair: pair[0])
    return factors if best < (1 - GAIN) * plain else None


def _even(factors: Tensor) -> Tensor:
    """With a geometric mean of 1, so that weights keep their size."""
    return (factors / factors.log().mean().exp()).float().double()
