"""The learning rate as a function of progress alone, so that a resumed training needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from shohin.training.config import TrainConfig

Schedule = Callable[[float], float]
"""``schedule(progress in [0, 1]) -> factor`` of the optimizer's own learning rates."""


def progress_of(config: TrainConfig, epoch: int, step: int, steps: int | None) -> float:
    """The share of a training that is done in the middle of a step, in [0, 1]; arguments as in `learning_rate`."""
    within = 0.5 if steps is None else min((step + 0.5) / max(steps, 1), 1.0)
    return (epoch + within) / max(config.epochs, 1)


def learning_rate(config: TrainConfig, epoch: int, step: int, steps: int | None) -> float:
    """The learning rate of one step.

    Args:
        config: peak, warm-up and final share.
        epoch: from 0.
        step: index in the epoch, from 0.
        steps: optimizer steps in an epoch; None if not known yet, which counts every step as the middle of its epoch.
    """
    progress = progress_of(config, epoch, step, steps)
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    if config.schedule == "constant":
        return config.lr
    rest = (progress - config.warmup) / (1 - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * rest)))
