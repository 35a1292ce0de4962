"""Second moments of layer inputs: the Gram matrix that compensation, OBS and GPTQ share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.errors import DataError
from shohin.evidence.rows import Window, conv_rows, linear_rows


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a layer's input rows x, in float64.

    Args:
        second: ``E[x x^T]``, ``[G, F, F]`` for G groups of F features (``C / groups * prod(kernel)``).
        mean: ``E[x]``, ``[G, F]``.
        rows: how many rows they are means of.
    """

    second: Tensor
    mean: Tensor
    rows: int

    @property
    def covariance(self) -> Tensor:
        """``E[(x - mean)(x - mean)^T]``, ``[G, F, F]``."""
        return self.second - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)


class GramAccumulator:
    """Sums ``x x^T`` and ``x`` of a layer's input in float64, over batches, in memory of one Gram matrix.

    Args:
        features: input features of the layer: ``in_features``, or ``C * prod(kernel)`` with C all input channels.
        max_rows: at most this many rows of each update, at random positions; bounds its cost by
            ``max_rows * features**2 / groups`` multiplications. None takes all.
        groups: of a grouped convolution.
        seed: of the positions.
    """

    def __init__(self, features: int, max_rows: int | None = 4096, *, groups: int = 1, seed: int = 0) -> None:
        if features % groups:
            raise DataError(f"{features} features cannot be split into {groups} groups")
        self.features, self.groups, self.max_rows, self.rows = features, groups, max_rows, 0
        size = features // groups
        self.gram = torch.zeros(groups, size, size, dtype=torch.float64)
        self.total = torch.zeros(groups, size, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor, window: Window | None = None) -> None:
        """Takes one input of the layer.

        Args:
            x: ``[..., features]`` of a linear layer, or ``[N, C, *spatial]`` of a convolution.
            window: the convolution's geometry; None for a linear layer.

        Raises:
            DataError: if the shape does not fit, or ``x`` holds NaN or Inf.
        """
        x = x.detach()
        if window is None:
            rows = linear_rows(x, self.max_rows, self._generator)[0]
        else:
            rows = conv_rows(x, window, self.max_rows, self._generator)[0]
        self.update_rows(rows)

    def update_rows(self, rows: Tensor) -> None:
        """Takes rows ``[n, features]`` as they are, all of them. Raises DataError as `update` does."""
        if rows.dim() != 2 or rows.shape[1] != self.features:
            raise DataError(f"expected rows of {self.features} features; got a tensor {tuple(rows.shape)}")
        x = rows.detach().to("cpu", torch.float64).reshape(len(rows), self.groups, -1).transpose(0, 1)
        total = x.sum(1)
        if not bool(torch.isfinite(total).all()):
            raise DataError("the input of a layer holds NaN or Inf on the calibration data: check the data and the model")
        self.gram.baddbmm_(x.transpose(1, 2), x)
        self.total += total
        self.rows += len(rows)

    def moments(self) -> Moments:
        """The means so far. Raises DataError before the first update."""
        if not self.rows:
            raise DataError("no calibration data reached this layer: give Data(train=loader) with batches")
        return Moments(self.gram / self.rows, self.total / self.rows, self.rows)
