"""Rounding that is learned: up or down for each weight, by gradient descent on the layer's squared error (AdaRound, Nagel et al., 2020,
arXiv 2004.10568, section 3).

The relaxation and its regularizer are the paper's (equations 21 to 25). The error is that of the layer's output by the second moments
of its inputs, so that a step costs one product of matrices and no batch goes through the network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shohin.evidence.hessian import damped
from shohin.formats import Quantizer
from shohin.quantization.rounding.groups import grouped, spread

#: stretch of the sigmoid; share of the steps before the regularizer acts, and the ends of its exponent
ZETA, GAMMA, WARM, HIGH, LOW = 1.1, -0.1, 0.2, 20.0, 2.0
#: steps and their size; the regularizer beside an error that is 1 where each weight is rounded to the nearest
STEPS, RATE, PRESSURE = 300, 0.1, 10.0


def adaround(weight: Tensor, hessian: Tensor, quantizer: Quantizer, *, damp: float = 1e-2, steps: int = STEPS) -> Tensor:
    """Codes, int64 in the weight's shape, none more than one from the nearest; not worse than the nearest.

    Args:
        weight: ``[O, I, *kernel]``.
        hessian: ``[G, F, F]``, second moments of the inputs of each of G groups of outputs.
        quantizer: of the weight.
        damp: share of the mean diagonal.
        steps: of Adam.
    """
    h = damped(hessian.to("cpu", torch.float64), damp).float()
    w = grouped(weight, hessian).float()
    scale, zero = (part.float() for part in spread(weight, quantizer, hessian))
    low, high = float(quantizer.format.low), float(quantizer.format.high)
    below = torch.floor(w / scale)
    nearest = torch.clamp(torch.round(w / scale) + zero, low, high)
    near = _by_output((nearest - zero) * scale - w, h)
    reference = float(near.sum()) / w.numel()
    if not reference > 0:
        return nearest.reshape(weight.shape).to(torch.int64)
    choice = torch.logit(((w / scale - below).clamp(0.01, 0.99) - GAMMA) / (ZETA - GAMMA))
    adam = torch.optim.Adam([choice], lr=RATE)
    for step in range(steps):
        sigmoid = torch.sigmoid(choice)
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        up = stretched.clamp(0, 1)
        codes = below + up + zero
        kept = (codes >= low) & (codes <= high)
        error = (codes.clamp(low, high) - zero) * scale - w
        slope = 2 * (error @ h) * scale * kept / reference
        done = (step / steps - WARM) / (1 - WARM)
        if done >= 0:  # d/dx of 1 - |2x - 1|^b, with b falling along a cosine
            b, side = LOW + 0.5 * (HIGH - LOW) * (1 + math.cos(math.pi * done)), 2 * up - 1
            slope -= PRESSURE * 2 * b * side.abs().clamp_min(1e-8) ** (b - 1) * side.sign()
        choice.grad = slope * ((stretched > 0) & (stretched < 1)) * (ZETA - GAMMA) * sigmoid * (1 - sigmoid)
        adam.step()
    found = (below + zero + (torch.sigmoid(choice) >= 0.5)).clamp(low, high)
    worse = _by_output((found - zero) * scale - w, h) > near
    return torch.where(worse.unsqueeze(-1), nearest, found).reshape(weight.shape).to(torch.int64)


def _by_output(error: Tensor, hessian: Tensor) -> Tensor:
    """The error of each output."""
    return ((error @ hessian) * error).sum(-1)
