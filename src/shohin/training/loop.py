"""The one training loop, used by distillation, quantization-aware training and supernets."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shohin.data import Data
from shohin.errors import DataError
from shohin.training.checkpoint import Position, load_checkpoint, save_checkpoint, signature
from shohin.training.config import EpochRecord, Objective, TrainConfig, TrainResult
from shohin.training.ema import Ema
from shohin.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state, trainable
from shohin.training.progress import TrainingBar
from shohin.training.randomness import generators_of, isolated, mix, seed_everything
from shohin.training.schedule import learning_rate
from shohin.training.state import State, copy_state, load_state, training_modes

Evaluate = Callable[[nn.Module], float]


def train(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    checkpoint: Path | None = None,
    evaluate: Evaluate | None = None,
    lower_is_better: bool | None = None,
    deadline: float | None = None,
    progress: bool = False,
) -> TrainResult:
    """Trains ``model`` in place and leaves the best state in it.

    The starting state counts as epoch -1, so with ``evaluate`` the result is never worse on validation than what was
    given; ties between later epochs go to the smaller training loss. Called again with the same arguments after a kill, it
    goes on from the last whole epoch to the same bits: torch's, NumPy's and Python's global generators and those of the
    DataLoaders are seeded from (seed, epoch) and given back as they were. Not covered: random state that a dataset keeps to
    itself, and persistent loader workers.

    Args:
        model: trained in train mode, evaluated in eval mode; its modes are given back.
        data: ``data.calls("train")`` is iterated anew each epoch.
        objective: ``(model, call, generator) -> (scalar loss, terms)``.
        config: default `TrainConfig()`.
        checkpoint: path of the file written after each epoch; None keeps nothing.
        evaluate: ``model -> float`` on validation, without gradients. None returns the last state.
        lower_is_better: direction of ``evaluate``; default that of ``data``.
        deadline: `time.monotonic()` value; the step under way is finished, its state evaluated, and training ends.
        progress: show a bar if standard error is a terminal.

    Raises:
        DataError: if the loss, a gradient or a validation value is NaN or Inf (the best state is in the model again).
        ModelError: if nothing can be trained.
        RunError: if the checkpoint is damaged or belongs to another training.
    """
    config = config or TrainConfig()
    lower = data.lower_is_better if lower_is_better is None else lower_is_better
    generators = generators_of(data.train, data.validation)
    with isolated(generators), training_modes(model), TrainingBar(config.epochs, progress) as bar:
        job = _Job(model, data, objective, config, evaluate, lower, deadline, bar, generators)
        return job.run(checkpoint)


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


@dataclass
class _Job:
    model: nn.Module
    data: Data
    objective: Objective
    config: TrainConfig
    evaluate: Evaluate | None
    lower: bool
    deadline: float | None
    bar: TrainingBar
    generators: list[torch.Generator]
    position: Position = field(default_factory=Position)

    def run(self, checkpoint: Path | None) -> TrainResult:
        """Restores, trains epoch by epoch, and always leaves the best state in the model."""
        model, config = self.model, self.config
        self.parameters = trainable(model)
        self.optimizer = make_optimizer(self.parameters, config)
        self.best: State = copy_state(model)
        self.ema = None if config.ema is None else Ema(model, config.ema)
        sign = signature(config, self.best, self.lower)
        try:
            if not self._restore(checkpoint, sign) and self.evaluate is not None and not _late(self.deadline):
                self._judge_start()
            position = self.position
            while position.stopped is None:
                if position.epoch >= config.epochs:
                    position.stopped = "finished"
                elif _late(self.deadline):
                    break
                else:
                    if not self._epoch():
                        break
                    if config.patience is not None and self.evaluate is not None and position.stale >= config.patience:
                        position.stopped = "patience"
                    elif position.epoch >= config.epochs:
                        position.stopped = "finished"
                    if checkpoint is not None:
                        save_checkpoint(checkpoint, position, self._parts(), sign)
        finally:
            load_state(model, self.best)
            for p in self.parameters.values():
                p.grad = None
        stopped = position.stopped or "deadline"
        return TrainResult(self.best, tuple(position.history), stopped, position.best_epoch, position.best_quality)

    def _restore(self, checkpoint: Path | None, sign: dict[str, Any]) -> bool:
        found = None if checkpoint is None else load_checkpoint(checkpoint, sign)
        if found is None:
            return False
        self.position, parts = found
        load_state(self.model, parts["model"])
        for name, tensor in parts["best"].items():
            self.best[name].copy_(tensor)
        if self.ema is not None:
            for name, tensor in parts["ema"].items():
                self.ema.state[name].copy_(tensor)
        load_optimizer_state(self.optimizer, self.parameters, parts.get("optimizer", {}))
        return True

    def _parts(self) -> dict[str, State]:
        parts = {"model": copy_state(self.model), "best": self.best, "optimizer": optimizer_state(self.optimizer, self.parameters)}
        return parts if self.ema is None else {**parts, "ema": self.ema.state}

    def _judge_start(self) -> None:
        began = time.monotonic()
        quality = self._quality()
        self.position.best_quality = quality
        self.position.history.append(EpochRecord(-1, None, {}, quality, 0.0, 0, time.monotonic() - began))

    def _epoch(self) -> bool:
        """One epoch and its judgement. False if the deadline fell inside it: such an epoch is not checkpointed."""
        position, began = self.position, time.monotonic()
        epoch, first = position.epoch, position.step
        generator = seed_everything(mix(self.config.seed, epoch), self.generators)
        _set_epoch(self.data.train, epoch)
        self.model.train()
        if position.batches is None:
            position.batches = _length(self.data.train if self.data.train is not None else self.data.validation)
        sums: Counter[str] = Counter()
        total, rate, partial = 0.0, 0.0, False
        for batch, call in enumerate(self.data.calls("train")):
            if batch and _late(self.deadline):
                partial = True
                break
            rate = learning_rate(self.config, epoch, batch, position.batches)
            loss, terms = self._step(call, generator, rate, batch)
            total += loss
            sums.update(terms)
            self.bar.show(epoch, (batch + 1) / (position.batches or batch + 2), total / (batch + 1), position.best_quality)
        steps = position.step - first
        if not partial:
            position.batches = steps
        terms_mean = {name: value / steps for name, value in sums.items()}
        quality = None if self.evaluate is None else self._quality()
        self._judge(epoch, quality, total / steps)
        seconds = time.monotonic() - began
        position.history.append(EpochRecord(epoch, total / steps, terms_mean, quality, rate, steps, seconds, partial))
        self.bar.show(epoch, 1.0, total / steps, position.best_quality)
        position.epoch += 1
        return not partial

    def _step(self, call: Any, generator: torch.Generator, rate: float, batch: int) -> tuple[float, dict[str, float]]:
        position, config = self.position, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        if config.augment is not None:
            call = config.augment(call, generator)
        loss, terms = self.objective(self.model, call, generator)
        where = f"at step {position.step} (epoch {position.epoch}, batch {batch})"
        value = float(loss.detach())
        if not math.isfinite(value):
            bad = [f"{name}={v}" for name, v in terms.items() if not math.isfinite(v)] or ["the total"]
            raise DataError(
                f"the training loss became {value} {where}; not finite: {', '.join(bad)}. The best state so far is in the model; "
                f"look for NaN in that batch, or lower lr ({config.lr:g})"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not gradients:
            raise DataError(
                f"the objective gave no gradient to any trainable parameter {where}: it must be computed from the model's outputs"
            )
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        if not math.isfinite(float(norm)):
            name = next((n for n, g in gradients.items() if not bool(torch.isfinite(g).all())), next(iter(gradients)))
            raise DataError(
                f"the gradient of {name} became NaN or Inf {where}, though the loss was {value:g}. The best state so far is in the "
                f"model; lower lr ({config.lr:g}) or look for a square root or logarithm of zero"
            )
        if config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), config.clip, norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, position.step)
        position.step += 1
        return value, terms

    def _judge(self, epoch: int, quality: float | None, loss: float) -> None:
        """Keeps the state if it is better; of two trained epochs with one quality, that with the smaller training loss."""
        position, best = self.position, self.position.best_quality
        better = quality is None or best is None or (quality < best if self.lower else quality > best)
        tied = quality == best and position.best_loss is not None and loss < position.best_loss
        position.stale = 0 if better else position.stale + 1
        if better or tied:
            position.best_epoch, position.best_quality, position.best_loss = epoch, quality, loss
            self.best = copy_state(self.model) if self.ema is None else {n: t.clone() for n, t in self.ema.state.items()}

    def _quality(self) -> float:
        if self.evaluate is None:
            raise DataError("there is no evaluate function")
        seed_everything(mix(self.config.seed, "evaluate"), self.generators)  # every epoch is judged on the same draw
        self.model.eval()
        with torch.no_grad():
            if self.ema is None:
                value = float(self.evaluate(self.model))
            else:
                with self.ema.applied(self.model):
                    value = float(self.evaluate(self.model))
        if not math.isfinite(value):
            raise DataError(f"the validation value became {value} after epoch {self.position.epoch}; it must be a finite number")
        return value


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tells a distributed sampler which epoch it is; it shuffles by that number."""
    for part in (loader, getattr(loader, "sampler", None)):
        tell = getattr(part, "set_epoch", None)
        if callable(tell):
            tell(epoch)
