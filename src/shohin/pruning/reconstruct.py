"""Least squares from what the cut model really feeds a layer to what the original layer gave.

Unlike `compensate`, whose input statistics come from the uncut model, this also corrects the error that earlier layers left
(as ThiNet, Luo et al., 2017, and channel pruning, He et al., 2017, do). How far the weights may move is decided on rows that
were not fitted: with few rows for its inputs a layer would learn their noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shohin.errors import DataError
from shohin.pruning.compensation import ROUNDING, ridge_solve

#: shares of the mean variance of the inputs that are tried; infinite leaves the weights
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, math.inf)
#: of the rows, for choosing among these
HELD_OUT = 0.25
#: rows that are summed in the precision of the input before they are added in float64
CHUNK = 512


class LeastSquares:
    """Regression of outputs y on inputs x: memory ``G * (F**2 + F * O)`` in float64.

    Args:
        in_features: F of one group, ``K / groups * prod(kernel)`` for a convolution's im2col rows.
        out_features: O of one group.
        groups: G, of a grouped convolution.
    """

    def __init__(self, in_features: int, out_features: int, groups: int = 1) -> None:
        self.rows = 0
        self._xx = torch.zeros(groups, in_features, in_features, dtype=torch.float64)
        self._xy = torch.zeros(groups, in_features, out_features, dtype=torch.float64)
        self._x = torch.zeros(groups, in_features, dtype=torch.float64)
        self._y = torch.zeros(groups, out_features, dtype=torch.float64)
        self._yy = torch.zeros(groups, out_features, dtype=torch.float64)

    def update(self, x_rows: Tensor, y_rows: Tensor) -> None:
        """Takes pairs of rows ``[n, G * F]`` (the cut model's input) and ``[n, G * O]`` (the original layer's output, bias included).

        Raises:
            DataError: if shapes do not fit or a value is NaN or Inf.
        """
        features, outputs = self._x.numel(), self._y.numel()
        if x_rows.shape != (len(y_rows), features) or y_rows.shape != (len(x_rows), outputs):
            raise DataError(
                f"least squares: expected rows [n, {features}] and [n, {outputs}]; got {tuple(x_rows.shape)}, {tuple(y_rows.shape)}"
            )
        groups = len(self._x)
        for a, b in zip(torch.split(x_rows.detach().cpu(), CHUNK), torch.split(y_rows.detach().cpu(), CHUNK), strict=True):
            x, y = (t.reshape(len(t), groups, width).transpose(0, 1) for t, width in ((a, features // groups), (b, outputs // groups)))
            self._xx += x.mT @ x
            self._xy += x.mT @ y.to(x.dtype)
            self._x += x.double().sum(1)
            self._y += y.double().sum(1)
            self._yy += y.double().square().sum(1)
        if not bool(torch.isfinite(self._x.sum() + self._y.sum())):
            raise DataError("least squares: a layer's input or output holds NaN or Inf on the calibration data")
        self.rows += len(x_rows)

    def __add__(self, other: LeastSquares) -> LeastSquares:
        """Of the rows of both."""
        out = LeastSquares(self._x.shape[1], self._y.shape[1], len(self._x))
        out.rows = self.rows + other.rows
        for name in ("_xx", "_xy", "_x", "_y", "_yy"):
            setattr(out, name, getattr(self, name) + getattr(other, name))
        return out

    def solve(self, prior: Tensor, ridge: float = 1e-3, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """The weights nearest to ``prior`` that explain the outputs: ridge towards the prior, so that little data changes little.

        Args:
            prior: ``[G * O, F]`` or ``[G * O, K / G, *kernel]``: the sliced weights.
            ridge: lambda as a share of the mean variance of the inputs; infinite leaves the weights, and fits the bias alone.
            bias: also fit a bias; False for a layer that has none.

        Returns:
            Weights in the shape and dtype of ``prior``, and a bias ``[G * O]`` or None. On the rows given so far the error is never
            larger than that of ``prior`` with any bias (with no bias, if ``bias`` is False).

        Raises:
            DataError: if nothing was given, or the prior has another shape.
        """
        if not self.rows:
            raise DataError("no calibration data reached this layer: give Data(train=loader) with batches")
        w = self._grouped(prior)
        mean_x, mean_y = self._x / self.rows, self._y / self.rows
        xx, xy = self._xx / self.rows, self._xy / self.rows
        if bias:
            xx, xy = xx - mean_x.unsqueeze(2) * mean_x.unsqueeze(1), xy - mean_x.unsqueeze(2) * mean_y.unsqueeze(1)
        new = w
        if ridge < math.inf:
            rest = xy - xx @ w.mT
            floors = (ROUNDING * self._xx.diagonal(dim1=1, dim2=2).mean(1) / self.rows).tolist() if bias else [0.0] * len(xx)
            new = w + torch.stack([ridge_solve(a, b, ridge, f).T for a, b, f in zip(xx, rest, floors, strict=True)])
        if not bool(torch.isfinite(new).all()):
            raise DataError("least squares gave NaN or Inf: check the calibration data and the weights")
        shift = (mean_y - (new @ mean_x.unsqueeze(2)).squeeze(2)).flatten().to(prior) if bias else None
        return new.reshape(prior.shape).to(prior), shift

    def error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Mean squared error over all rows and outputs of a weight (in a shape of `solve`) and bias ``[G * O]``."""
        w = self._grouped(weight)
        b = torch.zeros_like(self._y) if bias is None else bias.detach().to("cpu", torch.float64).reshape(self._y.shape)
        quadratic = ((w @ self._xx) * w).sum(2) - 2 * (w * self._xy.mT).sum(2) + self._yy
        linear = 2 * b * ((w @ self._x.unsqueeze(2)).squeeze(2) - self._y) + self.rows * b.square()
        return float((quadratic + linear).clamp_min(0).mean()) / max(self.rows, 1)

    def _grouped(self, weight: Tensor) -> Tensor:
        groups, outputs = self._y.shape
        w = weight.detach().to("cpu", torch.float64)
        if weight.numel() != groups * outputs * self._x.shape[1] or len(weight) != groups * outputs:
            raise DataError(
                f"least squares: the prior {tuple(weight.shape)} does not fit {self._x.shape[1]} inputs and {outputs} outputs of {groups} groups"
            )
        return w.reshape(groups, outputs, -1)


