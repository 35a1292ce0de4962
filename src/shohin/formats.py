"""Formats: how numbers are held, and quantizers: a format with its scales.

A quantizer maps a real x to the code ``clamp(round(x / scale) + zero_point, low, high)`` (round half to even, as ONNX
QuantizeLinear does) and a code q back to ``(q - zero_point) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shohin.errors import PlanError, closest


@dataclass(frozen=True)
class Format:
    """An integer format. ``low`` and ``high`` bound the codes; a symmetric format has zero point 0."""

    name: str
    bits: int
    low: int
    high: int
    symmetric: bool


FORMATS = {
    f.name: f
    for f in (
        Format("int8", 8, -127, 127, True),
        Format("uint8", 8, 0, 255, False),
        Format("int7", 7, -63, 63, True),  # int8 storage, codes that cannot saturate u8s8 pairs on AVX2
        Format("int32", 32, -(2**31), 2**31 - 1, True),
    )
}


def named_format(name: str) -> Format:
    """The format of that name. Raises PlanError for an unknown one."""
    try:
        return FORMATS[name]
    except KeyError:
        raise PlanError(f"unknown format {name!r}; known: {', '.join(FORMATS)}{closest(name, FORMATS)}") from None


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A format with scales.

    Args:
        format: the integer format.
        scale: float64 tensor, shape () per tensor or (C,) per channel; positive.
        zero_point: int64 tensor of the same shape.
        axis: the channel axis of the tensor it applies to, or None per tensor.
    """

    format: Format
    scale: Tensor
    zero_point: Tensor
    axis: int | None = None

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        if self.axis is None:
            return values.to(like.dtype)
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return values.to(like.dtype).reshape(shape)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x`` as an int64 tensor of the same shape. Scales are rounded to float32, as files hold them."""
        scale = self._spread(self.scale.float(), x)
        zero = self._spread(self.zero_point, x)
        return torch.clamp(torch.round(x / scale) + zero, self.format.low, self.format.high).to(torch.int64)

    def fake(self, x: Tensor) -> Tensor:
        """``x`` snapped to the grid, with straight-through gradients inside the range and none outside."""
        scale = self._spread(self.scale.float(), x)
        zero = self._spread(self.zero_point, x)
        low, high = (self.format.low - zero) * scale, (self.format.high - zero) * scale
        clipped = torch.minimum(torch.maximum(x, low), high)
        snapped = (torch.clamp(torch.round(x / scale) + zero, self.format.low, self.format.high) - zero) * scale
        return clipped + (snapped - clipped).detach()

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; exact, since Python floats print round-trip."""
        return {
            "format": self.format.name,
            "scale": self.scale.tolist(),
            "zero_point": self.zero_point.tolist(),
            "axis": self.axis,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Quantizer:
        """The inverse of `to_json`."""
        return Quantizer(
            named_format(data["format"]),
            torch.tensor(data["scale"], dtype=torch.float64),
            torch.tensor(data["zero_point"], dtype=torch.int64),
            data["axis"],
        )
