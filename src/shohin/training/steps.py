"""One optimizer step: batches in, gradients, clipping, the update."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shohin.data import Call
from shohin.errors import DataError
from shohin.training.config import Objective, TrainConfig
from shohin.training.distributed import sum_gradients
from shohin.training.ema import Ema
from shohin.training.optimizer import Apart, backward
from shohin.training.precision import autocast, make_scaler
from shohin.training.schedule import Schedule, learning_rate, progress_of

_SMALLEST_SCALE = 2.0**-14
"""Of the float16 loss: gradients that overflow even so do not do so for want of range."""


@dataclass(frozen=True)
class Place:
    """Where a training stands, for error messages.

    Args:
        step, epoch: of the optimizer and the data, from 0.
        kept: where good states are, a sentence.
    """

    step: int
    epoch: int
    kept: str

    def at(self, batch: int) -> str:
        """The place of a batch in words."""
        return f"at step {self.step} (epoch {self.epoch}, batch {batch})"


@dataclass(frozen=True)
class Group:
    """The batches of one step, after their backward pass.

    Args:
        loss, terms: means over the samples.
        samples: number of samples.
        unit: samples for which the gradients are a mean; what is held is their sum over ``samples / unit``.
        batch: index in the epoch of the last one.
    """

    loss: float
    terms: dict[str, float]
    samples: int
    unit: int
    batch: int


class Stepper:
    """Turns batches into optimizer steps.

    Args:
        model, objective, config, ema: see `shohin.training.train`.
        parameters: the trainable ones by name.
        optimizer: over them.
        schedule: the user's, or None.
        own: True if the optimizer is the user's, whose own learning rates count.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainConfig,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        schedule: Schedule | None,
        own: bool,
    ) -> None:
        self.model, self.objective, self.config, self.ema = model, objective, config, ema
        self.parameters, self.optimizer, self.schedule, self.own = parameters, optimizer, schedule, own
        self.device = next(iter(parameters.values())).device
        self.scaler = make_scaler(config, parameters, self.device)
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.apart = optimizer if isinstance(optimizer, Apart) else None
        if self.apart is not None and self.scaler is not None:
            raise DataError(
                f"{type(optimizer).__name__} holds two gradients, of which float16's loss scaling knows one; use precision='bfloat16'"
            )

    def rates(self, epoch: int, step: int, steps: int | None) -> list[float]:
        """The learning rate of each parameter group at a step of an epoch; arguments as in `learning_rate`."""
        if self.schedule is None and not self.own:
            return [learning_rate(self.config, epoch, step, steps)] * len(self.peaks)
        if self.schedule is None:
            factor = learning_rate(self.config, epoch, step, steps) / self.config.lr
        else:
            factor = float(self.schedule(progress_of(self.config, epoch, step, steps)))
            if not (math.isfinite(factor) and factor >= 0):
                raise DataError(f"the schedule returned {factor} at step {step} of epoch {epoch}; it must be a finite number >= 0")
        return [peak * factor for peak in self.peaks]

    def gradients(self, calls: Iterator[tuple[int, Call]], generator: torch.Generator, place: Place) -> Group | None:
        """Takes the next batches and leaves their gradients in the parameters. None if there is no batch left.

        Raises:
            DataError: if the loss is NaN or Inf, or gives no gradient.
        """
        for p in self.parameters.values():
            p.grad = None
        loss, samples, unit, last = 0.0, 0, 0, -1
        terms: Counter[str] = Counter()
        for batch, raw in itertools.islice(calls, self.config.accumulate):
            call = raw if self.config.augment is None else self.config.augment(raw, generator)
            size = max(call.size, 1)
            unit = unit or size
            with autocast(self.config, self.device):
                value, parts = self.objective(self.model, call, generator)
            self._shaped(value)
            self._finite(value, parts, place, batch)
            share = value if size == unit else value * (size / unit)
            share = share if self.scaler is None else self.scaler.scale(share)
            backward(self.optimizer, share)
            loss += float(value.detach().sum() if self.apart is not None else value.detach()) * size
            terms.update({name: part * size for name, part in parts.items()})
            samples, last = samples + size, batch
        if not samples:
            return None
        if all(p.grad is None for p in self.parameters.values()):
            raise DataError(
                f"the objective gave no gradient to any trainable parameter {place.at(last)}: it must be computed from the model's outputs"
            )
        return Group(loss / samples, {name: part / samples for name, part in terms.items()}, samples, unit, last)

    def apply(self, group: Group, samples: float, held: list[bool], rates: list[float], place: Place) -> None:
        """One update.

        Args:
            group: of this process.
            samples: of all processes.
            held: for each parameter, whether any process has a gradient.
            rates: one for each parameter group.
            place: for messages.

        Raises:
            DataError: if a gradient is NaN or Inf.
        """
        for _ in self._each():
            if group.unit != samples:
                for p in self.parameters.values():
                    if p.grad is not None:
                        p.grad.mul_(group.unit / samples)
            sum_gradients(self.parameters, held)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norms: list[Tensor] = []
        for _ in self._each():
            gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
            norms.append(torch.nn.utils.get_total_norm(list(gradients.values())))
            if not math.isfinite(float(norms[-1])) and (self.scaler is None or self.scaler.get_scale() <= _SMALLEST_SCALE):
                self._bad_gradient(gradients, group, place)
        if self.config.clip is not None:
            for _ in self._each():
                torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.clip, norms[0])
        for parameters, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(parameters["lr"], Tensor):
                parameters["lr"].fill_(rate)
            else:
                parameters["lr"] = rate
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, place.step)

    def _each(self) -> Iterator[None]:
        """Once for the gradients of the loss, and once more, in their place, for those that the optimizer keeps of a part of it."""
        yield
        if self.apart is not None:
            with self.apart.aside(self.parameters.values()):
                yield

    def _shaped(self, loss: Tensor) -> None:
        if self.apart is not None and loss.shape != (2,):
            raise DataError(
                f"{type(self.apart).__name__} takes the gradients of two losses apart: the objective must return both, a loss of shape [2]; "
                f"got {tuple(loss.shape)}. In distillation: distill(..., dot=...) or distillation_objective(..., apart=True)"
            )

    def _finite(self, loss: Tensor, terms: Mapping[str, float], place: Place, batch: int) -> None:
        value = float(loss.detach().sum() if self.apart is not None else loss.detach())
        if math.isfinite(value):
            return
        bad = [f"{name}={v}" for name, v in terms.items() if not math.isfinite(v)] or ["the total"]
        raise DataError(
            f"the training loss became {value} {place.at(batch)}; not finite: {', '.join(bad)}. {place.kept}; "
            f"look for NaN in that batch, or lower lr ({self.peaks[0]:g})"
        )

    def _bad_gradient(self, gradients: Mapping[str, Tensor], group: Group, place: Place) -> None:
        name = next((n for n, g in gradients.items() if not bool(torch.isfinite(g).all())), next(iter(gradients)))
        raise DataError(
            f"the gradient of {name} became NaN or Inf {place.at(group.batch)}, though the loss was {group.loss:g}. {place.kept}; "
            f"lower lr ({self.peaks[0]:g}) or look for a square root or logarithm of zero"
        )


def length_of(loader: Any, accumulate: int) -> int | None:
    """Optimizer steps in a pass over a loader, or None if it does not tell."""
    try:
        return math.ceil(len(loader) / accumulate)
    except (TypeError, NotImplementedError):
        return None


def tell_epoch(loader: Any, epoch: int) -> None:
    """Tells a distributed sampler which epoch it is; it shuffles by that number."""
    for part in (loader, getattr(loader, "sampler", None)):
        tell: Callable[[int], None] | None = getattr(part, "set_epoch", None)
        if callable(tell):
            tell(epoch)
