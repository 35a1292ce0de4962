"""Mixed precision (Micikevicius et al., 2018): the objective in half precision, weights and optimizer in single."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from shohin.errors import DataError
from shohin.training.config import TrainConfig


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of the objective."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.precision))


def make_scaler(config: TrainConfig, parameters: Mapping[str, nn.Parameter], device: torch.device) -> torch.amp.GradScaler | None:
    """The scaler of float16, whose gradients would underflow; None for the other precisions.

    Raises:
        DataError: if float16 is asked for on another device than CUDA, or the weights themselves are float16.
    """
    if config.precision != "float16":
        return None
    if device.type != "cuda":
        raise DataError(f"TrainConfig(precision='float16') needs a CUDA device; the model is on {device}. Use 'bfloat16' or 'float32'")
    half = next((name for name, p in parameters.items() if p.dtype == torch.float16), None)
    if half is not None:
        raise DataError(f"TrainConfig(precision='float16') keeps the weights in float32, but {half} is float16; call model.float() first")
    return torch.amp.GradScaler("cuda")
