"""`shohin.distill`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from shohin.candidate import Candidate, Measurement, Metrics
from shohin.data import Data
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
    losses: Sequence[str] | None = None,
    epochs: int = 5,
    *,
    config: TrainConfig | None = None,
    inherit: bool = True,
    seed: int = 0,
) -> Candidate:
    """A copy of ``student``, trained to answer as ``teacher`` does; labels are used if there are any.

    Args:
        teacher: a model, several whose probabilities are averaged, or a `shohin.distillation.Teacher` that keeps its answers on disk
            or runs in a faster form.
        losses: the name of one loss between answers (see `shohin.distillation.Mix`), and "features" to follow the teacher's features
            too, matched by what one tells of the other (`shohin.distillation.match`); default ("kd",).
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
    from shohin.pipeline.inherit import inherit as inherit_
    from shohin.training import TrainConfig

    names = tuple(losses or ("kd",))
    answers = [n for n in names if n != "features"] or ["kd"]
    if len(answers) != 1:
        raise DataError(f"one loss between answers at a time; got {answers}")
    own = copy.deepcopy(student)
    whose = teacher if isinstance(teacher, (nn.Module, Teacher)) else Ensemble(teacher)
    config = config or TrainConfig(epochs=epochs, seed=seed)
    with seeded(checked(data), config.seed):
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
            loss=answers[0],
            alpha=LABELS if data.has_labels else 0.0,
            feature_weight=FEATURES if taps else 0.0,
            taps=taps,
        )
    quality = Measurement(result.best_quality, "measured: validation, in torch") if result.best_quality is not None else None
    notes: dict[str, Any] = {"training": result.to_json()}
    if plan is not None:
        notes["inherited"] = plan.to_json()
    return Candidate("distilled", Plan(""), own, metrics=Metrics(quality=quality), notes=notes)
