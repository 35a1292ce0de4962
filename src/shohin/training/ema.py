"""Exponential moving average of a model's tensors (Polyak & Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from shohin.training.state import State, copy_state, live_state, load_state


class Ema:
    """The average of a model's floating tensors; integer buffers are copied.

    Args:
        model: whose state the average starts from.
        decay: the limit of the decay; at step t it is ``min(decay, (1 + t) / (10 + t))``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: State = copy_state(model)

    def update(self, model: nn.Module, step: int) -> None:
        """Takes the model's state after step ``step`` (from 0) into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in live_state(model).items():
                if tensor.is_floating_point():
                    self.state[name].lerp_(tensor, 1 - decay)
                else:
                    self.state[name].copy_(tensor)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model holds the average; on leaving it holds its own tensors again."""
        own = copy_state(model)
        load_state(model, self.state)
        try:
            yield
        finally:
            load_state(model, own)
