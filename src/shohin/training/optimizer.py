"""Optimizers, the user's or ours, and their state by parameter name so that it can be stored without pickling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shohin.errors import DataError, ModelError, RunError
from shohin.training.config import TrainConfig

Named = list[tuple[str, nn.Parameter]]
MakeOptimizer = Callable[[Named], torch.optim.Optimizer]
"""``make([(name, parameter), ...]) -> optimizer``; torch's optimizers take such a list as it is."""


class Apart(torch.optim.Optimizer):
    """An optimizer that needs the gradient of one part of the loss apart from that of the whole.

    ``p.grad`` holds the gradient of the whole, as ever; ``part[p]`` that of the part. What is done linearly to the one (a mean over
    batches, a sum over processes, clipping) must be done to the other, see `aside`. For the training loop, the objective of such an
    optimizer returns a loss of shape ``[2]``: what `backward` takes.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.part: dict[Tensor, Tensor] = {}

    def backward(self, rest: Tensor, part: Tensor) -> None:
        """Adds the gradients of ``rest + part`` and of ``part`` (scalars) to those held: two passes through one graph."""
        self.part = {p: gradient for p, gradient in self.part.items() if p.grad is not None}
        if part.requires_grad:
            own = self._own()
            with self.aside(own):
                part.backward(retain_graph=True, inputs=own)  # type: ignore[no-untyped-call]
        (rest + part).backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def aside(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Inside, ``p.grad`` of the ``parameters`` is the gradient of the part, and what becomes of it is kept as such."""
        whole = [(p, p.grad) for p in parameters]
        for p, _ in whole:
            p.grad = self.part.pop(p, None)
        try:
            yield
        finally:
            for p, gradient in whole:
                if p.grad is not None:
                    self.part[p] = p.grad
                p.grad = gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets both gradients."""
        self.part.clear()
        super().zero_grad(set_to_none)

    def _own(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]


def backward(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """The backward pass that an optimizer needs."""
    if isinstance(optimizer, Apart):
        optimizer.backward(*loss.unbind())
    else:
        loss.backward()  # type: ignore[no-untyped-call]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name.

    Raises:
        ModelError: if there is none, or one holds NaN or Inf already.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ModelError("nothing to train: no parameter of the model requires gradients; call requires_grad_() on those that shall learn")
    for name, p in found.items():
        if not bool(torch.isfinite(p.detach()).all()):
            raise ModelError(f"the model cannot be trained: parameter {name} holds NaN or Inf before the first step")
    return found


def make_optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a config; weight decay only on parameters with two dimensions or more."""
    heavy = [p for p in parameters.values() if p.dim() > 1]
    light = [p for p in parameters.values() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay} for params, decay in ((heavy, config.weight_decay), (light, 0.0)) if params
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups, lr=config.lr)


def own_optimizer(make: MakeOptimizer, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The user's optimizer.

    Raises:
        DataError: if ``make`` does not return a torch optimizer over (some of) the model's parameters.
    """
    optimizer = make(list(parameters.items()))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DataError(
            f"optimizer=... must return a torch.optim.Optimizer; got {type(optimizer).__name__}. It is called with a list of "
            "(name, parameter): optimizer=lambda named: torch.optim.SGD(named, lr=0.1)"
        )
    own = {id(p) for p in parameters.values()}
    foreign = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise DataError(
            f"the optimizer holds {foreign} parameters that are not the model's trainable ones; make it from the list it is given"
        )
    return optimizer


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors and plain values of the state; the learning rate is left out, it is set at every step.

    Returns:
        ``{"<key>/<parameter name>": tensor}`` and, JSON-able, "values" of the state under the same names, "options" of the groups
        under "<key>/<group>", and under "cpu" the tensors that stand on the CPU while their parameter does not.

    Raises:
        RunError: if something is neither a tensor, a number, a string, None, nor a list of those.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    cpu: dict[str, Any] = {}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
                if value.device != p.device:
                    cpu[f"{key}/{name}"] = True
            else:
                values[f"{key}/{name}"] = _plain(value, f"{key} of {name}")
    own = {id(p) for p in parameters.values()}
    for odd in optimizer.state:
        if id(odd) not in own:
            raise RunError(f"the optimizer keeps state under {odd!r}, which is not a parameter: it cannot be stored exactly")
    options = {}
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "param_names", "lr", "initial_lr"):
                value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
                options[f"{key}/{i}"] = _plain(value, f"{key} of group {i}")
    return tensors, {"values": values, "options": options, "cpu": cpu}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Mapping[str, Any]],
) -> None:
    """The inverse of `optimizer_state`. Tensors take the strides of their parameter, since kernels may round by layout."""
    for key_name, value in tensors.items():
        key, name = key_name.split("/", 1)
        p = parameters[name]
        device = value.device if key_name in plain.get("cpu", {}) else p.device
        if not plain and not value.dim():
            device = value.device  # written before places were stored: a step count
        if value.shape == p.shape and value.dim():
            value = torch.empty_like(p, dtype=value.dtype, device=device).copy_(value)
        optimizer.state[p][key] = value.detach().to(device).clone(memory_format=torch.preserve_format)
    for key_name, value in plain.get("values", {}).items():
        key, name = key_name.split("/", 1)
        optimizer.state[parameters[name]][key] = value
    for key_name, value in plain.get("options", {}).items():
        key, number = key_name.rsplit("/", 1)
        group = optimizer.param_groups[int(number)]
        now = group.get(key)
        if isinstance(now, Tensor):
            now.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(now, tuple) else value


def _plain(value: Any, what: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(v is None or isinstance(v, (bool, int, float, str)) for v in value):
        return list(value)
    raise RunError(
        f"the optimizer keeps {what} = {value!r}, which is neither a tensor nor a plain value: it cannot be stored exactly; "
        "train without a checkpoint or with another optimizer"
    )
