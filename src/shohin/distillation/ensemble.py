"""Several teachers as one, and students that teach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.candidate import Candidate
from shohin.data import Data, first_output
from shohin.distillation.losses.shapes import dense_axis
from shohin.distillation.named import Answers
from shohin.errors import DataError, ModelError
from shohin.training import TrainResult


class Ensemble(nn.Module):
    """Teachers whose answers are averaged: a teacher for every verb.

    Args:
        teachers: with one signature and the same classes.
        weights: "equal"; "confidence": each sample listens more to teachers with less entropy (weights ``1 - H / log C``, normalized;
            after Zhang et al., 2022, 2201.00007, without its labels); or one number for each teacher.
        dim: the class axis of their answers; None: 1 for ``[N, C, H, W]`` and more axes, else the last.
        answers: what they are. "classes": probabilities are averaged, and given as their logarithms; "labels": the probability of each
            label is, and given as its logit; "numbers": the answers themselves are (vectors, values).
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        weights: Literal["equal", "confidence"] | Sequence[float] = "equal",
        dim: int | None = None,
        answers: Answers = "classes",
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
        if answers not in get_args(Answers):
            raise DataError(f"answers={answers!r} is not known; one of {', '.join(map(repr, get_args(Answers)))}")
        if weights == "confidence" and answers != "classes":
            raise DataError(f"weights='confidence' looks at the entropy of classes; answers={answers!r} have none")
        self.teachers = nn.ModuleList(teachers)
        self.weights, self.dim, self.answers = weights, dim, answers

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The average, of the shape of one teacher's answers. Raises ModelError if shapes differ."""
        logits = [first_output(teacher(*args, **kwargs)) for teacher in self.teachers]
        shapes = {tuple(x.shape) for x in logits}
        if len(shapes) > 1:
            raise ModelError(f"the teachers give other shapes: {sorted(shapes)}; an ensemble needs the same classes")
        if self.answers == "numbers":
            together = torch.stack(logits)
            return (together * self._given(together).exp()).sum(0)
        if self.answers == "labels":
            together = torch.stack(logits)
            shares = self._given(together)
            yes, no = (torch.logsumexp(F.logsigmoid(x) + shares, 0) for x in (together, -together))
            return yes - no
        dim = self.dim if self.dim is not None else dense_axis(logits[0])
        log_p = torch.stack([x.log_softmax(dim) for x in logits])
        return torch.logsumexp(log_p + self._shares(log_p, dim if dim < 0 else dim + 1), 0)

    def _shares(self, log_p: Tensor, axis: int) -> Tensor:
        """Log weights ``[teachers, ...]`` with size 1 along the classes."""
        if self.weights == "confidence":
            entropy = -(log_p.exp() * log_p).sum(axis, keepdim=True)
            sure = (1 - entropy / torch.log(torch.tensor(float(log_p.shape[axis])))).clamp(min=1e-6)
            return (sure / sure.sum(0)).log()
        return self._given(log_p)

    def _given(self, stacked: Tensor) -> Tensor:
        """Log weights ``[teachers, 1...]`` for answers ``[teachers, ...]``."""
        numbers = [1.0] * len(self.teachers) if isinstance(self.weights, str) else list(self.weights)
        shares = torch.tensor(numbers, dtype=stacked.dtype, device=stacked.device)
        return (shares / shares.sum()).log().reshape(-1, *[1] * (stacked.dim() - 1))


Distill = Callable[[nn.Module, nn.Module, Data], TrainResult | Candidate]


def assistants(students: Sequence[nn.Module], teacher: nn.Module, data: Data, distill: Distill) -> list[TrainResult | Candidate]:
    """A chain of teacher assistants (Mirzadeh et al., 2020, 1902.03393): each model learns from the one before it.

    Args:
        students: in falling size; the last one is what is wanted.
        distill: ``(student, teacher, data) -> TrainResult``, such as `shohin.distillation.distill` with its settings filled in, which
            trains the student in place; or ``-> Candidate``, such as `shohin.distill`, which leaves it as it is: ``.model`` is what
            teaches the next one then.

    Returns:
        One result for each student.
    """
    results = []
    for student in students:
        results.append(distill(student, teacher, data))
        teacher = _trained(student, results[-1])
    return results


def _trained(student: nn.Module, result: TrainResult | Candidate) -> nn.Module:
    """What a student has become. Raises DataError for a result that does not tell."""
    if isinstance(result, TrainResult):
        return student
    if isinstance(result, Candidate) and result.model is not None:
        return result.model
    raise DataError(f"distill must return a TrainResult, or a Candidate with its model; got {type(result).__name__}")


def born_again(
    make: Callable[[int], nn.Module], teacher: nn.Module, data: Data, distill: Distill, generations: int = 3
) -> tuple[list[nn.Module], list[TrainResult | Candidate]]:
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
    results = assistants(students, teacher, data, distill)
    return [_trained(s, r) for s, r in zip(students, results, strict=True)], results
