"""`shohin.distill`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shohin.candidate import Candidate, Measurement, Metrics
from shohin.data import Call, Data
from shohin.errors import DataError
from shohin.plan import Plan
from shohin.verbs.common import calibration, checked, seeded

if TYPE_CHECKING:
    from shohin.distillation import Teacher
    from shohin.training import TrainConfig


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | Teacher,
    data: Data,
    losses: str | Sequence[str] | None = None,
    epochs: int = 5,
    *,
    config: TrainConfig | None = None,
    inherit: bool = True,
    seed: int = 0,
) -> Candidate:
    """A copy of ``student``, trained to answer as ``teacher`` does; labels are used if there are any.

    Args:
        teacher: a model, several whose answers are averaged (probabilities, where the loss is one of classes), or a `shohin.distillation.Teacher` that keeps its answers on disk
            or runs in a faster form.
        losses: the name of one loss between answers (see `shohin.distillation.Mix`), and "features" to follow the teacher's features
            too, matched by what one tells of the other (`shohin.distillation.match`); default "kd" for classes (labels may be
            their probabilities), "multi_label" where each answer has a label of 0.0 or 1.0, "mse" for other numbers.
        epochs: passes over ``data.train``.
        config: how to train, instead of ``epochs`` and ``seed``; see `shohin.training.TrainConfig`.
        inherit: begin with the teacher's weights where a plan makes the student's architecture out of the teacher's (the same modules,
            fewer channels, heads or layers), unless the student's own already answer more like the teacher. The plan, of the teacher, is
            ``.notes["inherited"]``.

    Raises:
        DataError: for an unknown loss or batches that cannot be used.
        ModelError: if no feature of the student matches one of the teacher.
    """
    from shohin.distillation import FEATURES, LABELS, Ensemble, FeatureTap, Teacher, match
    from shohin.distillation import distill as distill_
    from shohin.distillation.named import NAMED
    from shohin.pipeline.inherit import inherit as inherit_
    from shohin.training import TrainConfig

    names = (losses,) if isinstance(losses, str) else tuple(losses or ())
    answers = [n for n in names if n != "features"]
    if len(answers) > 1:
        raise DataError(f"one loss between answers at a time; got {answers}")
    own = copy.deepcopy(student)
    config = config or TrainConfig(epochs=epochs, seed=seed)
    with seeded(checked(data), config.seed):
        several = [] if isinstance(teacher, (nn.Module, Teacher)) or not isinstance(teacher, Sequence) else teacher
        one = teacher.model if isinstance(teacher, Teacher) else several[0] if several else teacher
        loss = answers[0] if answers else fitting_loss(one, next(data.calls("train"))) if isinstance(one, nn.Module) else "kd"
        kind = NAMED[loss].answers if loss in NAMED else "classes"
        whose = teacher if isinstance(teacher, (nn.Module, Teacher)) else Ensemble(teacher, answers=kind)
        model = whose.model if isinstance(whose, Teacher) else whose
        plan = inherit_(own, model, data, calibration(data, config.seed), config.seed) if inherit else None
        taps: tuple[FeatureTap, ...] = ()
        if "features" in names:
            taps = match(own, model, list(data.calls("train", limit=128)))
            whose = whose.watching([tap.teacher_module for tap in taps]) if isinstance(whose, Teacher) else whose
        result = distill_(
            own,
            whose,
            data,
            config=config,
            loss=loss,
            alpha=LABELS if data.has_labels else 0.0,
            feature_weight=FEATURES if taps else 0.0,
            taps=taps,
        )
    quality = Measurement(result.best_quality, "measured: validation, in torch") if result.best_quality is not None else None
    notes: dict[str, Any] = {"training": result.to_json()}
    if plan is not None:
        notes["inherited"] = plan.to_json()
    return Candidate("distilled", Plan(""), own, metrics=Metrics(quality=quality), notes=notes)


def fitting_loss(teacher: nn.Module, call: Call) -> str:
    """The loss between answers that suits a batch: by its labels, and by what the teacher says."""
    from shohin.distillation.named import classes_at
    from shohin.evidence import answers

    answer, target = answers(teacher, [call])[0], call.target
    if answer.dim() < 2 or answer.shape[classes_at(answer, call)] < 2:
        return "mse"
    if not isinstance(target, Tensor) or target.shape != answer.shape or not target.is_floating_point():
        return "kd"
    if bool((target >= 0).all()) and bool(((target.sum(classes_at(answer, call)) - 1).abs() < 1e-3).all()):
        return "kd"  # a distribution of classes for each sample, such as one of them or a mixture
    return "multi_label" if bool(((target == 0) | (target == 1)).all()) else "mse"
