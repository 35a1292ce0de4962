"""SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774): one pass over the columns of a layer; each removed weight is made good by
the columns after it, through the Cholesky factor of the inverse damped Hessian, and masks are chosen on the weights as they then are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.evidence.hessian import factored
from shohin.pruning.sparse.layout import arranged, restored, row_errors
from shohin.pruning.sparse.patterns import Pattern, keep_largest, spread


def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, *, mask: Tensor | None = None, damp: float = 1e-2, block: int = 128
) -> tuple[Tensor, Tensor]:
    """A weight with the pattern, and its mask (True stays).

    Args:
        weight: ``[O, I, *kernel]``.
        hessian: ``[G, F, F]`` or ``[F, F]`` with ``F = I * taps``: second moments of the inputs.
        pattern: of the zeros. The score of a block of columns is what removing it in order costs, exactly.
        mask: given, only the weights are updated.
        damp: share of the mean diagonal that is added to it.
        block: columns among which an unstructured mask is chosen at once, and that are updated together.

    Returns:
        The weight in its dtype, zero outside the mask, and the mask. A row whose updates would not pay (later removals undo
        earlier ones) is only masked: on the damped Hessian the error is never above that of the mask alone.

    Raises:
        PlanError: if shapes do not fit.
        DataError: if a value is NaN or Inf.
    """
    original, h = arranged(weight, hessian, pattern)
    lower = factored(h, damp)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    w = original.clone()
    given = None if mask is None else arranged(mask, hessian, pattern)[0].bool()
    keep = torch.zeros_like(w, dtype=torch.bool) if given is None else given
    unit = pattern.of if pattern.kind == "n:m" else pattern.width
    step = max(block // unit, 1) * unit
    quota = _Quota(pattern, w.shape)
    for start in range(0, w.shape[-1], step):
        stop = min(start + step, w.shape[-1])
        columns, factor = w[..., start:stop], upper[:, start:stop, start:stop]
        if given is None and pattern.kind != "n:m":
            scores = _unit_scores(columns, factor, pattern)
            keep[..., start:stop] = spread(keep_largest(scores.flatten(), quota.kept(stop)).reshape(scores.shape), pattern)
        errors = torch.zeros_like(columns)
        for j in range(stop - start):
            if given is None and pattern.kind == "n:m" and j % unit == 0:
                ahead = slice(j, j + unit)
                scores = (columns[..., ahead] / factor.diagonal(dim1=-2, dim2=-1)[:, None, ahead]).square()
                keep[..., start + j : start + j + unit] = keep_largest(scores, pattern.kept)
            stays = keep[..., start + j]
            error = torch.where(stays, 0.0, columns[..., j]) / factor[:, j, j, None]
            columns[..., j + 1 :] -= error.unsqueeze(-1) * factor[:, j, None, j + 1 :]
            columns[..., j] *= stays
            errors[..., j] = error
        w[..., stop:] -= errors @ upper[:, start:stop, stop:]
    masked = original.masked_fill(~keep, 0.0)
    true = lower @ lower.transpose(-1, -2)
    pays = row_errors(w - original, true) <= row_errors(masked - original, true)
    w = torch.where(pays.unsqueeze(-1), w, masked)
    return (
        restored(w.masked_fill(~keep, 0.0), weight, pattern).to(weight.dtype),
        restored(keep, weight, pattern),
    )


class _Quota:
    """How many units stay in each block of columns, so that the whole keeps exactly the pattern's count."""

    def __init__(self, pattern: Pattern, shape: torch.Size) -> None:
        self.width, self.columns = pattern.width, shape[-1] // pattern.width
        self.each = shape[0] * shape[1] // pattern.height
        self.total = pattern.dropped(self.each * self.columns)
        self.done = self.seen = 0

    def kept(self, stop: int) -> int:
        """Of the columns up to ``stop`` that were not yet counted."""
        seen = stop // self.width
        dropped = round(self.total * seen / self.columns)
        out = (seen - self.seen) * self.each - (dropped - self.done)
        self.done, self.seen = dropped, seen
        return out


def _unit_scores(columns: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """What it costs to remove each unit: the squared errors ``w_B U_BB^-1`` of its rows."""
    if pattern.width == 1:
        return pattern.pooled((columns / factor.diagonal(dim1=-2, dim2=-1).unsqueeze(1)).square())
    k = pattern.width
    parts = torch.unflatten(columns, -1, (-1, k)).transpose(1, 2)  # [G, blocks, R, k]
    own = torch.stack([factor[:, i : i + k, i : i + k] for i in range(0, factor.shape[-1], k)], 1)
    errors = torch.linalg.solve_triangular(own, parts, upper=True, left=False).square().sum(-1).transpose(1, 2)
    return torch.unflatten(errors, 1, (-1, pattern.height)).sum(2)
