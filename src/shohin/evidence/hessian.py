"""A layer's Hessian, the second moments of its inputs: damped, factored, and what a layer should become on inputs that have moved."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(hessian: Tensor, damp: float | Tensor) -> Tensor:
    """``H + damp * mean diagonal * I`` for each group; the identity for a group whose inputs are all zero."""
    scale = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    add = torch.where(scale > 0, damp * scale, torch.ones_like(scale))
    return hessian + add[:, None, None] * torch.eye(hessian.shape[-1], dtype=hessian.dtype)


def factored(hessian: Tensor, damp: float) -> Tensor:
    """Lower Cholesky factor of the damped Hessian ``[G, F, F]``; the damping of a group grows tenfold from 1e-12 until there is one.

    A group that has none is no matrix of moments but what rounding left of constant inputs: its columns count alike.
    """
    factor: Tensor
    share = torch.full((len(hessian),), damp, dtype=hessian.dtype)
    while True:
        factor, info = torch.linalg.cholesky_ex(damped(hessian, share))
        failed = info != 0
        if not bool(failed.any()):
            return factor
        share = torch.where(failed, (share * 10).clamp_min(1e-12), share)
        constant = failed & (share > 10)
        hessian = torch.where(constant[:, None, None], 0.0, hessian)


def aimed(weight: Tensor, hessian: Tensor, cross: Tensor, ridge: float = 0.1) -> Tensor:
    """The whole weight that gives what the original network gave, from inputs that changes before it have moved.

    Ridge least squares towards the weight as it is (ThiNet, Luo et al., 2017, arXiv 1707.06342; as `shohin.pruning.reconstruct`).
    To approximate its outputs is to approximate the original's: the two errors differ by a constant.

    Args:
        weight: ``[G * R, I, *kernel]``.
        hessian: moments of the inputs, ``[G, F, F]``.
        cross: moments of inputs and missing outputs ``E[x r^T]``, ``[G, F, R]``.
        ridge: share of the mean diagonal.

    Returns:
        float64, in the weight's shape.
    """
    gain: Tensor = torch.cholesky_solve(cross, factored(hessian, ridge)).transpose(1, 2)
    return weight.detach().double() + gain.reshape(weight.shape).to(weight.device)
