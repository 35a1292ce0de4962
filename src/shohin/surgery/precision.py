"""Everything in float64: a proof must not drown in the rounding of a model that computes parts of itself in less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

#: what is widened
NARROW = frozenset((torch.float32, torch.float16, torch.bfloat16))


class _Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Types below float64 that an operation asks for become float64: ``softmax(x, dtype=torch.float32)``, ``x.float()``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


@contextmanager
def double_precision() -> Iterator[None]:
    """Inside, new floats are float64 and attention is computed step by step (fused kernels approximate the exponential)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide(), sdpa_kernel(SDPBackend.MATH):  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


def widen(module: nn.Module) -> nn.Module:
    """All floating tensors of the module in float64, in place; also those that it holds as plain attributes."""
    module.double()
    for child in module.modules():
        for key, value in vars(child).items():
            if type(value) is torch.Tensor and value.dtype in NARROW:
                vars(child)[key] = value.double()
    return module
