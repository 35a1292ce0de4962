"""Distillation in the one training loop: a student learns the teacher's answers, its features, and the task if there are labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shohin.data import Call, Data, first_output
from shohin.distillation.adapters import Adapted, adapters_for
from shohin.distillation.dot import make_dot, two_losses
from shohin.distillation.features import FeatureTap, check_taps, recorded
from shohin.distillation.loss import Between, Mix, suits, watches
from shohin.distillation.losses.shapes import TooFew
from shohin.distillation.teacher import Teacher
from shohin.errors import DataError
from shohin.training import Objective, TrainConfig, TrainResult, train
from shohin.training.randomness import generators_of, isolated
from shohin.training.state import live_state, norm_of

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
    method: Mapping[str, Any] | None = None,
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
            student's `disagreement` with the teacher on validation: the loss that it is trained with, smaller being better.
        checkpoint, deadline, progress, training: see `shohin.training.train`.
        method: what else a training that resumes must share, by name; JSON-able.

    Raises:
        DataError: if ``alpha`` > 0 without labels, answers have other shapes, or the loss becomes NaN or Inf.
        ModelError: if a tap names no module, or features do not fit.
    """
    with isolated(generators_of(data.train, data.validation)):  # looking at a first batch draws from them
        labels, has_quality = data.has_labels, _has_quality(data)
        first = next(data.calls("train"))
    if alpha > 0 and not labels:
        raise DataError("alpha > 0 asks for labels, and the batches have none; use alpha=0 or Data(loss=...)")
    mix = Mix(loss, temperature, alpha, data.batch_loss if alpha > 0 else None, feature_weight, tuple(taps))
    model = teacher.model if isinstance(teacher, Teacher) else teacher
    suits(model, mix)
    check_taps(student, model, mix.used)
    expert = teacher if isinstance(teacher, Teacher) else Teacher(teacher, [t.teacher_module for t in mix.used], _memory(config))
    watches(expert, mix.used)
    learner = student
    if mix.used:
        adapters = adapters_for(student, model, mix.used, first, config.seed)
        learner = Adapted(student, adapters) if adapters else student
    if evaluate is None:
        if has_quality:
            evaluate = data.quality
        else:
            watcher, lower_is_better = Teacher(model), True

            def evaluate(model: nn.Module) -> float:
                return disagreement(model, watcher, data, mix)

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
        method=None if checkpoint is None else {**_method(mix, model), **(method or {})},
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
    return disagreement(student, teacher, data, Mix(temperature=1.0), split)


def disagreement(student: nn.Module, teacher: nn.Module | Teacher, data: Data, mix: Mix, split: str = "validation") -> float:
    """Mean over the samples of a split of the loss between answers, or of the task's where the teacher has no weight.

    Batches of too few samples for the loss do not count.

    Raises:
        DataError: if no batch counts, or answers do not fit the loss.
    """
    expert = teacher if isinstance(teacher, Teacher) else Teacher(teacher, cache_bytes=0)
    total, samples, small = 0.0, 0, ""
    with torch.no_grad():
        for call in data.calls(split):
            outputs = student(*call.args, **call.kwargs)
            try:
                if mix.alpha == 1 and mix.task_loss is not None:
                    value = mix.task_loss(outputs, call)
                else:
                    value = mix.between(first_output(outputs), expert(call)[0], call)
            except TooFew as error:
                small = str(error)
                continue
            total += value.item() * call.size
            samples += call.size
    if not samples:
        raise DataError(f"no batch of the {split} data can be compared: {small}; use larger batches, or Data(metric=...)")
    return total / samples


def _method(mix: Mix, teacher: nn.Module) -> dict[str, Any]:
    """What a resumed distillation must share with the one that wrote the checkpoint."""
    return {
        "the distillation loss": mix.name,
        "the temperature": mix.temperature,
        "alpha": mix.alpha,
        "the weight of features": mix.feature_weight,
        "the tapped modules": [[tap.module, tap.teacher_module] for tap in mix.used],
        "the norm of the teacher's weights": norm_of(live_state(teacher)),
    }


def _has_quality(data: Data) -> bool:
    if data.metric is not None:
        return True
    target = next(data.calls("validation")).target
    return isinstance(target, Tensor) and not target.is_floating_point()
