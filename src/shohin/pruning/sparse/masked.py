"""Training that keeps zeros exactly zero, under any optimizer and in the user's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from shohin.errors import PlanError, closest
from shohin.plan import Plan
from shohin.pruning.sparse.patterns import Pattern


def masks_of(model: nn.Module, plan: Plan | Mapping[str, Pattern | str]) -> dict[str, Tensor]:
    """Where the planned weights of a sparse model are not zero: name -> boolean mask.

    Raises:
        PlanError: if a weight is unknown, or its zeros do not have the planned pattern.
    """
    patterns = plan.sparsity if isinstance(plan, Plan) else plan
    parameters = _parameters(model)
    found = {}
    for name, text in patterns.items():
        weight, pattern = _known(parameters, name), Pattern.parse(text)
        pattern.check(weight.shape, name)
        if not pattern.holds(weight):
            raise PlanError(f"the zeros of {name} do not have the pattern {str(pattern)!r} yet: load the values of sparsify first")
        found[name] = weight.detach() != 0
    return found


@contextmanager
def masked(model: nn.Module, plan: Plan | Mapping[str, Pattern | str] | Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside, the masked elements of the model's weights stay exactly zero whatever trains it::

        with masked(model, plan):
            for x, y in loader: ...

    Gradients are masked as they arrive (so that momentum and second moments of the zeros stay zero), weights are set to zero
    after each step of a `torch.optim` optimizer that holds them, before each forward pass of the model (for optimizers of other
    libraries and writes by hand), after ``load_state_dict`` and on leaving. Averages of the weights are zero because all that they average
    is. ``model.to(...)`` is followed. A ``deepcopy`` made inside is guarded from its first forward pass until the end of the block.
    Not followed: forward passes of a sub-module on its own after a foreign optimizer's step, a parameter that is replaced by a
    parametrization inside the block, and processes that other code starts.

    Args:
        plan: a plan with ``sparsity``, or weight name -> pattern: the weights have their zeros already (see `masks_of`). Or weight
            name -> boolean mask of its shape, True for what stays: the rest becomes zero on entering.

    Raises:
        PlanError: if a weight is unknown, a mask does not fit, or the zeros do not have the planned pattern.
    """
    scope = _Scope()
    guard = _Guard(model, _masks(model, plan), scope)
    handles: list[RemovableHandle] = [
        model.register_forward_pre_hook(guard.before_forward, prepend=True),
        model.register_load_state_dict_post_hook(guard.after_loading),  # type: ignore[no-untyped-call]
        register_optimizer_step_post_hook(scope.after_step),
    ]
    try:
        guard.apply()
        yield model
    finally:
        for handle in handles:
            handle.remove()
        scope.close()


def _masks(model: nn.Module, plan: Plan | Mapping[str, Pattern | str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(plan, Plan):
        return masks_of(model, plan)
    parameters = _parameters(model)
    found: dict[str, Tensor] = {}
    for name, value in plan.items():
        if not isinstance(value, Tensor):
            found |= masks_of(model, {name: value})
            continue
        weight = _known(parameters, name)
        if value.dtype != torch.bool or value.shape != weight.shape:
            raise PlanError(
                f"the mask of {name} must be boolean and {tuple(weight.shape)}; got {value.dtype} {tuple(value.shape)} (True stays)"
            )
        found[name] = value.detach().clone()
    return found


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _known(parameters: Mapping[str, nn.Parameter], name: str) -> nn.Parameter:
    if name not in parameters:
        raise PlanError(f"the model has no parameter {name!r}{closest(name, parameters)}")
    return parameters[name]


class _Scope:
    """One ``with`` block; shared by the guards of the model and of the copies made inside."""

    def __init__(self) -> None:
        self.open = True
        self.guards: WeakSet[_Guard] = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Scope:
        return self

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Zeros again in the weights that the optimizer holds."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for guard in list(self.guards):
            guard.apply(held)

    def close(self) -> None:
        for guard in list(self.guards):
            guard.apply()
            guard.release()
        self.open = False


class _Guard:
    """The masks of one model, found by name each time: its parameters may move or be replaced."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], scope: _Scope) -> None:
        self.model, self.masks, self.scope = model, masks, scope
        self.hooked: dict[str, tuple[nn.Parameter, RemovableHandle | None]] = {}
        scope.guards.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Guard:
        copy = memo[id(self)] = _Guard.__new__(_Guard)
        copy.model, copy.scope, copy.hooked = memo.get(id(self.model), self.model), self.scope, {}
        copy.masks = {name: mask.clone() for name, mask in self.masks.items()}
        self.scope.guards.add(copy)
        return copy

    def __reduce__(self) -> Any:
        """A pickled model (``torch.save(model)``) is a plain one: what reads it again is outside of the block."""
        return (_Nothing, ())

    def apply(self, only: set[int] | None = None) -> None:
        """Zeros in the weights (those with an id in ``only``); written beside autograd, for which nothing has changed."""
        parameters = _parameters(self.model)
        for name, mask in self.masks.items():
            weight = parameters.get(name)
            if weight is None or not self.scope.open or (only is not None and id(weight) not in only):
                continue
            if mask.device != weight.device:
                mask = self.masks[name] = mask.to(weight.device)
            weight.data.masked_fill_(~mask, 0.0)
            self._hook(name, weight)

    def _hook(self, name: str, weight: nn.Parameter) -> None:
        known = self.hooked.get(name)
        if known is not None and known[0] is weight and (known[1] is not None or not weight.requires_grad):
            return
        if known is not None and known[1] is not None:
            known[1].remove()
        handle = None
        if weight.requires_grad:
            handle = weight.register_hook(lambda gradient: gradient.masked_fill(~self.masks[name].to(gradient.device), 0.0))  # type: ignore[no-untyped-call]
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.masks[name], 0.0)
        self.hooked[name] = (weight, handle)

    def release(self) -> None:
        """Takes the hooks of the gradients away."""
        for _, handle in self.hooked.values():
            if handle is not None:
                handle.remove()
        self.hooked.clear()

    def before_forward(self, module: nn.Module, args: Any) -> None:
        self.apply()

    def after_loading(self, module: nn.Module, incompatible: Any) -> None:
        self.apply()


class _Nothing:
    """What a guard becomes in a pickle: bound methods that do nothing."""

    def before_forward(self, module: nn.Module, args: Any) -> None:
        return None

    def after_loading(self, module: nn.Module, incompatible: Any) -> None:
        return None
