"""State that a pruning method keeps beside the optimizer's own, so that the checkpoints of training hold both.

Training stores an optimizer's state by parameter name and the plain values of its groups. What a method needs to go on
(masks, scores, the count of steps) is put there, and hidden from the optimizer while it makes its step, since optimizers take
an empty state as the sign of their first one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.errors import RunError
from shohin.training import Objective, TrainConfig, TrainResult, train
from shohin.training.loggers import Callback
from shohin.training.optimizer import MakeOptimizer, Named, make_optimizer
from shohin.training.schedule import Schedule
from shohin.training.steps import length_of

_OURS = "pruning_"
_STEPS = "pruning_steps"
_SETTINGS = "pruning_settings"


class Training(TypedDict, total=False):
    """What is handed on to `shohin.training.train`. ``evaluate`` is not among it: the best epoch of a training that grows zeros
    would be the first one, so the last state counts.
    """

    checkpoint: Path | None
    deadline: float | None
    progress: bool
    optimizer: MakeOptimizer | None
    schedule: Schedule | None
    callbacks: Sequence[Callback]


class Beside:
    """What a method keeps beside an optimizer.

    Args:
        optimizer: whose state is shared.
        parameters: the trainable ones by name.
        settings: of the method, JSON-able; a checkpoint written with others is refused.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], settings: Mapping[str, Any]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self._settings = json.dumps(settings, sort_keys=True)
        self._group.update({_STEPS: 0, _SETTINGS: self._settings})

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self.optimizer.param_groups[0]
        return group

    @property
    def steps(self) -> int:
        """Optimizer steps done: in ``before`` without the coming one, in ``after`` with the one just done."""
        return int(self._group[_STEPS])

    def count(self) -> None:
        """One step more."""
        self._group[_STEPS] = self.steps + 1

    def get(self, name: str, key: str) -> Tensor | None:
        """What was put under a parameter's name and a key, or None."""
        found: Tensor | None = self.optimizer.state[self.parameters[name]].get(_OURS + key)
        return found

    def put(self, name: str, key: str, value: Tensor) -> None:
        """Keeps a tensor; the key holds no "/"."""
        self.optimizer.state[self.parameters[name]][_OURS + key] = value

    def moments(self, name: str) -> list[Tensor]:
        """The optimizer's own tensors of a parameter's shape: momentum, averages of squares."""
        p = self.parameters[name]
        state = self.optimizer.state[p].items()
        return [v for k, v in state if not k.startswith(_OURS) and isinstance(v, Tensor) and v.shape == p.shape and v.dim()]

    def hide(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Takes our tensors out of the optimizer's state and returns them."""
        out = {}
        for p in self.parameters.values():
            state = self.optimizer.state.get(p, {})
            out[p] = {key: state.pop(key) for key in [k for k in state if k.startswith(_OURS)]}
        return out

    def show(self, hidden: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """The inverse of `hide`."""
        for p, tensors in hidden.items():
            if tensors:
                self.optimizer.state[p].update(tensors)

    def check(self) -> None:
        """Raises RunError if the state was read from a checkpoint that was written with other settings."""
        there = self._group[_SETTINGS]
        if there != self._settings:
            old, new = json.loads(there), json.loads(self._settings)
            key = next(k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))
            raise RunError(
                f"the checkpoint belongs to another pruning: {key} is {old.get(key)!r} there, {new.get(key)!r} here; "
                "delete it or choose another path"
            )


Hook = Callable[[Beside], None]


def train_with(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig,
    settings: Mapping[str, Any],
    after: Hook,
    before: Hook | None = None,
    **training: Unpack[Training],
) -> tuple[TrainResult, Beside]:
    """`shohin.training.train` with something done around every optimizer step.

    Args:
        settings: of the method, JSON-able; see `Beside`.
        after: called after each step, without gradients: parameters are new, gradients still there.
        before: called before each step, without gradients: gradients are complete (summed, clipped).
        training: see `Training`.

    Raises:
        RunError: as `train` does, and if the checkpoint was written with other settings.
    """
    own = training.get("optimizer")
    made: list[Beside] = []

    def make(named: Named) -> torch.optim.Optimizer:
        optimizer = make_optimizer(dict(named), config) if own is None else own(named)
        if isinstance(optimizer, torch.optim.Optimizer):  # what else it may be, training refuses in its own words
            made.append(Beside(optimizer, dict(named), settings))
            _around(optimizer, made[0], before, after)
        return optimizer

    training["optimizer"] = make
    result = train(model, data, objective, config, **training)
    made[0].check()
    return result, made[0]


def _around(optimizer: torch.optim.Optimizer, beside: Beside, before: Hook | None, after: Hook) -> None:
    hidden: list[dict[nn.Parameter, dict[str, Tensor]]] = []

    def pre(*_: Any) -> None:
        beside.check()
        if before is not None:
            with torch.no_grad():
                before(beside)
        hidden.append(beside.hide())

    def post(*_: Any) -> None:
        beside.show(hidden.pop())
        beside.count()
        with torch.no_grad():
            after(beside)

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(post)


def name_of(function: object) -> str:
    """A function's or value's name in the settings of a checkpoint."""
    name = getattr(function, "__qualname__", "")
    return name or (type(function).__qualname__ if type(function).__repr__ is object.__repr__ else repr(function))


def steps_in(data: Data, config: TrainConfig) -> int | None:
    """Optimizer steps of a whole training, or None if the loader does not tell its length."""
    own = length_of(data.train if data.train is not None else data.validation, config.accumulate)
    return None if own is None else own * config.epochs
