"""Quantizers: an integer format with its scales.

A quantizer maps a real x to the code ``clamp(round(x / scale) + zero_point, low, high)`` (round half to even, as ONNX
QuantizeLinear does) and a code q back to ``(q - zero_point) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shohin.formats.integer import Format, named_format


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A format with scales.

    Args:
        format: the integer format.
        scale: float64 tensor, positive: shape () per tensor, (C,) per channel, (C, ceil(F / group)) per group of the F values of a
            channel.
        zero_point: int64 tensor of the same shape.
        axis: the channel axis of the tensor it applies to, or None per tensor; 0 for groups.
        group: how many consecutive values of a channel (the other axes flattened) share a scale, or None. The last group may be
            smaller.
        columns: float64 (I,) factors of the scales along the inputs of a matrix [O, I] whose channels are its outputs, or None: the grid
            of a weight whose inputs were smoothed.
    """

    format: Format
    scale: Tensor
    zero_point: Tensor
    axis: int | None = None
    group: int | None = None
    columns: Tensor | None = None

    @property
    def one_scale(self) -> Quantizer:
        """The grid on which the codes of a smoothed activation are read, its largest scale; any other quantizer as it is."""
        return self if self.axis is None else Quantizer(self.format, self.scale.max(), self.zero_point[0])

    @property
    def factors(self) -> Tensor:
        """What the channels of a smoothed activation are multiplied by before they are rounded on one scale, float64 ``[F]``: the largest
        scale over each scale. They are the ``columns`` of the weights that read it."""
        scale = self.scale.float().double()
        return scale.max() / scale

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Scales or zero points in a shape that broadcasts with the tensor ``like``, in its dtype."""
        if self.axis is None:
            return values.to(like.dtype)
        if self.group is not None:
            each = values.to(like.dtype).repeat_interleave(self.group, 1)
            return each[:, : like[0].numel()].reshape(like.shape)
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return values.to(like.dtype).reshape(shape)

    def steps(self, like: Tensor) -> Tensor:
        """The distance of two codes at each place, in a shape that broadcasts with the tensor; rounded to float32, as files hold scales."""
        scale = self.spread(self.scale.float(), like)
        return scale if self.columns is None else scale * self.columns.to(like.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x`` as an int64 tensor of the same shape. Scales are rounded to float32, as files hold them."""
        scale = self.steps(x)
        zero = self.spread(self.zero_point, x)
        return torch.clamp(torch.round(x / scale) + zero, self.format.low, self.format.high).to(torch.int64)

    def decoded(self, codes: Tensor) -> Tensor:
        """The values of integer codes, float32."""
        codes = codes.float()
        return (codes - self.spread(self.zero_point, codes)) * self.steps(codes)

    def fake(self, x: Tensor) -> Tensor:
        """``x`` snapped to the grid, with straight-through gradients inside the range and none outside."""
        scale = self.steps(x)
        zero = self.spread(self.zero_point, x)
        low, high = (self.format.low - zero) * scale, (self.format.high - zero) * scale
        clipped = torch.minimum(torch.maximum(x, low), high)
        snapped = (torch.clamp(torch.round(x / scale) + zero, self.format.low, self.format.high) - zero) * scale
        return clipped + (snapped - clipped).detach()

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; exact, since Python floats print round-trip."""
        written = {
            "format": self.format.name,
            "scale": self.scale.tolist(),
            "zero_point": self.zero_point.tolist(),
            "axis": self.axis,
        }
        if self.group is not None:
            written["group"] = self.group
        if self.columns is not None:
            written["columns"] = self.columns.tolist()
        return written

    @staticmethod
    def from_json(data: dict[str, Any]) -> Quantizer:
        """The inverse of `to_json`."""
        return Quantizer(
            named_format(data["format"]),
            torch.tensor(data["scale"], dtype=torch.float64),
            torch.tensor(data["zero_point"], dtype=torch.int64),
            data["axis"],
            data.get("group"),
            torch.tensor(data["columns"], dtype=torch.float64) if "columns" in data else None,
        )
