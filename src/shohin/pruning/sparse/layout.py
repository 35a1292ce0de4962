"""A layer's weight and Hessian as the second-order methods read them: by groups, columns in a pattern's order, damped."""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.errors import DataError, PlanError
from shohin.pruning.sparse.patterns import Pattern


def arranged(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The weight as ``[G, R, F]`` and the Hessian as ``[G, F, F]``, float64 copies on the CPU, columns in the pattern's order.

    Args:
        weight: ``[G * R, I, *kernel]`` with ``F = I * taps``.
        hessian: ``[G, F, F]`` or ``[F, F]``: second moments of the layer's input rows, columns as in ``weight.flatten(1)``.

    Raises:
        PlanError: if shapes or pattern do not fit.
        DataError: if a value is NaN or Inf.
    """
    pattern.check(weight.shape)
    h = hessian.detach().to("cpu", torch.float64)
    h = h.unsqueeze(0) if h.dim() == 2 else h
    matrix = weight.detach().to("cpu", torch.float64).flatten(1)
    if len(matrix) % len(h) or h.shape[1:] != (matrix.shape[1], matrix.shape[1]) or (len(matrix) // len(h)) % pattern.height:
        raise PlanError(f"a weight {tuple(weight.shape)} with pattern {str(pattern)!r} does not fit a Hessian {tuple(hessian.shape)}")
    if not bool(torch.isfinite(matrix.sum() + h.sum())):
        raise DataError("the weight or the inputs of a layer hold NaN or Inf: check the calibration data and the model")
    order = pattern.order(weight.shape)
    return torch.unflatten(matrix[:, order], 0, (len(h), -1)), h[:, order][:, :, order]


def restored(matrix: Tensor, like: Tensor, pattern: Pattern) -> Tensor:
    """``[G, R, F]`` in the pattern's order as a tensor of the weight's shape and device."""
    out = torch.empty(len(like), matrix.shape[-1], dtype=matrix.dtype)
    out[:, pattern.order(like.shape)] = matrix.flatten(0, 1)
    return out.reshape(like.shape).to(like.device)


def output_error(weight: Tensor, changed: Tensor, hessian: Tensor) -> float:
    """``tr((W' - W) H (W' - W)^T)``: mean squared change of a layer's outputs, summed over them.

    Args:
        weight, changed: ``[G * R, I, *kernel]``.
        hessian: ``[G, F, F]`` or ``[F, F]``.
    """
    h = hessian.detach().to("cpu", torch.float64)
    h = h.unsqueeze(0) if h.dim() == 2 else h
    d = (changed.detach().to("cpu", torch.float64) - weight.detach().to("cpu", torch.float64)).flatten(1)
    return float(row_errors(torch.unflatten(d, 0, (len(h), -1)), h).sum())


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """The same for each row: ``[G, R]`` of ``[G, R, F]``."""
    return ((difference @ hessian) * difference).sum(-1).clamp_min(0)
