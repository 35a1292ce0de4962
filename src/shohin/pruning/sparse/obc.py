"""Exact optimal brain surgeon for each row of a layer (OBC's ExactOBS, Frantar & Alistarh, 2022, arXiv 2208.11580): one unit at a
time goes, the cheapest after full compensation by all that is left. Cubic in the inputs for *each* row: for small layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.errors import PlanError
from shohin.evidence.hessian import factored
from shohin.pruning.sparse.layout import arranged, restored
from shohin.pruning.sparse.optimal import optimal
from shohin.pruning.sparse.patterns import Pattern, keep_largest, spread

#: float64 numbers held at once for the inverse Hessians of a batch of rows
_HELD = 1 << 23


def obc(weight: Tensor, hessian: Tensor, pattern: Pattern, *, damp: float = 1e-2) -> tuple[Tensor, Tensor]:
    """A weight with the pattern, and its mask (True stays).

    Removals of all rows compete: a row gives as many units as are cheap in it. Of N:M each group gives its number.

    Args:
        weight: ``[O, I, *kernel]``.
        hessian: ``[G, F, F]`` or ``[F, F]`` with ``F = I * taps``: second moments of the inputs.
        pattern: of one row in height: blocks of several rows couple what is solved for each row.
        damp: share of the mean diagonal that is added to it.

    Raises:
        PlanError: if shapes do not fit, or a block is more than one row high.
        DataError: if a value is NaN or Inf.
    """
    if pattern.height > 1:
        raise PlanError(f"exact OBS works row by row and cannot choose blocks of {pattern.height} rows; use sparsegpt")
    w, h = arranged(weight, hessian, pattern)
    inverse = torch.cholesky_inverse(factored(h, damp))
    rows = max(_HELD // w.shape[-1] ** 2, 1)
    parts = [
        _traces(part, inverse[g], pattern) for g in range(len(w)) for part in torch.split(w[g], rows)
    ]  # each: cost of removal and place in the order of removals, [rows, units]
    costs, places = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    if pattern.kind == "n:m":
        keep = costs == torch.inf
    else:
        in_order = torch.empty_like(costs).scatter_(1, places, costs).cummax(1).values
        stays = keep_largest(in_order.flatten(), costs.numel() - pattern.dropped(costs.numel())).reshape(costs.shape)
        keep = stays.gather(1, places)
    mask = restored(spread(keep, pattern).reshape(w.shape), weight, pattern)
    return optimal(weight, hessian, mask, damp=damp), mask


def _traces(w: Tensor, inverse: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """For rows ``[b, F]``: what the removal of each unit cost when it went (infinite if it stayed), and its place in the order."""
    k, w = pattern.width, w.clone()
    count, units = len(w), w.shape[1] // k
    h = inverse.expand(count, -1, -1).clone()
    costs = torch.full((count, units), torch.inf, dtype=w.dtype)
    places = torch.zeros(count, units, dtype=torch.int64)
    row = torch.arange(count)
    steps = units if pattern.kind != "n:m" else units // pattern.of * (pattern.of - pattern.kept)
    gone = torch.zeros(count, units, dtype=torch.bool)
    for step in range(steps):
        price = _prices(w, h, k)
        closed = gone
        if pattern.kind == "n:m":
            full = torch.unflatten(gone, 1, (-1, pattern.of)).sum(-1) >= pattern.of - pattern.kept
            closed = gone | full.repeat_interleave(pattern.of, 1)
        price[closed] = torch.inf
        unit = price.argmin(1)
        costs[row, unit], places[row, unit] = price[row, unit], step
        gone[row, unit] = True
        columns = unit[:, None] * k + torch.arange(k)
        own = h[row[:, None, None], columns[:, :, None], columns[:, None, :]]
        across = h.gather(1, columns[:, :, None].expand(-1, -1, h.shape[2]))  # [b, k, F]
        gain = torch.linalg.solve(own, across)
        w -= (w.gather(1, columns).unsqueeze(1) @ gain).squeeze(1)
        h -= across.transpose(1, 2) @ gain
        w.scatter_(1, columns, 0.0)
        h.scatter_(1, columns[:, :, None].expand_as(across), 0.0)
        h.scatter_(2, columns[:, None, :].expand(-1, h.shape[1], -1), 0.0)
        h[row[:, None], columns, columns] = 1.0  # apart from all others: it can be inverted and changes nothing
    return costs, places


def _prices(w: Tensor, h: Tensor, k: int) -> Tensor:
    """``w_B (H^-1_BB)^-1 w_B`` of each unit B: ``[b, units]``."""
    if k == 1:
        return w.square() / h.diagonal(dim1=1, dim2=2)
    parts = torch.unflatten(w, 1, (-1, k))
    own = torch.stack([h[:, i : i + k, i : i + k] for i in range(0, w.shape[1], k)], 1)
    solved: Tensor = torch.linalg.solve(own, parts.unsqueeze(-1)).squeeze(-1)
    return (parts * solved).sum(-1)
