"""Distillation in the one training loop: a student learns the teacher's answers, its features, and the task if there are labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shohin.data import Call, Data, first_output
from shohin.distillation.adapters import Adapted, adapters_for
from shohin.distillation.dot import make_dot, two_losses
from shohin.distillation.features import FeatureTap, check_taps, recorded
from shohin.distillation.loss import Between, Mix, classes_at, watches
from shohin.distillation.losses import kd
from shohin.distillation.teacher import Teacher
from shohin.errors import DataError
from shohin.training import Objective, TrainConfig, TrainResult, train

RECOVERY = TrainConfig(epochs=5, lr=2e-3, weight_decay=1e-4, warmup=0.1, clip=5.0)
"""A short recovery of a cut network on a CPU: AdamW, cosine."""

LABELS, FEATURES = 0.2, 0.2
"""Weights of the task's loss and of features beside the teacher's answers, where there are labels and matched features."""


def distillation_objective(teacher: nn.Module | Teacher, *, mix: Mix | None = None, apart: bool = False, **fields: Any) -> Objective:
    """A `Mix` as an objective of `shohin.training.train`.

    Args:
        teacher: the model to learn from (its answers are remembered, see `Teacher`), or a `Teacher`.
        mix: see there; its fields can be given as keywords instead.
        apart: the loss has shape ``[2]`` (task, teacher), for `Dot`; needs 0 < ``alpha`` < 1.

    Raises:
        DataError: if the weights contradict each other.
    """
    mix = Mix.of(mix, fields)
    if apart and not 0 < mix.alpha < 1:
        raise DataError(f"the losses of the task and of the teacher apart (for Dot) need 0 < alpha < 1; got alpha={mix.alpha}")
    used = mix.used
    expert = teacher if isinstance(teacher, Teacher) else Teacher(teacher, [tap.teacher_module for tap in used])
    checked: set[int] = set()

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        student = model.student if isinstance(model, Adapted) else model
        if used and id(student) not in checked:
            check_taps(student, expert.model, used)
            checked.add(id(student))
        with recorded(student, [tap.module for tap in used]) as features:
            outputs = student(*call.args, **call.kwargs)
        adapters = model.by_name() if isinstance(model, Adapted) else {}
        return two_losses(mix, outputs, features, call, expert, adapters) if apart else mix(outputs, features, call, expert, adapters)

    return objective


def distill(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    data: Data,
    *,
    config: TrainConfig = RECOVERY,
    loss: str | Between = "kd",
    temperature: float = 2.0,
    alpha: float = 0.0,
    feature_weight: float = 0.0,
    taps: Sequence[FeatureTap] = (),
    dot: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    lower_is_better: bool | None = None,
    checkpoint: Path | None = None,
    deadline: float | None = None,
    progress: bool = False,
    **training: Any,
) -> TrainResult:
    """Trains ``student`` in place to answer as ``teacher`` does, and leaves its best state in it.

    Args:
        student: any module with the teacher's signature.
        teacher: left as it is; an `Ensemble` of several; a `Teacher` that remembers on disk or runs in a faster form.
        data: batches; labels are needed only if ``alpha`` > 0.
        config: default `RECOVERY`.
        loss, temperature, alpha, feature_weight, taps: see `Mix`. Taps whose features differ in width get adapters, which train along
            and are gone afterwards.
        dot: ``delta`` of `Dot`: the teacher's gradient takes ``config.momentum + dot``, the task's ``config.momentum - dot``, for two
            backward passes a step. Needs a ``config`` with SGD, and 0 < ``alpha`` < 1.
        evaluate, lower_is_better: default the quality of ``data`` if it has a metric or integer targets; otherwise the
            student's `divergence` from the teacher on validation, smaller being better.
        checkpoint, deadline, progress, training: see `shohin.training.train`.

    Raises:
        DataError: if ``alpha`` > 0 without labels, answers have other shapes, or the loss becomes NaN or Inf.
        ModelError: if a tap names no module, or features do not fit.
    """
    if alpha > 0 and not data.has_labels:
        raise DataError("alpha > 0 asks for labels, and the batches have none; use alpha=0 or Data(loss=...)")
    mix = Mix(loss, temperature, alpha, data.batch_loss if alpha > 0 else None, feature_weight, tuple(taps))
    model = teacher.model if isinstance(teacher, Teacher) else teacher
    check_taps(student, model, mix.used)
    expert = teacher if isinstance(teacher, Teacher) else Teacher(teacher, [t.teacher_module for t in mix.used], _memory(config))
    watches(expert, mix.used)
    learner = student
    if mix.used:
        adapters = adapters_for(student, model, mix.used, next(data.calls("train")), config.seed)
        learner = Adapted(student, adapters) if adapters else student
    if evaluate is None:
        if _has_quality(data):
            evaluate = data.quality
        else:
            watcher, lower_is_better = Teacher(model), True

            def evaluate(model: nn.Module) -> float:
                return divergence(model, watcher, data)

    if dot is not None:
        if training.get("optimizer") is not None:
            raise DataError("give dot=..., which is an optimizer, or optimizer=..., not both")
        training["optimizer"] = make_dot(config, dot, learner is not student)
    judge = evaluate
    result = train(
        learner,
        data,
        distillation_objective(expert, mix=mix, apart=dot is not None),
        config,
        checkpoint=checkpoint,
        evaluate=lambda m: judge(m.student if isinstance(m, Adapted) else m),
        lower_is_better=lower_is_better,
        deadline=deadline,
        progress=progress,
        **training,
    )
    if learner is student:
        return result
    own = {name.removeprefix("student."): t for name, t in result.state.items() if name.startswith("student.")}
    return replace(result, state=own)


def _memory(config: TrainConfig) -> int:
    """Bytes for remembered answers: none where no batch comes again."""
    return 256 << 20 if config.augment is None or config.replay is not None else 0


def divergence(student: nn.Module, teacher: nn.Module | Teacher, data: Data, split: str = "validation") -> float:
    """Mean over the samples of a split of ``KL(teacher || student)`` of their answers, in nats."""
    expert = teacher if isinstance(teacher, Teacher) else Teacher(teacher, cache_bytes=0)
    total, samples = 0.0, 0
    with torch.no_grad():
        for call in data.calls(split):
            known = expert(call)[0]
            total += kd(first_output(student(*call.args, **call.kwargs)), known, 1.0, classes_at(known, call)).item() * call.size
            samples += call.size
    return total / samples


def _has_quality(data: Data) -> bool:
    if data.metric is not None:
        return True
    target = next(data.calls("validation")).target
    return isinstance(target, Tensor) and not target.is_floating_point()