def fitted(
    x_rows: Tensor, y_rows: Tensor, prior: Tensor, *, bias: bool = True, groups: int = 1, ridges: Sequence[float] = RIDGES
) -> tuple[Tensor, Tensor | None]:
    """Weights and bias that explain the outputs, as near to ``prior`` as the last quarter of the rows asks for.

    Args:
        x_rows, y_rows: see `LeastSquares.update`; neighbours that are alike should stand together.
        prior, bias: see `LeastSquares.solve`.
        ridges: that are tried, ascending; a single one is taken as it is.

    Raises:
        DataError: see `LeastSquares`.
    """
    shape = prior[0].numel(), len(prior) // groups, groups
    learned, held = LeastSquares(*shape), LeastSquares(*shape)
    first = len(x_rows) if len(ridges) == 1 else len(x_rows) - int(HELD_OUT * len(x_rows))
    learned.update(x_rows[:first], y_rows[:first])
    held.update(x_rows[first:], y_rows[first:])
    ridge = ridges[0] if not held.rows else _best(lambda r: held.error(*learned.solve(prior, r, bias)), ridges)
    return (learned + held).solve(prior, ridge, bias)


def _best(error: Callable[[float], float], ridges: Sequence[float]) -> float:
    """The least error going down from the middle: each look costs a solution."""
    known: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in known:
            known[i] = error(ridges[i]) if 0 <= i < len(ridges) else math.inf
        return known[i]

    place = len(ridges) // 2
    step = -1 if at(place - 1) < at(place) else 1
    while at(place + step) < at(place):
        place += step
    return ridges[place]
