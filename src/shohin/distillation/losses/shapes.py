"""What losses ask of shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from shohin.errors import DataError


class TooFew(DataError):
    """A batch has fewer samples than a loss that compares them with each other needs."""


def same(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    """Raises DataError unless both have one shape that is not empty, and the temperature is above 0."""
    if student.shape != teacher.shape:
        raise DataError(
            f"student and teacher give other shapes: {tuple(student.shape)} and {tuple(teacher.shape)}{_hint(student, teacher)}"
        )
    if not student.numel():
        raise DataError(f"the batch is empty: the outputs have shape {tuple(student.shape)}")
    if not temperature > 0:
        raise DataError(f"temperature must be > 0; got {temperature}")


def several(scores: Tensor, dim: int) -> None:
    """Raises DataError unless there are two classes or more at ``dim``: the distribution over a single one is always the same."""
    if scores.dim() < 2 or scores.shape[dim] < 2:
        raise DataError(
            f"class scores [N, C] with two classes or more are compared; got {tuple(scores.shape)}: use 'mse' or 'regression' for numbers, "
            "'multi_label' for a single score of yes or no"
        )


def dense_axis(answers: Tensor) -> int:
    """Where classes are by torch's convention, if labels do not tell: axis 1 of ``[N, C, H, W]`` and more axes, else the last."""
    return 1 if answers.dim() >= 4 else -1


def _hint(student: Tensor, teacher: Tensor) -> str:
    if student.dim() == teacher.dim() and student.shape[:-1] == teacher.shape[:-1]:
        return (
            f": the last axis holds {student.shape[-1]} classes (or words, or features) in the student and {teacher.shape[-1]} in the "
            "teacher; give both the same, or compare features instead (they may differ in width)"
        )
    return ""


def rows(student: Tensor, teacher: Tensor, least: int = 1) -> None:
    """Raises DataError unless both have as many samples (axis 0), at least ``least``."""
    if student.dim() < 1 or teacher.dim() < 1 or len(student) != len(teacher):
        raise DataError(f"student and teacher hold other numbers of samples: shapes {tuple(student.shape)} and {tuple(teacher.shape)}")
    if len(student) < least:
        raise TooFew(f"this loss compares samples of a batch with each other: it needs {least} or more, got {len(student)}")


def pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """``[N, C, *space]`` averaged (or, where it is smaller, repeated) to another space of the same rank."""
    pool: Callable[[Tensor, Any], Tensor] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    return pool(x, tuple(size))
