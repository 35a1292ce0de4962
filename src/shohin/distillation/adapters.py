"""Thin layers that bring a student's feature to its teacher's width while they train together, and are gone afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shohin.data import Call
from shohin.distillation.features import Features, FeatureTap, check_taps, recorded
from shohin.distillation.losses.shapes import pooled
from shohin.errors import ModelError
from shohin.training.state import training_modes


class Adapter(nn.Module):
    """A linear map along the channel axis; space (or length) is resampled to the teacher's.

    Args:
        width, wanted: channels of the student and of the teacher.
        dim: their axis: 1 of ``[N, C, *space]``, -1 of ``[N, L, D]``.
        seed: of its weights.
    """

    def __init__(self, width: int, wanted: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(width, wanted)
        self.dim = dim

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """``x`` with the width and the space of ``like``."""
        x = self.linear(x.movedim(self.dim, -1)).movedim(-1, self.dim)
        if self.dim == 1 and x.dim() > 2 and x.shape[2:] != like.shape[2:]:
            x = pooled(x, like.shape[2:])
        return x


class Adapted(nn.Module):
    """A student with the adapters of its taps: trained as one, after which the student stands alone again."""

    def __init__(self, student: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.student = student
        self.training = student.training
        self.names = tuple(adapters)
        self.adapters = nn.ModuleList(adapters.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's outputs."""
        return self.student(*args, **kwargs)

    def by_name(self) -> dict[str, nn.Module]:
        """Tapped module of the student -> its adapter."""
        return dict(zip(self.names, self.adapters, strict=True))


def channel_dim(feature: Tensor, module: nn.Module) -> int:
    """The axis of channels: the last of ``[N, D]`` and of ``[N, L, D]`` (unless a one-dimensional convolution made it), else 1."""
    one_dimensional = isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d))
    return 1 if feature.dim() > 3 or (feature.dim() == 3 and one_dimensional) else -1


def adapters_for(student: nn.Module, teacher: nn.Module, taps: Sequence[FeatureTap], call: Call, seed: int = 0) -> dict[str, Adapter]:
    """Adapters for the taps whose features differ in width or space and that say nothing of kept channels.

    Args:
        call: one batch; both models run on it once, in evaluation mode.

    Raises:
        ModelError: if a tap names no module, a module does not run, or features differ in more than width and space.
    """
    check_taps(student, teacher, taps)
    ours = outputs_at(student, [tap.module for tap in taps], call)
    theirs = outputs_at(teacher, [tap.teacher_module for tap in taps], call)
    modules = dict(student.named_modules())
    made: dict[str, Adapter] = {}
    for i, tap in enumerate(taps):
        s, t = (features.get(name) for features, name in ((ours, tap.module), (theirs, tap.teacher_module)))
        if not s or not t:
            whose = f"{tap.module!r} of the student" if not s else f"{tap.teacher_module!r} of the teacher"
            raise ModelError(f"feature tap: the module {whose} did not run")
        a, b = s[0], t[0]
        if tap.kept is not None or not tap.aligned or a.shape == b.shape:
            continue
        dim = channel_dim(a, modules[tap.module]) if tap.dim == 1 else tap.dim
        resampled = dim == 1 and a.dim() > 2
        if a.dim() != b.dim() or (not resampled and a.shape[:-1] != b.shape[:-1]):
            raise ModelError(
                f"feature tap {tap.module!r}: no linear layer leads from the student's {tuple(a.shape)} to the teacher's {tuple(b.shape)}; "
                "choose modules whose outputs have one rank and, for sequences, one length"
            )
        if tap.module in made:
            raise ModelError(
                f"two feature taps of {tap.module!r} need an adapter each; tap modules inside it, or follow one module with it"
            )
        made[tap.module] = Adapter(a.shape[dim], b.shape[dim], dim, seed + i).to(a.device, a.dtype)
    return made


def outputs_at(model: nn.Module, names: Sequence[str], call: Call) -> Features:
    """What the named modules give for a batch, in evaluation mode without gradients; modes are given back."""
    with training_modes(model), torch.no_grad(), recorded(model, names) as found:
        model.eval()(*call.args, **call.kwargs)
    return found
