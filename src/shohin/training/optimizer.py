"""Optimizers, and their state by parameter name so that it can be stored without pickling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shohin.errors import ModelError, RunError
from shohin.training.config import TrainConfig


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


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """``{"<key>/<parameter name>": tensor}``. Entries that are None are left out: the optimizers make them anew."""
    out = {}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                out[f"{key}/{name}"] = value
            elif value is not None:
                raise RunError(f"the optimizer keeps {key}={value!r} of {name}, which is not a tensor: it cannot be stored exactly")
    return out


def load_optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`. Tensors take the strides of their parameter, since kernels may round by layout."""
    for key_name, value in state.items():
        key, name = key_name.split("/", 1)
        p = parameters[name]
        if value.shape == p.shape and value.dim():
            value = torch.empty_like(p, dtype=value.dtype).copy_(value)
        optimizer.state[p][key] = value.detach().clone(memory_format=torch.preserve_format)
