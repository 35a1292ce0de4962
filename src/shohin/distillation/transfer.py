"""Distillation in the one training loop: a student learns the teacher's answers, its features, and the task if there are labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shohin.data import Call, Data, first_output
from shohin.distillation.features import FeatureTap, check_taps, feature_loss, recorded
from shohin.distillation.losses import dist, dkd, kd, logits_mse
from shohin.distillation.teacher import Teacher
from shohin.errors import DataError
from shohin.training import Objective, TrainConfig, TrainResult, train

LogitLoss = Literal["kd", "dkd", "dist", "mse"]

RECOVERY = TrainConfig(epochs=5, lr=2e-3, weight_decay=1e-4, warmup=0.1, clip=5.0)
"""A short recovery of a cut network on a CPU: AdamW, cosine."""


def distillation_objective(
    teacher: nn.Module | Teacher,
    *,
    loss: LogitLoss = "kd",
    temperature: float = 2.0,
    alpha: float = 0.0,
    task_loss: Callable[[Any, Call], Tensor] | None = None,
    feature_weight: float = 0.0,
    taps: Sequence[FeatureTap] = (),
    dim: int = -1,
) -> Objective:
    """``alpha * task + (1 - alpha) * logits + feature_weight * features`` as an objective of `shohin.training.train`.

    Args:
        teacher: the model to learn from (its answers are remembered, see `Teacher`), or a `Teacher`.
        loss: between logits: "kd", "dkd", "dist" or "mse" (see `shohin.distillation.losses`).
        temperature: of the logits.
        alpha: weight of the task's loss in [0, 1]; 0 needs no labels.
        task_loss: ``(outputs, call) -> scalar``; `Data.batch_loss`. Needed if ``alpha`` > 0.
        feature_weight: of `feature_loss` over ``taps``.
        taps: modules that are compared.
        dim: class dimension of the logits for "kd".

    Raises:
        DataError: if the weights contradict each other.
    """
    if not 0 <= alpha <= 1 or feature_weight < 0:
        raise DataError(f"alpha must be in [0, 1] and feature_weight >= 0; got {alpha} and {feature_weight}")
    if alpha > 0 and task_loss is None:
        raise DataError("alpha > 0 asks for the task's loss: give task_loss=data.batch_loss, or alpha=0 for unlabelled data")
    if feature_weight > 0 and not taps:
        raise DataError("feature_weight > 0 needs taps=[FeatureTap(module, kept), ...]")
    if loss not in ("kd", "dkd", "dist", "mse"):
        raise DataError(f"unknown distillation loss {loss!r}; known: 'kd', 'dkd', 'dist', 'mse'")
    if not temperature > 0:
        raise DataError(f"temperature must be > 0; got {temperature}")
    used = tuple(taps) if feature_weight > 0 else ()
    expert = teacher if isinstance(teacher, Teacher) else Teacher(teacher, [tap.teacher_module for tap in used])
    checked: set[int] = set()

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if used and id(model) not in checked:
            check_taps(model, expert.model, used)
            checked.add(id(model))
        with recorded(model, [tap.module for tap in used]) as features:
            outputs = model(*call.args, **call.kwargs)
        terms: dict[str, Tensor] = {}
        weights: dict[str, float] = {"task": alpha, loss: 1 - alpha, "features": feature_weight}
        if alpha < 1 or used:
            logits, known = expert(call)
            if alpha < 1:
                terms[loss] = _between(loss, first_output(outputs), logits, call, temperature, dim)
            if used:
                terms["features"] = feature_loss(features, known, used)
        if alpha > 0 and task_loss is not None:
            terms["task"] = task_loss(outputs, call)
        total = torch.stack([weights[name] * value.reshape(()) for name, value in terms.items()]).sum()
        return total, {name: value.item() for name, value in terms.items()}

    return objective


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    config: TrainConfig = RECOVERY,
    loss: LogitLoss = "kd",
    temperature: float = 2.0,
    alpha: float = 0.0,
    feature_weight: float = 0.0,
    taps: Sequence[FeatureTap] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    lower_is_better: bool | None = None,
    checkpoint: Path | None = None,
    deadline: float | None = None,
    progress: bool = False,
) -> TrainResult:
    """Trains ``student`` in place to answer as ``teacher`` does, and leaves its best state in it.

    Args:
        student: any module with the teacher's signature.
        teacher: left as it is.
        data: batches; labels are needed only if ``alpha`` > 0.
        config: default `RECOVERY`.
        loss, temperature, alpha, feature_weight, taps: see `distillation_objective`.
        evaluate, lower_is_better: default the quality of ``data`` if it has a metric or integer targets; otherwise the
            student's `divergence` from the teacher on validation, smaller being better.
        checkpoint, deadline, progress: see `shohin.training.train`.

    Raises:
        DataError: if ``alpha`` > 0 without labels, or the loss becomes NaN or Inf.
        ModelError: if a tap names no module, or features do not fit.
    """
    if alpha > 0 and not data.has_labels:
        raise DataError("alpha > 0 asks for labels, and the batches have none; use alpha=0 or Data(loss=...)")
    if feature_weight > 0:
        check_taps(student, teacher, taps)
    memory = 0 if config.augment is not None else 256 << 20
    expert = Teacher(teacher, [tap.teacher_module for tap in taps] if feature_weight > 0 else (), memory)
    objective = distillation_objective(
        expert,
        loss=loss,
        temperature=temperature,
        alpha=alpha,
        task_loss=data.batch_loss if alpha > 0 else None,
        feature_weight=feature_weight,
        taps=taps,
    )
    if evaluate is None:
        if _has_quality(data):
            evaluate = data.quality
        else:
            watcher, lower_is_better = Teacher(teacher), True

            def evaluate(model: nn.Module) -> float:
                return divergence(model, watcher, data)

    return train(
        student,
        data,
        objective,
        config,
        checkpoint=checkpoint,
        evaluate=evaluate,
        lower_is_better=lower_is_better,
        deadline=deadline,
        progress=progress,
    )


def divergence(student: nn.Module, teacher: nn.Module | Teacher, data: Data, split: str = "validation") -> float:
    """Mean over the samples of a split of ``KL(teacher || student)`` of their answers, in nats."""
    expert = teacher if isinstance(teacher, Teacher) else Teacher(teacher, cache_bytes=0)
    total, samples = 0.0, 0
    with torch.no_grad():
        for call in data.calls(split):
            total += kd(first_output(student(*call.args, **call.kwargs)), expert(call)[0], 1.0).item() * call.size
            samples += call.size
    return total / samples


def _has_quality(data: Data) -> bool:
    if data.metric is not None:
        return True
    target = next(data.calls("validation")).target
    return isinstance(target, Tensor) and not target.is_floating_point()


def _between(loss: str, student: Tensor, teacher: Tensor, call: Call, temperature: float, dim: int) -> Tensor:
    if loss == "kd":
        return kd(student, teacher, temperature, dim)
    if loss == "mse":
        return logits_mse(student, teacher)
    if loss == "dist":
        return dist(student, teacher, temperature)
    labelled = isinstance(call.target, Tensor) and not call.target.is_floating_point() and call.target.dim() == 1
    return dkd(student, teacher, call.target if labelled else None, temperature)
