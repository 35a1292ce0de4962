"""The one training loop, used by distillation, quantization-aware training and supernets."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shohin.data import Data
from shohin.errors import DataError, RunError
from shohin.training import distributed
from shohin.training.checkpoint import Position, load_checkpoint, save_checkpoint, signature
from shohin.training.config import EpochRecord, Objective, TrainConfig, TrainResult
from shohin.training.ema import Ema
from shohin.training.loggers import Callback
from shohin.training.optimizer import MakeOptimizer, load_optimizer_state, make_optimizer, optimizer_state, own_optimizer, trainable
from shohin.training.progress import TrainingBar
from shohin.training.randomness import generators_of, isolated, mix, seed_everything
from shohin.training.schedule import Schedule
from shohin.training.state import State, copy_state, live_state, load_state, training_modes
from shohin.training.steps import Group, Place, Stepper, length_of, tell_epoch

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
    optimizer: MakeOptimizer | None = None,
    schedule: Schedule | None = None,
    callbacks: Sequence[Callback] = (),
    method: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains ``model`` in place and leaves the best state in it.

    The starting state counts as epoch -1, so with ``evaluate`` the result is never worse on validation than what was
    given; ties between later epochs go to the smaller training loss. Called again with the same arguments after a kill, it
    goes on from the last whole epoch to the same bits: torch's, NumPy's and Python's global generators and those of the
    DataLoaders are seeded from (seed, epoch) and given back as they were. Not covered: random state that a dataset keeps to
    itself, attributes of an optimizer object outside its state and groups, and persistent loader workers.

    Where `torch.distributed` is initialized (torchrun, Accelerate), every process calls this with its own share of each batch:
    all begin from process 0's weights, gradients are the mean over all samples, evaluation, callbacks and checkpoints are
    process 0's, and all stop together, at a deadline or an error in any of them. An epoch ends with the shortest loader.

    Args:
        model: trained in train mode, evaluated in eval mode; its modes are given back. Where it comes in train mode with modules
            in eval mode (frozen normalization), these stay so.
        data: ``data.calls("train")`` is iterated anew each epoch.
        objective: ``(model, call, generator) -> (scalar loss, terms)``.
        config: default `TrainConfig()`.
        checkpoint: path of the file written after each epoch; None keeps nothing.
        evaluate: ``model -> float`` on validation, without gradients. None returns the last state.
        lower_is_better: direction of ``evaluate``; default that of ``data``.
        deadline: `time.monotonic()` value; the step under way is finished, its state evaluated, and training ends.
        progress: show a bar if standard error is a terminal.
        optimizer: ``[(name, parameter), ...] -> torch.optim.Optimizer`` instead of the config's; its own learning rates are the
            peaks of the schedule, and ``lr``, ``weight_decay`` and ``momentum`` of the config do not count.
        schedule: ``progress in [0, 1] -> factor`` of the optimizer's learning rates, instead of the config's.
        callbacks: each is called with the `EpochRecord` after every epoch, before its checkpoint is written: an epoch that a
            kill undid is told again. See `shohin.training.loggers`.
        method: what a training that resumes must share beyond all this, by name: JSON-able settings of the objective.

    Raises:
        DataError: if the loss, a gradient or a validation value is NaN or Inf (the best state is in the model again).
        ModelError: if nothing can be trained.
        RunError: if the checkpoint is damaged or belongs to another training, the optimizer's state cannot be stored in one, or a
            callback fails.
    """
    config = config or TrainConfig()
    lower = data.lower_is_better if lower_is_better is None else lower_is_better
    generators = generators_of(data.train, data.validation)
    with (
        isolated(generators),
        training_modes(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        TrainingBar(config.epochs, progress and distributed.rank() == 0) as bar,
    ):
        job = _Job(model, data, objective, config, evaluate, lower, deadline, bar, generators, optimizer, schedule, callbacks, method or {})
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
    make: MakeOptimizer | None
    schedule: Schedule | None
    callbacks: Sequence[Callback]
    method: Mapping[str, Any]
    saved: Path | None = None
    position: Position = field(default_factory=Position)

    def run(self, checkpoint: Path | None) -> TrainResult:
        """Restores, trains epoch by epoch, and always leaves the best state in the model."""
        model, config = self.model, self.config
        self.still = [m for m in model.modules() if model.training and not m.training]
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with distributed.guarded(self.device):
            self.parameters = trainable(model)
        distributed.broadcast(live_state(model).values())
        with distributed.guarded(self.device):
            self.optimizer = make_optimizer(self.parameters, config) if self.make is None else own_optimizer(self.make, self.parameters)
            self.ema = None if config.ema is None else Ema(model, config.ema)
            self.stepper = Stepper(
                model, self.objective, config, self.parameters, self.optimizer, self.ema, self.schedule, self.make is not None
            )
        self.best: State = copy_state(model)
        sign = signature(config, self.best, self.lower, self._method())
        try:
            if not self._restore(checkpoint, sign) and self.evaluate is not None and not self._late():
                self._judge_start()
            position = self.position
            while position.stopped is None:
                if position.epoch >= config.epochs:
                    position.stopped = "finished"
                elif self._late():
                    break
                else:
                    if not self._epoch():
                        break
                    if config.patience is not None and self.evaluate is not None and position.stale >= config.patience:
                        position.stopped = "patience"
                    elif position.epoch >= config.epochs:
                        position.stopped = "finished"
                    if checkpoint is not None:
                        self._save(checkpoint, sign)
        finally:
            load_state(model, self.best)
            for p in self.parameters.values():
                p.grad = None
        stopped = position.stopped or "deadline"
        return TrainResult(self.best, tuple(position.history), stopped, position.best_epoch, position.best_quality)

    def _late(self) -> bool:
        return distributed.agree(None, [float(_late(self.deadline))], self.device)[0] > 0

    def _method(self) -> dict[str, Any]:
        """What a resumed training must share beyond the config; only what is not the default."""
        own = {} if self.make is None else {"the optimizer": type(self.optimizer).__qualname__, "its learning rates": self.stepper.peaks}
        plan = {} if self.schedule is None else {"the schedule": getattr(self.schedule, "__qualname__", type(self.schedule).__qualname__)}
        many = {} if distributed.world() == 1 else {"the number of processes": distributed.world()}
        return {**self.method, **own, **plan, **many}

    def _restore(self, checkpoint: Path | None, sign: dict[str, Any]) -> bool:
        found = None
        with distributed.guarded(self.device):
            found = None if checkpoint is None else load_checkpoint(checkpoint, sign)
        seen = distributed.agree(None, [float(found is not None)], self.device)[0]
        if 0 < seen < distributed.world():
            raise RunError(
                f"only {seen:g} of {distributed.world()} processes see the checkpoint {checkpoint}; put it where all can read it"
            )
        if found is None:
            return False
        self.position, parts, plain = found
        self.saved = checkpoint
        load_state(self.model, parts["model"])
        for name, tensor in parts["best"].items():
            self.best[name].copy_(tensor)
        if self.ema is not None:
            for name, tensor in parts["ema"].items():
                self.ema.state[name].copy_(tensor)
        load_optimizer_state(self.optimizer, self.parameters, parts.get("optimizer", {}), plain.get("optimizer", {}))
        if self.stepper.scaler is not None:
            self.stepper.scaler.load_state_dict(plain["scaler"])
        return True

    def _save(self, checkpoint: Path, sign: dict[str, Any]) -> None:
        with distributed.guarded(self.device):
            if distributed.rank() == 0:
                tensors, plain = optimizer_state(self.optimizer, self.parameters)
                parts = {"model": copy_state(self.model), "best": self.best, "optimizer": tensors}
                scaler = {} if self.stepper.scaler is None else {"scaler": self.stepper.scaler.state_dict()}
                averages = {} if self.ema is None else {"ema": self.ema.state}
                save_checkpoint(checkpoint, self.position, {**parts, **averages}, sign, {"optimizer": plain, **scaler})
        self.saved = checkpoint

    def _judge_start(self) -> None:
        began = time.monotonic()
        quality = self._quality()
        self.position.best_quality = quality
        self.position.history.append(EpochRecord(-1, None, {}, quality, 0.0, 0, time.monotonic() - began))

    def _epoch(self) -> bool:
        """One epoch and its judgement. False if the deadline fell inside it: such an epoch is not checkpointed."""
        position, config, began = self.position, self.config, time.monotonic()
        epoch, first = position.epoch, position.step
        played = epoch if config.replay is None else epoch % config.replay
        generator = seed_everything(mix(config.seed, played), self.generators, distributed.rank())
        tell_epoch(self.data.train, played)
        self.model.train()
        for module in self.still:
            module.training = False
        if position.batches is None:
            own = length_of(self.data.train if self.data.train is not None else self.data.validation, config.accumulate)
            told = distributed.gather(own, self.device)
            position.batches = None if None in told else min(told)
        total, rate, partial, sums = self._pass(epoch, generator)
        steps = position.step - first
        if steps == 0:
            raise DataError("a process had no batch at all: give every process a share of the training data")
        if not partial:
            position.batches = steps
        loss, terms = distributed.mean_of_losses(total / steps, {name: value / steps for name, value in sums.items()}, self.device)
        buffers = dict(self.model.named_buffers())
        averaged = [] if self.ema is None else [self.ema.state[name] for name in buffers]
        distributed.broadcast(t for t in (*buffers.values(), *averaged) if t.is_floating_point())
        quality = None if self.evaluate is None else self._quality()
        self._judge(epoch, quality, loss)
        record = EpochRecord(epoch, loss, terms, quality, rate, steps, time.monotonic() - began, partial)
        position.history.append(record)
        self.bar.show(epoch, 1.0, loss, position.best_quality)
        position.epoch += 1
        self._tell(record)
        return not partial

    def _pass(self, epoch: int, generator: torch.Generator) -> tuple[float, float, bool, Counter[str]]:
        """The steps of an epoch: sum of losses, last learning rate, whether the deadline fell inside, sums of terms.

        An error of one process is carried to the next meeting, where all raise it.
        """
        position, first = self.position, self.position.step
        calls = enumerate(self.data.calls("train"))
        sums: Counter[str] = Counter()
        total, rate = 0.0, 0.0
        error: Exception | None = None
        while True:
            step = position.step - first
            group: Group | None = None
            late, rates = step > 0 and _late(self.deadline), [0.0]
            if error is None and not late:
                try:
                    group = self.stepper.gradients(calls, generator, self._place())
                    rates = self.stepper.rates(epoch, step, position.batches)
                except Exception as caught:
                    if distributed.world() == 1:
                        raise
                    error, group = caught, None
            held = [float(p.grad is not None) for p in self.parameters.values()]
            ended = float(group is None and not late)
            lates, ends, samples, *holders = distributed.agree(
                error, [float(late), ended, float(group.samples if group else 0), *held], self.device
            )
            if group is None or lates or ends:
                return total, rate, lates > 0 and not ends, sums
            try:
                self.stepper.apply(group, samples, [n > 0 for n in holders], rates, self._place())
            except Exception as caught:
                if distributed.world() == 1:
                    raise
                error = caught
            rate = rates[0]
            sums.update(group.terms)
            total += group.loss
            position.step += 1
            self.bar.show(epoch, (step + 1) / (position.batches or step + 2), total / (step + 1), position.best_quality)

    def _place(self) -> Place:
        kept = "The best state so far is in the model"
        if self.saved is not None:
            kept += f", the state after epoch {self.position.epoch - 1} in {self.saved}"
        return Place(self.position.step, self.position.epoch, kept)

    def _tell(self, record: EpochRecord) -> None:
        with distributed.guarded(self.device):
            for callback in self.callbacks if distributed.rank() == 0 else ():
                try:
                    callback(record)
                except Exception as error:
                    name = getattr(callback, "__qualname__", type(callback).__qualname__)
                    raise RunError(
                        f"the callback {name} raised {type(error).__name__}: {error} after epoch {record.epoch}; it is called with an EpochRecord"
                    ) from error

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
        value = 0.0
        with distributed.guarded(self.device):
            if distributed.rank() == 0:
                value = self._evaluated(self.evaluate)
        return float(distributed.gather(value, self.device)[0])

    def _evaluated(self, evaluate: Evaluate) -> float:
        seed_everything(mix(self.config.seed, "evaluate"), self.generators)  # every epoch is judged on the same draw
        self.model.eval()
        with torch.no_grad():
            if self.ema is None:
                value = float(evaluate(self.model))
            else:
                with self.ema.applied(self.model):
                    value = float(evaluate(self.model))
        if not math.isfinite(value):
            raise DataError(f"the validation value became {value} after epoch {self.position.epoch}; it must be a finite number")
        return value
