"""Several teachers as one, and students that teach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shohin.data import Data, first_output
from shohin.distillation.losses.shapes import dense_axis
from shohin.errors import DataError, ModelError
from shohin.training import TrainResult


class Ensemble(nn.Module):
    """Teachers whose probabilities are averaged: a teacher for every verb, whose answers are log probabilities.

    Args:
        teachers: with one signature and the same classes.
        weights: "equal"; "confidence": each sample listens more to teachers with less entropy (weights ``1 - H / log C``, normalized;
            after Zhang et al., 2022, 2201.00007, without its labels); or one number for each teacher.
        dim: the class axis of their answers; None: 1 for ``[N, C, H, W]`` and more axes, else the last.
    """

    def __init__(
        self, teachers: Sequence[nn.Module], weights: Literal["equal", "confidence"] | Sequence[float] = "equal", dim: int | None = None
    ) -> None:
        super().__init__()
        if not teachers:
            raise ModelError("an ensemble needs a teacher")
        for teacher in teachers if isinstance(teachers, Iterable) and not isinstance(teachers, str) else [teachers]:
            if not isinstance(teacher, nn.Module):
                raise ModelError(f"a teacher is a torch.nn.Module, or a sequence of them; got {type(teacher).__name__}")
        if not isinstance(weights, str) and (len(weights) != len(teachers) or min(weights) < 0 or sum(weights) <= 0):
            raise DataError(f"weights must be {len(teachers)} numbers >= 0 that are not all 0; got {list(weights)}")
        if isinstance(weights, str) and weights not in ("equal", "confidence"):
            raise DataError(f"weights={weights!r} is not known; 'equal', 'confidence' or one number for each teacher")
        self.teachers = nn.ModuleList(teachers)
        self.weights, self.dim = weights, dim

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log of the averaged probabilities, of the shape of one teacher's logits. Raises ModelError if shapes differ."""
        logits = [first_output(teacher(*args, **kwargs)) for teacher in self.teachers]
        shapes = {tuple(x.shape) for x in logits}
        if len(shapes) > 1:
            raise ModelError(f"the teachers give other shapes: {sorted(shapes)}; an ensemble needs the same classes")
        dim = self.dim if self.dim is not None else dense_axis(logits[0])
        log_p = torch.stack([x.log_softmax(dim) for x in logits])
        return torch.logsumexp(log_p + self._shares(log_p, dim if dim < 0 else dim + 1), 0)

    def _shares(self, log_p: Tensor, axis: int) -> Tensor:
        """Log weights ``[teachers, ...]`` with size 1 along the classes."""
        if self.weights == "confidence":
            entropy = -(log_p.exp() * log_p).sum(axis, keepdim=True)
            sure = (1 - entropy / torch.log(torch.tensor(float(log_p.shape[axis])))).clamp(min=1e-6)
            return (sure / sure.sum(0)).log()
        numbers = [1.0] * len(self.teachers) if isinstance(self.weights, str) else list(self.weights)
        shares = torch.tensor(numbers, dtype=log_p.dtype, device=log_p.device)
        return (shares / shares.sum()).log().reshape(-1, *[1] * (log_p.dim() - 1))


Distill = Callable[[nn.Module, nn.Module, Data], TrainResult]


def assistants(students: Sequence[nn.Module], teacher: nn.Module, data: Data, distill: Distill) -> list[TrainResult]:
    """A chain of teacher assistants (Mirzadeh et al., 2020, 1902.03393): each model learns from the one before it.

    Args:
        students: in falling size; the last one is what is wanted. Trained in place.
        distill: ``(student, teacher, data) -> TrainResult``, such as `shohin.distillation.distill` with its settings filled in.

    Returns:
        One result for each student.
    """
    results = []
    for student in students:
        results.append(distill(student, teacher, data))
        teacher = student
    return results


def born_again(
    make: Callable[[int], nn.Module], teacher: nn.Module, data: Data, distill: Distill, generations: int = 3
) -> tuple[list[nn.Module], list[TrainResult]]:
    """Born-again networks (Furlanello et al., 2018, 1805.04770): fresh students of one architecture, each taught by the one before.
    With ``make`` giving the teacher's own architecture this is self-distillation. ``Ensemble(students)`` is the paper's ensemble.

    Args:
        make: ``generation -> a fresh student``.
        generations: at least 1.

    Returns:
        (students, results), one for each generation.
    """
    if generations < 1:
        raise DataError(f"generations must be 1 or more; got {generations}")
    students = [make(i) for i in range(generations)]
    return students, assistants(students, teacher, data, distill)
