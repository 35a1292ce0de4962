"""The tensors that make up a model: parameters and all buffers (also those that a state dict leaves out)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shohin.errors import ModelError

State = dict[str, Tensor]


def live_state(model: nn.Module) -> State:
    """The model's own tensors by qualified name; a shared tensor stands once, under its first name."""
    return {**{n: p.data for n, p in model.named_parameters()}, **dict(model.named_buffers())}


def copy_state(model: nn.Module) -> State:
    """A copy of `live_state` with the same strides."""
    return {name: tensor.detach().clone() for name, tensor in live_state(model).items()}


def norm_of(state: Mapping[str, Tensor]) -> float:
    """The norm of all floating tensors together, to seven digits: tells weights apart."""
    total = sum(float(t.detach().double().square().sum()) for t in state.values() if t.is_floating_point())
    return float(f"{total**0.5:.6e}")


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies tensors into the model, in place.

    Raises:
        ModelError: if names or shapes differ.
    """
    live = live_state(model)
    if live.keys() != state.keys():
        odd = sorted(live.keys() ^ state.keys())
        raise ModelError(f"the state belongs to another model: {len(odd)} names stand on one side only, the first is {odd[0]!r}")
    with torch.no_grad():
        for name, tensor in live.items():
            if tensor.shape != state[name].shape:
                raise ModelError(f"the state belongs to another model: {name} is {tuple(tensor.shape)}, not {tuple(state[name].shape)}")
            tensor.copy_(state[name])


@contextmanager
def training_modes(model: nn.Module) -> Iterator[None]:
    """Gives every submodule its ``training`` flag back on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
