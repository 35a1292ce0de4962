"""A model that only answers: in eval mode, without gradients, in a faster form where it has one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shohin.data import Call, first_output
from shohin.distillation.features import Features, recorded
from shohin.distillation.keys import device_of
from shohin.training.state import training_modes

Answer = tuple[Tensor, Features]
"""Logits, and features by module name, one for each time that the module ran."""

#: relative error (of norms) up to which a faster form speaks for the model
AGREES = 1e-3


class Inference:
    """Answers of a model, as tensors that a graph of a student may hold.

    Args:
        model: its modes are given back after each call.
        names: modules whose outputs are features.
        lowered: see `shohin.distillation.Teacher`; None after it was refused.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], lowered: Callable[..., Any] | None) -> None:
        self.model, self.names, self.lowered = model, names, lowered
        self._trusted = self._plain = False
        self._dtype: torch.dtype | None = None

    def __call__(self, call: Call) -> Answer:
        """By the faster form if it can, else by the model."""
        if self.lowered is None:
            return self.run(call)
        try:
            quick = self._quick(self.lowered, call)
        except Exception as error:
            warnings.warn(f"the teacher's faster form cannot run a batch, the model does: {type(error).__name__}: {error}", stacklevel=5)
            if not self._trusted:
                self.lowered = None
            return self.run(call)
        if not self._trusted:
            logits, features = self.run(call)
            quick = quick.to(logits.dtype)
            if (wrong := _difference(quick, logits)) is not None:
                warnings.warn(f"the teacher's faster form {wrong}: the model is used instead", stacklevel=5)
                self.lowered = None
                return logits, features
            self._trusted, self._dtype = True, logits.dtype
        return quick, {}

    def again(self, call: Call) -> Answer:
        """By whatever has answered the last call; raises where that cannot."""
        return self.run(call) if self.lowered is None else (self._quick(self.lowered, call), {})

    def run(self, call: Call) -> Answer:
        """By the model."""
        try:
            with training_modes(self.model):
                self.model.eval()
                try:
                    logits, features = self._forward(call)
                except RuntimeError as error:
                    if self._plain or "nference" not in str(error):
                        raise
                    self._plain = True  # operators that inference mode does not allow
                    logits, features = self._forward(call)
        finally:
            if not self._plain:
                _leave_inference(self.model)
        return _normal(logits), {name: [_normal(t) for t in tensors] for name, tensors in features.items()}

    def _forward(self, call: Call) -> Answer:
        with torch.no_grad() if self._plain else torch.inference_mode(), recorded(self.model, self.names) as features:
            return first_output(self.model(*call.args, **call.kwargs)), features

    def _quick(self, lowered: Callable[..., Any], call: Call) -> Tensor:
        """A copy, since a runner may give the same buffer each time; in the model's type once that is known."""
        return _first(lowered(*call.args, **call.kwargs)).detach().clone().to(device_of(call), self._dtype)


def _difference(quick: Tensor, logits: Tensor) -> str | None:
    """How a faster form's logits differ from the model's, or None."""
    if quick.shape != logits.shape:
        return f"gives shape {tuple(quick.shape)}, not {tuple(logits.shape)}"
    error = float((quick.double() - logits.double()).norm() / logits.double().norm().clamp(min=1e-12))
    return None if error <= AGREES else f"differs from it by {error:.2g} (relative), allowed is {AGREES:g}"


def _first(outputs: Any) -> Tensor:
    """`first_output` of tensors or arrays."""
    if isinstance(outputs, np.ndarray):
        return torch.from_numpy(outputs)
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return _first(outputs[0]) if isinstance(outputs, (tuple, list)) and outputs else first_output(outputs)


def _normal(tensor: Tensor) -> Tensor:
    """A copy that is no inference tensor; without inference mode the tensor itself, which nobody else writes to."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _leave_inference(model: nn.Module) -> None:
    """Tensors that a forward in inference mode left in a module (tables by length, masks) become normal: it may be trained later."""
    for module in model.modules():
        for holder in (module._buffers, vars(module)):
            for name, value in holder.items():
                if isinstance(value, Tensor) and value.is_inference():
                    holder[name] = value.clone()
