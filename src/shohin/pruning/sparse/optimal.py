"""The best weights for a given mask: what the removed ones gave is regressed onto those that stay, row by row.

With kept columns S and removed ones R of a row w: ``w'_S = w_S + (H_SS + lambda I)^-1 H_SR w_R`` (the full update of optimal
brain surgeon, Hassibi & Stork, 1993, for one layer's quadratic error).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.evidence.hessian import damped, factored
from shohin.pruning.sparse.layout import arranged, restored, row_errors
from shohin.pruning.sparse.patterns import Pattern

_ANY = Pattern.unstructured(0.0)


def optimal(weight: Tensor, hessian: Tensor, mask: Tensor, *, damp: float = 1e-2) -> Tensor:
    """The weight that changes the layer's outputs least among those with zeros where the mask is False.

    Rows with the same mask share one factorization: at most ``O * F**3 / 3`` multiplications, memory of one Hessian.

    Args:
        weight: ``[O, I, *kernel]``.
        hessian: ``[G, F, F]`` or ``[F, F]``, second moments of the inputs (their covariance, if a bias takes the mean).
        mask: boolean, in the shape of the weight; True stays.
        damp: lambda as a share of the mean diagonal: pulls towards the weights as they are, so that the error on the given
            moments is never above that of masking alone.

    Returns:
        In the shape and dtype of the weight, exact zeros outside the mask.

    Raises:
        PlanError: if shapes do not fit.
        DataError: if a value is NaN or Inf.
    """
    w, h = arranged(weight, hessian, _ANY)
    keep = mask.to("cpu").reshape(w.shape)
    masked_only = w.masked_fill(~keep, 0.0)
    out = masked_only.clone()
    for g in range(len(w)):
        kinds, which = torch.unique(keep[g], dim=0, return_inverse=True)
        rows_of = which.argsort(stable=True).split(torch.bincount(which, minlength=len(kinds)).tolist())
        for kind, rows in zip(kinds, rows_of, strict=True):
            inside, outside = kind.nonzero().squeeze(1), (~kind).nonzero().squeeze(1)
            if len(inside) and len(outside):
                lost = h[g][inside][:, outside] @ w[g][rows][:, outside].T
                factor = factored(_with_scale(h[g], inside), damp)[0]
                out[g, rows[:, None], inside] += torch.cholesky_solve(lost, factor).T
    worse = row_errors(out - w, h) > row_errors(masked_only - w, h)  # rounding, where both are nearly equal
    out = torch.where(worse.unsqueeze(-1), masked_only, out)
    return restored(out, weight, _ANY).to(weight.dtype)


def _with_scale(hessian: Tensor, inside: Tensor) -> Tensor:
    """The kept part of a Hessian, as a batch of one."""
    return hessian[inside][:, inside].unsqueeze(0)


def improved(weight: Tensor, changed: Tensor, hessian: Tensor, mask: Tensor, *, damp: float = 1e-2, steps: int = 16) -> Tensor:
    """Towards `optimal` from any weight with this mask, for layers whose rows are too long to be solved one by one.

    Conjugate gradients of all rows together, preconditioned by the diagonal (Hestenes & Stiefel, 1952): ``steps * O * F**2``
    multiplications. The error on the damped Hessian falls with every step.

    Args:
        weight: ``[O, I, *kernel]``, whose outputs are to be kept.
        changed: where to begin: zero outside the mask.
        hessian, mask, damp: as of `optimal`.

    Raises:
        PlanError: if shapes do not fit.
        DataError: if a value is NaN or Inf.
    """
    w, h = arranged(weight, hessian, _ANY)
    start = arranged(changed, hessian, _ANY)[0]
    keep = mask.to("cpu").reshape(w.shape)
    h = damped(h, damp)
    scale = h.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    out = start.clone()
    residual = ((w - out) @ h).masked_fill(~keep, 0.0)
    direction = residual / scale
    power = (residual * direction).sum(-1, keepdim=True)
    for _ in range(steps):
        ahead = (direction @ h).masked_fill(~keep, 0.0)
        curve = (direction * ahead).sum(-1, keepdim=True)
        length = torch.where(curve > 0, power / curve.clamp_min(torch.finfo(curve.dtype).tiny), 0.0)
        out += length * direction
        residual -= length * ahead
        guess = residual / scale
        new = (residual * guess).sum(-1, keepdim=True)
        direction = guess + torch.where(power > 0, new / power.clamp_min(torch.finfo(power.dtype).tiny), 0.0) * direction
        power = new
    worse = row_errors(out - w, h) > row_errors(start - w, h)  # rounding, where nothing is left to gain
    return restored(torch.where(worse.unsqueeze(-1), start, out), weight, _ANY).to(weight.dtype)
