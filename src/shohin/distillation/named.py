"""Losses between answers that can be asked for by name, and what of a batch counts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shohin.data import IGNORED, Call, class_axis
from shohin.distillation import losses
from shohin.distillation.losses.shapes import dense_axis, same

#: what answers are: scores of classes that exclude each other, scores of labels that do not, or numbers (vectors too)
Answers = Literal["classes", "labels", "numbers"]


@dataclass(frozen=True)
class Named:
    """A loss.

    Args:
        answers: what it takes them for.
        between: ``(student, teacher, call, temperature, class dimension or None) -> scalar``.
    """

    answers: Answers
    between: Callable[[Tensor, Tensor, Call, float, int | None], Tensor]


def classes_at(answers: Tensor, call: Call) -> int:
    """The class dimension of answers: where the labels' shape says, else by convention."""
    axis = class_axis(answers, call)
    return dense_axis(answers) if axis is None else axis


def counting(call: Call, logits: Tensor) -> Tensor | None:
    """Which words count: those with a label that is not -100, else those of the attention mask. None: all, or these are no words."""
    target = call.target
    if isinstance(target, Tensor) and target.shape == logits.shape[:-1] and not target.is_floating_point():
        return target != IGNORED
    mask = call.kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1] else None


def nothing(student: Tensor) -> Tensor:
    """The loss of a batch in which nothing counts: 0, with a gradient of zeros."""
    return (student * 0).sum()


def _kd(student: Tensor, teacher: Tensor, call: Call, temperature: float, dim: int | None) -> Tensor:
    same(student, teacher, temperature)
    axis = classes_at(student, call) if dim is None else dim
    mask = counting(call, student) if student.dim() > 2 and axis in (-1, student.dim() - 1) else None
    if mask is not None:
        if not bool(mask.any()):
            return nothing(student)
        student, teacher = student[mask], teacher[mask]
    return losses.kd(student, teacher, temperature, axis)


def _dkd(student: Tensor, teacher: Tensor, call: Call, temperature: float, dim: int | None) -> Tensor:
    target = call.target
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() != 1:
        return losses.dkd(student, teacher, None, temperature)
    known = torch.where(target == IGNORED, teacher.argmax(-1), target)  # the teacher knows a class where nobody else does
    return losses.dkd(student, teacher, known, temperature)


def _regression(student: Tensor, teacher: Tensor, call: Call, temperature: float, dim: int | None) -> Tensor:
    target = call.target
    fits = isinstance(target, Tensor) and target.is_floating_point() and target.numel() == student.numel()
    return losses.bounded_regression(student, teacher, target.reshape(student.shape) if fits else None)


def _tokens(student: Tensor, teacher: Tensor, call: Call, temperature: float, dim: int | None) -> Tensor:
    same(student, teacher, temperature)
    mask = counting(call, student)
    return nothing(student) if mask is not None and not bool(mask.any()) else losses.tokens(student, teacher, mask, temperature)


NAMED: dict[str, Named] = {
    "kd": Named("classes", _kd),
    "dkd": Named("classes", _dkd),
    "dist": Named("classes", lambda s, t, call, temperature, dim: losses.dist(s, t, temperature)),
    "mse": Named("numbers", lambda s, t, call, temperature, dim: losses.logits_mse(s, t)),
    "multi_label": Named("labels", lambda s, t, call, temperature, dim: losses.multi_label(s, t, temperature)),
    "regression": Named("numbers", _regression),
    "tokens": Named("classes", _tokens),
    "embeddings": Named("numbers", lambda s, t, call, temperature, dim: losses.embeddings(s, t)),
    "cosine": Named("numbers", lambda s, t, call, temperature, dim: losses.cosine_embedding(s, t)),
}
