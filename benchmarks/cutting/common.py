"""What every method is given and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import shohin
from cutting.originals import Original
from shohin.data import Call
from shohin.verbs.common import calibration


class Unreachable(Exception):
    """A method cannot bring this model to this budget, or is not there yet."""


@dataclass(frozen=True)
class Work:
    """What is to be cut.

    Args:
        model: trained, in eval mode; not to be changed.
        data: the test split is for the last figure of a run alone.
        calls: the samples from which every method estimates importance and normalization statistics.
        budget: share of the multiplications that may be left, or of the weights for sparse methods.
    """

    original: Original
    model: nn.Module
    data: shohin.Data
    calls: list[Call]
    budget: float
    seed: int

    @property
    def samples(self) -> shohin.Data:
        """The calls alone, as training batches."""
        return shohin.Data(train=[call.batch for call in self.calls], loss=self.data.loss)

    @property
    def example(self) -> Tensor:
        """Two samples."""
        x: Tensor = self.calls[0].args[0][:2]
        return x


@dataclass(frozen=True)
class Found:
    """A cut model.

    Args:
        score, cut: processor seconds, with one thread, for importance, and for removing at the final width; searching the ratio that meets the budget isn't counted.
        compensate: processor seconds for what follows without training, where it is known apart.
        epochs: of the short training that were spent before the cut.
        trained: the model after training, where a method has a training of its own.
        notes: JSON-able.
    """

    model: nn.Module
    score: float
    cut: float
    compensate: float = 0.0
    epochs: int = 0
    trained: nn.Module | None = None
    notes: dict[str, Any] = field(default_factory=dict)


Method = Callable[[Work], Found]


def work(original: Original, budget: float, seed: int) -> Work:
    """The model, its data, and the samples that `shohin.prune` takes with this seed."""
    data = original.data()
    return Work(original, original.model(), data, calibration(data, seed), budget, seed)


def macs(model: nn.Module, example: Tensor) -> float:
    """Of one sample, as Shohin counts them; the one counter for all methods."""
    return float(shohin.understand(model, (example,)).macs())


def quick_macs(model: nn.Module, example: Tensor) -> float:
    """The same number by hooks, for models of convolutions and linear layers: for searching."""
    total = 0

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        weight: Any = module.weight
        total += out.numel() // out.shape[0] * weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    hooks = [m.register_forward_hook(count) for m in layers]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return float(total)


def head(model: nn.Module) -> nn.Linear:
    """The classifier, which keeps its outputs."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
