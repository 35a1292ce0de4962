"""What a student is asked for: the teacher's answers, its features, the task; for the one loop, or for the user's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shohin.data import Call, first_output
from shohin.distillation.adapters import Adapter, adapters_for
from shohin.distillation.ensemble import Ensemble
from shohin.distillation.features import Features, FeatureTap, check_taps, feature_loss
from shohin.distillation.losses.shapes import TooFew
from shohin.distillation.named import NAMED, nothing
from shohin.distillation.teacher import Teacher
from shohin.errors import DataError, ModelError, closest

Between = Callable[[Tensor, Tensor], Tensor]
"""``(student, teacher) -> scalar``."""


@dataclass(frozen=True)
class Mix:
    """``alpha * task + (1 - alpha) * answers + feature_weight * features``.

    Args:
        loss: between answers: one of `NAMED` (see `shohin.distillation.losses`), or a function ``(student, teacher) -> scalar``.
        temperature: of the answers, where the loss has one.
        alpha: weight of the task's loss in [0, 1]; 0 needs no labels.
        task_loss: ``(outputs, call) -> scalar``. Needed if ``alpha`` > 0.
        feature_weight: of `feature_loss` over ``taps``.
        taps: modules that are compared.
        dim: class dimension for "kd". None: where the labels' shape says, else 1 for ``[N, C, H, W]`` and more axes, and the last.

    Raises:
        DataError: if these contradict each other.
    """

    loss: str | Between = "kd"
    temperature: float = 2.0
    alpha: float = 0.0
    task_loss: Callable[[Any, Call], Tensor] | None = None
    feature_weight: float = 0.0
    taps: tuple[FeatureTap, ...] = ()
    dim: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.feature_weight < 0:
            raise DataError(f"alpha must be in [0, 1] and feature_weight >= 0; got {self.alpha} and {self.feature_weight}")
        if self.alpha > 0 and self.task_loss is None:
            raise DataError("alpha > 0 asks for the task's loss: give task_loss=data.batch_loss, or alpha=0 for unlabelled data")
        if self.feature_weight > 0 and not self.taps:
            raise DataError("feature_weight > 0 needs taps=[FeatureTap(module, kept), ...]")
        if isinstance(self.loss, str) and self.loss not in NAMED:
            raise DataError(f"unknown distillation loss {self.loss!r}{closest(self.loss, NAMED)}; known: {', '.join(map(repr, NAMED))}")
        if not self.temperature > 0:
            raise DataError(f"temperature must be > 0; got {self.temperature}")

    @staticmethod
    def of(mix: Mix | None, fields: Mapping[str, Any]) -> Mix:
        """A mix that was given whole or by its fields. Raises DataError for both, or for a field that does not exist."""
        if mix is not None:
            if fields:
                raise DataError(f"give mix= or its fields, not both: {', '.join(fields)}")
            return mix
        known = Mix.__dataclass_fields__
        for name in fields:
            if name not in known:
                raise DataError(f"distillation has no setting {name!r}{closest(name, known)}; settings: {', '.join(known)}")
        settings: dict[str, Any] = {k: tuple(v) if k == "taps" else v for k, v in fields.items()}
        return Mix(**settings)

    @property
    def used(self) -> tuple[FeatureTap, ...]:
        """The taps that weigh anything."""
        return self.taps if self.feature_weight > 0 else ()

    @property
    def name(self) -> str:
        """Of the loss between answers."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", "answers")

    def __call__(
        self, outputs: Any, features: Features, call: Call, teacher: Teacher, adapters: Mapping[str, nn.Module] | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum, and each term by name.

        Args:
            outputs, features: of the student for ``call``.
            adapters: tapped module of the student -> its adapter.
        """
        terms: dict[str, Tensor] = {}
        weights = {"task": self.alpha, self.name: 1 - self.alpha, "features": self.feature_weight}
        if self.alpha < 1 or self.used:
            answer, known = teacher(call)
            own = first_output(outputs)
            if self.alpha < 1:
                terms[self.name] = _of_enough(lambda: self.between(own, answer, call), own)
            if self.used:
                terms["features"] = _of_enough(lambda: feature_loss(features, known, self.used, adapters or {}), own)
        if self.alpha > 0 and self.task_loss is not None:
            terms["task"] = self.task_loss(outputs, call)
        for name, value in terms.items():
            if value.numel() != 1:
                raise DataError(f"the term {name!r} must be one number; got shape {tuple(value.shape)}")
        total = torch.stack([weights[name] * value.reshape(()) for name, value in terms.items()]).sum()
        return total, {name: value.item() for name, value in terms.items()}

    def between(self, student: Tensor, teacher: Tensor, call: Call) -> Tensor:
        """The loss between answers alone. Raises DataError if they do not fit it."""
        if not isinstance(self.loss, str):
            return self.loss(student, teacher)
        return NAMED[self.loss].between(student, teacher, call, self.temperature, self.dim)


def _of_enough(loss: Callable[[], Tensor], outputs: Tensor) -> Tensor:
    """The loss; 0 with a warning for a batch of too few samples, such as the last one of a loader."""
    try:
        return loss()
    except TooFew as error:
        warnings.warn(f"a batch teaches nothing: {error}; use drop_last=True or larger batches", stacklevel=2)
        return nothing(outputs)


def suits(teacher: nn.Module, mix: Mix) -> None:
    """Raises DataError if the answers of an `Ensemble` are not what the loss takes them for."""
    if mix.alpha == 1 or not isinstance(teacher, Ensemble) or not isinstance(mix.loss, str):
        return
    wanted = NAMED[mix.loss].answers
    if teacher.answers != wanted:
        raise DataError(
            f"the ensemble averages {teacher.answers}, and the loss {mix.loss!r} compares {wanted}: Ensemble(teachers, answers={wanted!r})"
        )


def watches(teacher: Teacher, taps: Sequence[FeatureTap]) -> None:
    """Raises ModelError if a `Teacher` was made without the features that taps compare."""
    missing = [tap.teacher_module for tap in taps if tap.teacher_module not in teacher.names]
    if missing:
        raise ModelError(f"the Teacher does not watch {missing[0]!r}: Teacher(model, names={[t.teacher_module for t in taps]})")


class Loss(nn.Module):
    """Distillation in any loop: plain PyTorch, Lightning, Accelerate.

    ``distill = Loss(teacher)``, then ``distill(student(x), x, target=y).backward()``: outputs of the student first, then what the student was
    called with, as it was called. The teacher is no part of this module: its weights are in no state dict and no optimizer. Its answers are
    remembered, so it must stay as it is; give ``Teacher(model, cache_bytes=0)`` for one that changes.

    Args:
        teacher: the model to learn from, or a `Teacher`.
        student: needed for features: its tapped modules are watched until `close`.
        example: one batch as a `Call`, needed where taps need adapters; their weights are ``loss.parameters()``, to be given to the
            optimizer, and are not needed afterwards.
        mix: see `Mix`; its fields can be given as keywords instead.
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher,
        student: nn.Module | None = None,
        *,
        example: Call | None = None,
        mix: Mix | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.mix = Mix.of(mix, fields)
        taps = self.mix.used
        self._teacher = (teacher if isinstance(teacher, Teacher) else Teacher(teacher, [tap.teacher_module for tap in taps]),)
        suits(self._teacher[0].model, self.mix)
        self._features: Features = {tap.module: [] for tap in taps}
        self._handles: list[Any] = []
        self.adapters = nn.ModuleList()
        self.names: tuple[str, ...] = ()
        self.terms: dict[str, float] = {}
        if taps:
            if student is None:
                raise ModelError("features are compared: give the student, Loss(teacher, student, taps=..., feature_weight=...)")
            check_taps(student, self._teacher[0].model, taps)
            watches(self._teacher[0], taps)
            if example is not None:
                found: dict[str, Adapter] = adapters_for(student, self._teacher[0].model, taps, example)
                self.names, self.adapters = tuple(found), nn.ModuleList(found.values())
            modules = dict(student.named_modules())
            self._handles = [modules[name].register_forward_hook(self._keep(name)) for name in self._features]

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            recomputed = torch._C._current_graph_task_id() != -1  # by activation checkpointing, inside a backward pass
            if torch.is_grad_enabled() and module.training and not recomputed:
                self._features[name].append(first_output(output))

        return hook

    def forward(self, outputs: Any, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """The loss of the student's ``outputs`` for ``student(*args, **kwargs)``; its terms are in ``.terms``.

        Raises:
            ModelError: if tapped modules did not run since the last call (features are watched in training mode only).
            DataError: if a term cannot be computed.
        """
        call = Call(args, kwargs, target, (args, target))
        features = {name: list(found) for name, found in self._features.items()}
        for found in self._features.values():
            found.clear()
        value, self.terms = self.mix(outputs, features, call, self._teacher[0], dict(zip(self.names, self.adapters, strict=True)))
        return value

    def close(self) -> None:
        """Watches the student no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
