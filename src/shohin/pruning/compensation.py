"""Closed-form compensation: what removed inputs gave a layer is regressed onto the kept ones and folded into its weights.

Lineage: ThiNet (Luo et al., 2017), OBSPA (2403.18955), CORP (2602.05243). With the weight W, covariance C of the layer's input,
kept inputs K and removed inputs R, the output that R gave is ``W_R x_R``; its ridge regression on ``x_K`` gives::

    W' = W_K + W_R C_RK (C_KK + lambda I)^-1        b' = b + W mean - W' mean_K

The ridge pulls towards plain slicing (not towards zero), so the calibration error is never larger than that of slicing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.errors import DataError, ModelError
from shohin.evidence.gram import Moments

#: of the second moments, what a covariance of inputs that came in float32 cannot tell from rounding
ROUNDING = 1e-7


def compensate(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    kept: Tensor,
    *,
    groups: int = 1,
    ridge: float = 1e-3,
    centred: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The consuming layer's weight and bias for its kept inputs.

    Args:
        weight: ``[O, I / groups, *kernel]`` of a linear layer or convolution that reads the cut tensor.
        bias: ``[O]`` or None.
        moments: of the layer's full input, im2col for a convolution: ``I / groups * prod(kernel)`` features for each group.
        kept: indices of kept input channels, ascending in ``[0, I)``.
        groups: of a grouped convolution; each group must keep the same number of its inputs, at least one (a depthwise layer
            therefore keeps everything: its channels are cut by slicing).
        ridge: lambda as a share of the mean variance of the kept inputs; above 0 if they may be dependent.
        centred: regress fluctuations only and leave the mean to the bias. Default: True if there is a bias. True without a
            bias suits a layer that a recalibrated batch norm follows.

    Returns:
        ``([O, K / groups, *kernel], [O])`` in the dtype of ``weight``; the bias is None where it was.

    Raises:
        ModelError: if shapes do not fit or the groups keep unequal numbers.
        DataError: if the result is not finite.
    """
    kept = kept.to(device="cpu", dtype=torch.int64)
    per_group, taps = weight.shape[1], weight[0, 0].numel()
    if moments.second.shape != (groups, per_group * taps, per_group * taps) or weight.shape[0] % groups:
        raise ModelError(
            f"compensation: weight {tuple(weight.shape)} with {groups} groups needs moments [{groups}, {per_group * taps}, "
            f"{per_group * taps}] of its im2col input; got {tuple(moments.second.shape)}"
        )
    local = _by_group(kept, groups, per_group)
    flat = weight.detach().to("cpu", torch.float64).reshape(groups, weight.shape[0] // groups, per_group * taps)
    use_centre = bias is not None if centred is None else centred
    statistics = moments.covariance if use_centre else moments.second
    blocks, shifts = [], []
    for g in range(groups):
        features = (local[g].unsqueeze(1) * taps + torch.arange(taps)).reshape(-1)
        removed = torch.ones(per_group * taps, dtype=torch.bool)
        removed[features] = False
        w, c = flat[g], statistics[g]
        floor = ROUNDING * float(moments.second[g].diagonal().mean())
        gain = ridge_solve(c[features][:, features], c[features][:, removed] @ w[:, removed].T, ridge, floor).T
        new = w[:, features] + gain
        blocks.append(new)
        shifts.append(w @ moments.mean[g] - new @ moments.mean[g][features])
    out = torch.cat(blocks).reshape(weight.shape[0], local.shape[1], *weight.shape[2:])
    if not bool(torch.isfinite(out).all()):
        raise DataError("compensation gave NaN or Inf: check the calibration data and the weights")
    new_bias = None
    if bias is not None:
        shift = torch.cat(shifts).to(bias) if use_centre else torch.zeros_like(bias)
        new_bias = bias.detach() + shift
    return out.to(weight), new_bias


def ridge_solve(matrix: Tensor, right: Tensor, ridge: float, floor: float = 0.0) -> Tensor:
    """``(matrix + lambda I)^-1 right`` for a positive semi-definite matrix; lambda is ``ridge`` times its mean diagonal. Zero where the
    inputs are constant: nothing can be regressed on them.

    Args:
        matrix: ``[K, K]``, float64.
        right: ``[K, n]``, float64.
        ridge: share, >= 0. If the sum is singular it is raised tenfold from 1e-12 until it can be factored.
        floor: a mean diagonal of so little is rounding.

    Raises:
        DataError: if a value is NaN or Inf.
    """
    if not bool(torch.isfinite(matrix.sum() + right.sum())):
        raise DataError("the second moments of a layer's input hold NaN or Inf: check the calibration data")
    scale = float(matrix.diagonal().mean())
    if scale <= floor:
        return torch.zeros_like(right)
    share = ridge
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    while share <= 10:
        factor, info = torch.linalg.cholesky_ex(matrix + share * scale * eye)
        if not int(info):
            return torch.cholesky_solve(right, factor)
        share = max(share * 10, 1e-12)
    return torch.zeros_like(right)  # it is not positive, so it is rounding


def _by_group(kept: Tensor, groups: int, per_group: int) -> Tensor:
    """Kept indices inside each group: ``[groups, K / groups]``."""
    if not kept.numel() or int(kept.min()) < 0 or int(kept.max()) >= groups * per_group or bool((kept.diff() <= 0).any()):
        raise ModelError(
            f"compensation: kept must be ascending indices of {groups * per_group} input channels, at least one; got {kept.tolist()}"
        )
    counts = torch.bincount(kept // per_group, minlength=groups)
    if int(counts.min()) != int(counts.max()):
        raise ModelError(
            f"compensation: a convolution of {groups} groups must keep as many inputs in each group, at least one; it would keep "
            f"{counts.tolist()}. Whole groups are cut by slicing weight rows and moments first; that needs no compensation"
        )
    return (kept % per_group).reshape(groups, -1)
