"""The learning rate as a function of progress alone, so that a resumed training needs no scheduler state."""

from __future__ import annotations

import math

from shohin.training.config import TrainConfig


def learning_rate(config: TrainConfig, epoch: int, batch: int, batches: int | None) -> float:
    """The learning rate of one step.

    Args:
        config: peak, warm-up and final share.
        epoch: from 0.
        batch: index in the epoch, from 0.
        batches: batches in an epoch; None if not known yet, which counts every step as the middle of its epoch.
    """
    within = 0.5 if batches is None else min((batch + 0.5) / max(batches, 1), 1.0)
    progress = (epoch + within) / max(config.epochs, 1)
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    if config.schedule == "constant":
        return config.lr
    rest = (progress - config.warmup) / (1 - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * rest)))
