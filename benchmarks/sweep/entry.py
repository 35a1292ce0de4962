"""What the sweep tries: a model, how to build it, how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One model.

    Args:
        name: unique; ``source/model``.
        family: for the summary ("classification", "decoder", ...).
        build: makes the model, with random weights.
        call: (batch, generator) -> positional and keyword arguments.
        note: how it differs from the published model ("2 blocks a stage").
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    call: Callable[[int, torch.Generator], Arguments]
    note: str = ""

    def arguments(self, batch: int, seed: int) -> Arguments:
        """A call with ``batch`` samples."""
        return self.call(batch, torch.Generator().manual_seed(seed))


def floats(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=generator)


def integers(generator: torch.Generator, high: int, *shape: int, low: int = 0) -> Tensor:
    """Uniform integers in [low, high)."""
    return torch.randint(low, high, shape, generator=generator)
