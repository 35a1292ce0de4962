"""What a training is asked to do, and what it gives back: plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shohin.data import Call
from shohin.errors import DataError

Objective = Callable[[nn.Module, Call, torch.Generator], tuple[Tensor, dict[str, float]]]
"""``objective(model, call, generator) -> (scalar loss, its terms by name)``; the generator is seeded by (seed, epoch)."""

Augment = Callable[[Call, torch.Generator], Call]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults suit a short recovery of a pruned network on a CPU.

    Args:
        epochs: passes over the training batches.
        lr: peak learning rate.
        weight_decay: decoupled for AdamW, L2 for SGD; only on parameters with two dimensions or more (biases and
            normalization scales are left alone).
        optimizer: "adamw" (Loshchilov & Hutter, 2019) or "sgd" (Nesterov).
        momentum: of SGD.
        schedule: "cosine" (Loshchilov & Hutter, 2017) or "constant", after a linear warm-up.
        warmup: share of all steps, in [0, 1).
        final_lr: the last learning rate as a share of the peak (cosine only).
        ema: decay of the moving average of weights and statistics, or None. With it, the average is what is evaluated
            and returned; the decay rises from 0.1 so that short trainings are not dominated by the start.
        patience: stop after this many epochs without a better validation value, or None.
        clip: largest global gradient norm, or None.
        seed: with the epoch, decides order, augmentation and dropout.
        augment: ``(call, generator) -> call``, applied to training batches.
        accumulate: batches for one optimizer step, their losses weighted by their samples; at the end of an epoch what is left
            makes a step too. Learning rate, EMA and step counts go by optimizer steps.
        precision: "float32", or the objective under `torch.autocast`: "bfloat16", or "float16" with loss scaling (CUDA only).
            Weights and evaluation stay in float32.
        replay: epoch e repeats the random numbers of epoch ``e % replay``: order and augmentation come again, so that a teacher's
            remembered answers serve a long schedule of consistent teaching (Beyer et al., 2022, arXiv 2106.05237). None: every
            epoch is new.

    Raises:
        DataError: if a value is outside its range.
    """

    epochs: int = 5
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.1
    final_lr: float = 0.01
    ema: float | None = None
    patience: int | None = None
    clip: float | None = 5.0
    seed: int = 0
    augment: Augment | None = None
    accumulate: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    replay: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "epochs must be a whole number >= 0": self.epochs >= 0 and self.epochs == int(self.epochs),
            "lr must be finite and > 0": 0 < self.lr < float("inf"),
            "weight_decay must be >= 0": self.weight_decay >= 0,
            "optimizer must be 'adamw' or 'sgd'": self.optimizer in ("adamw", "sgd"),
            "momentum must be in [0, 1)": 0 <= self.momentum < 1,
            "schedule must be 'cosine' or 'constant'": self.schedule in ("cosine", "constant"),
            "warmup must be in [0, 1)": 0 <= self.warmup < 1,
            "final_lr must be in [0, 1]": 0 <= self.final_lr <= 1,
            "ema must be in (0, 1) or None": self.ema is None or 0 < self.ema < 1,
            "patience must be >= 1 or None": self.patience is None or self.patience >= 1,
            "clip must be > 0 or None": self.clip is None or self.clip > 0,
            "accumulate must be a whole number >= 1": self.accumulate >= 1 and self.accumulate == int(self.accumulate),
            "precision must be 'float32', 'bfloat16' or 'float16'": self.precision in ("float32", "bfloat16", "float16"),
            "replay must be a whole number >= 1 or None": self.replay is None or (self.replay >= 1 and self.replay == int(self.replay)),
        }
        for rule, holds in checks.items():
            if not holds:
                raise DataError(f"TrainConfig: {rule}; got {getattr(self, rule.split()[0])!r}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; the augmentation by name only."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.augment is not None:
            out["augment"] = getattr(self.augment, "__qualname__", type(self.augment).__qualname__)
        return out


@dataclass(frozen=True)
class EpochRecord:
    """One epoch as it was.

    Args:
        epoch: from 0; -1 is the state that the training was given.
        loss: mean over the steps (None for -1).
        terms: mean of each term of the objective.
        quality: validation value after the epoch, or None if there is no ``evaluate``.
        lr: learning rate of the last step (of the first parameter group).
        steps: number of optimizer steps.
        seconds: wall clock, with evaluation.
        partial: True if the deadline fell inside the epoch.
    """

    epoch: int
    loss: float | None
    terms: Mapping[str, float]
    quality: float | None
    lr: float
    steps: int
    seconds: float
    partial: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a training gives back; the model that was passed in holds ``state``.

    Args:
        state: parameters and buffers by name of the best epoch (the last one without ``evaluate``).
        history: the starting state's record (epoch -1, if it was evaluated) and one record for each epoch.
        stopped: "finished", "patience" or "deadline".
        best_epoch: -1 if nothing was better than the start.
        best_quality: its validation value, or None.
    """

    state: dict[str, Tensor]
    history: tuple[EpochRecord, ...]
    stopped: str
    best_epoch: int
    best_quality: float | None

    def to_json(self) -> dict[str, Any]:
        """All but the weights, JSON-able, for the journal."""
        return {
            "stopped": self.stopped,
            "best_epoch": self.best_epoch,
            "best_quality": self.best_quality,
            "history": [record.to_json() for record in self.history],
        }
