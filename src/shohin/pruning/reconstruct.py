"""Layer-by-layer least squares from what the cut model really feeds a layer to what the original layer gave.

Unlike `compensate`, whose input statistics come from the uncut model, this also corrects the error that earlier layers left
(as ThiNet, Luo et al., 2017, and channel pruning, He et al., 2017, do).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.errors import DataError
from shohin.pruning.compensation import ridge_solve


class LeastSquares:
    """Regression of outputs y on inputs x, streamed in float64: memory ``F**2 + F * O``.

    Args:
        in_features: F, ``K * prod(kernel)`` for a convolution's im2col rows.
        out_features: O.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        self.rows = 0
        self._xx = torch.zeros(in_features, in_features, dtype=torch.float64)
        self._xy = torch.zeros(in_features, out_features, dtype=torch.float64)
        self._x = torch.zeros(in_features, dtype=torch.float64)
        self._y = torch.zeros(out_features, dtype=torch.float64)
        self._yy = torch.zeros(out_features, dtype=torch.float64)

    def update(self, x_rows: Tensor, y_rows: Tensor) -> None:
        """Takes pairs of rows ``[n, F]`` (the cut model's input) and ``[n, O]`` (the original layer's output, bias included).

        Raises:
            DataError: if shapes do not fit or a value is NaN or Inf.
        """
        if x_rows.shape != (len(y_rows), len(self._x)) or y_rows.shape != (len(x_rows), len(self._y)):
            raise DataError(
                f"least squares: expected rows [n, {len(self._x)}] and [n, {len(self._y)}]; got {tuple(x_rows.shape)}, {tuple(y_rows.shape)}"
            )
        x, y = (t.detach().to("cpu", torch.float64) for t in (x_rows, y_rows))
        if not bool(torch.isfinite(x.sum() + y.sum())):
            raise DataError("least squares: a layer's input or output holds NaN or Inf on the calibration data")
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._yy += y.square().sum(0)
        self.rows += len(x)

    def solve(self, prior: Tensor, ridge: float = 1e-3, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """The weights nearest to ``prior`` that explain the outputs: ridge towards the prior, so that little data changes little.

        Args:
            prior: ``[O, F]`` or ``[O, K, *kernel]``: the sliced weights.
            ridge: lambda as a share of the mean variance of the inputs.
            bias: also fit a bias; False for a layer that has none.

        Returns:
            Weights in the shape and dtype of ``prior``, and a bias ``[O]`` or None. On the rows given so far the error is never
            larger than that of ``prior`` with any bias (with no bias, if ``bias`` is False).

        Raises:
            DataError: if nothing was given, or the prior has another shape.
        """
        if not self.rows:
            raise DataError("no calibration data reached this layer: give Data(train=loader) with batches")
        w = prior.detach().to("cpu", torch.float64).reshape(len(prior), -1)
        if w.T.shape != self._xy.shape:
            raise DataError(
                f"least squares: the prior {tuple(prior.shape)} does not fit {self._xy.shape[0]} inputs and {len(self._y)} outputs"
            )
        mean_x, mean_y = self._x / self.rows, self._y / self.rows
        xx, xy = self._xx / self.rows, self._xy / self.rows
        if bias:
            xx, xy = xx - torch.outer(mean_x, mean_x), xy - torch.outer(mean_x, mean_y)
        new = w + ridge_solve(xx, xy - xx @ w.T, ridge).T
        if not bool(torch.isfinite(new).all()):
            raise DataError("least squares gave NaN or Inf: check the calibration data and the weights")
        return new.reshape(prior.shape).to(prior), (mean_y - new @ mean_x).to(prior) if bias else None

    def error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Mean squared error over all rows and outputs of a weight ``[O, F]`` (or ``[O, K, *kernel]``) and bias ``[O]``."""
        w = weight.detach().to("cpu", torch.float64).reshape(len(weight), -1)
        b = torch.zeros(len(w), dtype=torch.float64) if bias is None else bias.detach().to("cpu", torch.float64)
        quadratic = ((w @ self._xx) * w).sum(1) - 2 * (w * self._xy.T).sum(1) + self._yy
        linear = 2 * b * (w @ self._x - self._y) + self.rows * b.square()
        return float((quadratic + linear).clamp_min(0).mean()) / max(self.rows, 1)
