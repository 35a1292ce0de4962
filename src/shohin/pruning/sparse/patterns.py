"""Which elements of a weight may be zero together: single ones, N of M along the input axis, or whole blocks.

A weight ``[O, I, *kernel]`` is read as the matrix ``[O, I * taps]``, taps being the kernel's positions; a vector is one row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shohin.errors import PlanError

_FORMS = "'unstructured 0.5' (share of zeros), '2:4' (2 kept of each 4 inputs) or 'block 1x8 0.5' (rows x columns, share of zeros)"


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros; `parse` and `str` are inverse.

    - ``"unstructured 0.5"``: this share of the elements is zero, wherever they are.
    - ``"2:4"``: of each 4 consecutive input channels at most 2 stay, for each output and at each kernel position (what
      runtimes and tensor cores read; NVIDIA, 2020). The input axis (dimension 1) must be divisible by 4.
    - ``"block 1x8 0.5"``: this share of the blocks of 1 row and 8 columns of the matrix is zero as a whole. Both sides of the
      matrix must be divisible.

    Args:
        kind: "unstructured", "n:m" or "block".
        zeros: share of zeros, in [0, 1).
        kept, of: N and M; 1 and 1 for the other kinds.
        height, width: rows and columns of a block; 1 and 1 for the other kinds.

    Raises:
        PlanError: if a number is out of range.
    """

    kind: Literal["unstructured", "n:m", "block"]
    zeros: float
    kept: int = 1
    of: int = 1
    height: int = 1
    width: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.zeros < 1:
            raise PlanError(f"a pattern's share of zeros lies in [0, 1), so that something stays; got {self.zeros!r}")
        if self.kind == "n:m" and not (1 <= self.kept < self.of and self.zeros == 1 - self.kept / self.of):
            raise PlanError(f"N:M keeps N of each M with 1 <= N < M; got {self.kept}:{self.of}")
        if self.height < 1 or self.width < 1:
            raise PlanError(f"a block has at least one row and one column; got {self.height}x{self.width}")

    @staticmethod
    def unstructured(zeros: float) -> Pattern:
        """Single elements, this share of them zero."""
        return Pattern("unstructured", float(zeros))

    @staticmethod
    def n_m(kept: int, of: int) -> Pattern:
        """``kept`` of each ``of`` inputs."""
        return Pattern("n:m", 1 - kept / of if of else 0.0, kept, of)

    @staticmethod
    def block(height: int, width: int, zeros: float) -> Pattern:
        """Whole blocks, this share of them zero."""
        return Pattern("block", float(zeros), height=height, width=width)

    @staticmethod
    def parse(text: str | Pattern) -> Pattern:
        """The pattern of a string. Raises PlanError that lists the forms."""
        if isinstance(text, Pattern):
            return text
        words = str(text).split()
        try:
            if len(words) == 1 and re.fullmatch(r"\d+:\d+", words[0]):
                kept, of = map(int, words[0].split(":"))
                return Pattern.n_m(kept, of)
            if len(words) == 2 and words[0] == "unstructured":
                return Pattern.unstructured(float(words[1]))
            if len(words) == 3 and words[0] == "block" and re.fullmatch(r"\d+x\d+", words[1]):
                height, width = map(int, words[1].split("x"))
                return Pattern.block(height, width, float(words[2]))
        except ValueError:
            pass
        raise PlanError(f"unknown sparsity pattern {text!r}; write {_FORMS}")

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.kept}:{self.of}"
        return f"unstructured {self.zeros!r}" if self.kind == "unstructured" else f"block {self.height}x{self.width} {self.zeros!r}"

    def misfit(self, shape: Sequence[int]) -> str:
        """Why a weight of this shape cannot have the pattern, or ""."""
        rows, columns = _sides(shape)
        if not rows * columns:
            return "it is empty"
        inputs = shape[1] if len(shape) > 1 else columns
        if self.kind == "n:m" and inputs % self.of:
            return f"its input axis of {inputs} is not divisible by {self.of}"
        if rows % self.height or columns % self.width:
            return f"its matrix {rows} x {columns} is not divisible into blocks {self.height}x{self.width}"
        return ""

    def check(self, shape: Sequence[int], name: str = "the weight") -> None:
        """Raises PlanError if a weight of this shape cannot have the pattern."""
        why = self.misfit(shape)
        if why:
            raise PlanError(f"{name} {tuple(shape)} cannot be {str(self)!r}: {why}; leave it dense or choose another pattern")

    def dropped(self, units: int) -> int:
        """How many of so many units (elements or blocks) are zero: the nearest whole number, and never all."""
        return min(round(self.zeros * units), units - 1)

    def order(self, shape: Sequence[int]) -> Tensor:
        """Columns of the matrix in the order in which units are consecutive: by kernel position, then channel, for N:M."""
        _, columns = _sides(shape)
        at = torch.arange(columns)
        if self.kind != "n:m" or len(shape) < 3:
            return at
        return at.reshape(shape[1], -1).T.reshape(-1)

    def select(self, scores: Tensor, *, per_row: bool = False) -> Tensor:
        """What stays: the units with the largest sums of scores.

        Args:
            scores: one for each element, in the shape of the weight.
            per_row: the same number of units stays in each output row (in each row of blocks), up to one more or less; of N:M this is so
                anyway.

        Returns:
            Boolean mask of the same shape, True for what stays. Of equal scores the earlier element goes.

        Raises:
            PlanError: if the shape does not fit or a score is NaN.
        """
        self.check(scores.shape)
        if bool(scores.isnan().any()):
            raise PlanError("a score of an element is NaN: look for NaN in the weights or the data")
        matrix = scores.detach().reshape(_sides(scores.shape))
        order = self.order(scores.shape).to(matrix.device)
        mask = torch.empty_like(matrix, dtype=torch.bool)
        mask[:, order] = spread(self._choose(self.pooled(matrix[:, order]), per_row), self)
        return mask.reshape(scores.shape)

    def pooled(self, matrix: Tensor) -> Tensor:
        """Sums over the units of a matrix in `order`: ``[..., O / height, F / width]``."""
        if self.height == self.width == 1:
            return matrix
        parted = torch.unflatten(torch.unflatten(matrix, -1, (-1, self.width)), -3, (-1, self.height))
        return parted.sum((-3, -1))

    def _choose(self, units: Tensor, per_row: bool) -> Tensor:
        if self.kind == "n:m":
            return keep_largest(torch.unflatten(units, 1, (-1, self.of)), self.kept).flatten(1)
        if not per_row:
            return keep_largest(units.flatten(), units.numel() - self.dropped(units.numel())).reshape(units.shape)
        rows, total = len(units), self.dropped(units.numel())
        ends = [round((i + 1) * total / rows) for i in range(rows)]
        counts = torch.tensor([b - a for a, b in zip([0, *ends], ends, strict=False)])
        return ranks(units) >= counts.to(units.device).unsqueeze(1)

    def holds(self, weight: Tensor) -> bool:
        """True if the weight's zeros have this pattern: at least so many zeros, or in every group."""
        if self.misfit(weight.shape):
            return False
        matrix = (weight.detach() != 0).reshape(_sides(weight.shape))
        matrix = matrix[:, self.order(weight.shape).to(matrix.device)]
        if self.kind == "n:m":
            return bool((torch.unflatten(matrix, 1, (-1, self.of)).sum(-1) <= self.kept).all())
        units = self.pooled(matrix.to(torch.int32)) > 0
        return int((~units).sum()) >= self.dropped(units.numel())


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def spread(units: Tensor, pattern: Pattern) -> Tensor:
    """A mask of units as a mask of elements."""
    return units.repeat_interleave(pattern.height, -2).repeat_interleave(pattern.width, -1)


def ranks(scores: Tensor) -> Tensor:
    """The place of each score along the last axis, 0 the smallest; equal ones in order."""
    places = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.empty_like(scores, dtype=torch.int64).scatter_(-1, scores.argsort(dim=-1, stable=True), places)


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest scores along the last axis; of equal ones the later stay."""
    order = scores.argsort(dim=-1, stable=True)[..., scores.shape[-1] - count :]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
