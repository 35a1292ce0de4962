"""How much each single element of a weight matters; larger stays. Pure functions of tensors in the shape of the weight.

A weight is ``[O, I, *kernel]``. Scores of `lamp`, `taylor` and `fisher` may be compared between layers; those of `magnitude` may
be, but small layers of large weights then stay whole; those of `wanda` only within a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.errors import PlanError


def magnitude(weight: Tensor) -> Tensor:
    """``|w|`` (Han et al., 2015, arXiv 1506.02626)."""
    return weight.detach().abs()


def wanda(weight: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """``|w| * ||x||_2``, to be compared within each output row (Wanda, Sun et al., 2023, arXiv 2306.11695).

    Args:
        weight: ``[O, I, *kernel]``.
        second: mean or sum of ``x**2`` of the layer's inputs: ``[F]`` or ``[groups, F]`` with ``F = I * taps``.
        groups: of a grouped convolution.
    """
    matrix = weight.detach().flatten(1).double()
    norms = second.detach().to(matrix).reshape(groups, -1).clamp_min(0).sqrt()
    if norms.shape[1] != matrix.shape[1]:
        raise PlanError(f"wanda: a weight {tuple(weight.shape)} has {matrix.shape[1]} inputs, the data {norms.shape[1]}")
    return (matrix.abs() * norms.repeat_interleave(len(matrix) // groups, 0)).reshape(weight.shape)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|w * g|``, the first-order change of the loss (Molchanov et al., 2017, arXiv 1611.06440; per weight as in SNIP, Lee et
    al., 2019, arXiv 1810.02340); ``g`` is the mean gradient of the loss.
    """
    return (weight.detach().double() * gradient.detach().double()).abs()


def fisher(weight: Tensor, square: Tensor) -> Tensor:
    """``1/2 E[g**2] w**2``: optimal brain damage (LeCun et al., 1990) with the Fisher diagonal as Hessian (Theis et al., 2018,
    arXiv 1801.05787); ``square`` is the mean square of per-sample gradients.
    """
    return 0.5 * square.detach().double() * weight.detach().double().square()


def random(weight: Tensor, seed: int = 0) -> Tensor:
    """Uniform numbers: what every criterion must beat."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(weight.device)


def lamp(weight: Tensor) -> Tensor:
    """``w**2`` over the sum of all squares in the layer that are not smaller (LAMP, Lee et al., 2021, arXiv 2010.07611).

    Comparable between layers: the largest weight of each has the score 1. Of equal weights the later counts as larger.
    """
    squares = weight.detach().double().square().flatten()
    order = squares.argsort(stable=True)
    sorted_ = squares[order]
    rest = sorted_.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = torch.where(rest > 0, sorted_ / rest.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(rest))
    return scores.reshape(weight.shape)
