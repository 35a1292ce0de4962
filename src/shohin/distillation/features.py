"""Features of student and teacher aligned by index: channel i of a cut student is channel ``kept[i]`` of its teacher.

A student that came from a plan needs no adapter layers (unlike FitNets): the plan says which channel is which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shohin.data import first_output
from shohin.distillation.losses import normalized_feature_mse
from shohin.errors import ModelError, closest

Features = dict[str, list[Tensor]]


@dataclass(frozen=True)
class FeatureTap:
    """A module whose first output is compared.

    Args:
        module: qualified name in the student and, unless ``teacher`` is given, in the teacher.
        kept: the teacher's channel for each of the student's channels; None if both have the same.
        dim: the channel dimension of the output.
        teacher: qualified name in the teacher.
        weight: in the mean over taps.
        loss: ``(student's feature, teacher's feature) -> scalar``.
        aligned: False for losses that compare features of any widths (`losses.rkd`, `losses.attention_transfer`, `losses.minilm`, ...).
    """

    module: str
    kept: tuple[int, ...] | None = None
    dim: int = 1
    teacher: str | None = None
    weight: float = 1.0
    loss: Callable[[Tensor, Tensor], Tensor] = normalized_feature_mse
    aligned: bool = True

    @property
    def teacher_module(self) -> str:
        """Qualified name in the teacher."""
        return self.module if self.teacher is None else self.teacher


def check_taps(student: nn.Module, teacher: nn.Module, taps: Sequence[FeatureTap]) -> None:
    """Raises ModelError if a tap names a module that does not exist."""
    for model, whose, names in (
        (student, "student", [tap.module for tap in taps]),
        (teacher, "teacher", [tap.teacher_module for tap in taps]),
    ):
        known = dict(model.named_modules())
        for name in names:
            if name not in known:
                raise ModelError(f"the {whose} has no module {name!r}{closest(name, known)}")


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[Features]:
    """Inside, forward calls of the named modules append their first output to ``{name: [tensor for each call]}``."""
    found: Features = {name: [] for name in names}
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name].append(first_output(output))

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def feature_loss(
    student: Features, teacher: Features, taps: Sequence[FeatureTap], adapters: Mapping[str, nn.Module] | None = None
) -> Tensor:
    """Weighted mean over taps of ``tap.loss``; by default the squared error divided by the variance of the teacher's feature.

    Args:
        student, teacher: as `recorded` gives them; a module that ran several times is compared call by call.
        taps: at least one.
        adapters: tapped module of the student -> ``adapter(student's feature, teacher's feature)``.

    Raises:
        ModelError: if a module did not run, ran another number of times, or shapes do not fit.
    """
    total: Tensor | None = None
    for tap in taps:
        ours, theirs = student[tap.module], teacher[tap.teacher_module]
        if not ours or len(ours) != len(theirs):
            raise ModelError(
                f"feature tap {tap.module!r}: the module ran {len(ours)} times in the student and {len(theirs)} in the teacher; "
                "choose a module that both run as often"
            )
        for s, t in zip(ours, theirs, strict=True):
            if adapters and tap.module in adapters:
                s = adapters[tap.module](s, t)
            value = tap.loss(s, _aligned(s, t, tap) if tap.aligned else t) * (tap.weight / len(ours))
            total = value if total is None else total + value
    if total is None:
        raise ModelError("feature distillation needs at least one tap: FeatureTap(module, kept)")
    return total / sum(tap.weight for tap in taps)


def _aligned(student: Tensor, teacher: Tensor, tap: FeatureTap) -> Tensor:
    if tap.kept is not None:
        width = teacher.shape[tap.dim]
        if not tap.kept or min(tap.kept) < 0 or max(tap.kept) >= width:
            raise ModelError(f"feature tap {tap.module!r}: kept channels must lie in [0, {width})")
        teacher = teacher.index_select(tap.dim, torch.tensor(tap.kept, device=teacher.device))
    if student.shape != teacher.shape:
        raise ModelError(
            f"feature tap {tap.module!r}: the student's output {tuple(student.shape)} does not fit the teacher's {tuple(teacher.shape)}"
            f"{'' if tap.kept is None else ' after taking the kept channels'}; give kept= the channels that the student has left"
        )
    return teacher
