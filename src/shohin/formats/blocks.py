"""Block formats in simulation: small elements that share a power-of-two scale.

The formats are those of the OCP Microscaling Formats (MX) Specification v1.0 (Rouhani et al. 2023, Microscaling Data Formats for
Deep Learning, arXiv 2310.10537, table 1 and algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.errors import PlanError, closest
from shohin.formats.floating import FLOAT_FORMATS, FloatFormat, check_floating
from shohin.formats.powers import power_below

#: bits of a shared scale, e8m0: a biased exponent alone, 2**-127 to 2**127 and one code for NaN
SCALE_BITS = 8
_SCALES = (2.0**-127, 2.0**127)


@dataclass(frozen=True)
class BlockFormat:
    """A format whose values come in blocks; a block has one shared scale.

    Args:
        name: as in plans.
        element: the format of one value divided by the scale.
        block: how many consecutive values share a scale.
    """

    name: str
    element: FloatFormat
    block: int = 32

    def __post_init__(self) -> None:
        if self.block < 1:
            raise PlanError(f"block format {self.name!r} has blocks of {self.block} values; give at least 1")

    @property
    def bits(self) -> float:
        """Bits per value, with its part of the shared scale: 4.25 for mxfp4. A block that is not full costs more per value."""
        return self.element.bits + SCALE_BITS / self.block

    def scales(self, x: Tensor, axis: int = -1) -> Tensor:
        """The shared scales, float64, of the shape of ``x`` with ``ceil(n / block)`` in place of the ``n`` values of the axis."""
        return self._scales(self._blocks(x, axis)).squeeze(-1).movedim(-1, axis)

    def rounded(self, x: Tensor, axis: int = -1) -> Tensor:
        """``x`` rounded to the format, in blocks along ``axis`` (the last block may be smaller). Exact; same shape and dtype.

        The scale of a block is ``2**(floor(log2(max|x|)) - emax)``, emax the exponent of the element's largest value, with its own
        exponent clamped to -127..127. Elements round to nearest, ties to even, and saturate: where the block's maximum, scaled, lies
        between the largest element and the next power of two, it becomes the largest element. Zero keeps its sign and a block of
        zeros stays so. A block that holds a NaN or an infinity has no scale and becomes NaN throughout, as in the emulation by the
        authors (microsoft/microxcaling). Gradients pass straight through, the scale taken as a constant, and stop where an element
        saturates.
        """
        blocks = self._blocks(x, axis)
        scale = self._scales(blocks)
        near = (self.element.rounded(blocks / scale) * scale).flatten(-2)
        return near[..., : x.shape[axis]].movedim(-1, axis).to(x.dtype)

    def _blocks(self, x: Tensor, axis: int) -> Tensor:
        """Float64 of shape (other axes, blocks, block), the last block padded with zeros, which cannot raise its maximum."""
        check_floating(self.name, x)
        if not -x.dim() <= axis < x.dim():
            raise PlanError(f"block format {self.name!r} has no axis {axis} in a tensor of shape {tuple(x.shape)}; give one it has")
        wide = x.double().movedim(axis, -1)
        count = -(-wide.shape[-1] // self.block)
        wide = torch.nn.functional.pad(wide, (0, count * self.block - wide.shape[-1]))
        return wide.reshape(*wide.shape[:-1], count, self.block)

    def _scales(self, blocks: Tensor) -> Tensor:
        most = blocks.detach().abs().amax(-1, keepdim=True)
        scale = (power_below(most) * 2.0**-self.element.top_exponent).clamp(*_SCALES)
        return torch.where(most.isfinite(), scale, torch.nan)


#: The codes -127..127 of int8 times the implied scale 2**-6, written as a float format: with one exponent bit and bias 1 the
#: subnormals and the only binade have the same step. The code -128 (-2.0) is left unused, as in the authors' emulation: the values
#: are symmetric, so negating a tensor negates what it rounds to.
_INT8 = FloatFormat("int8", 1, 6, 1, 127 / 64)

BLOCK_FORMATS = {
    f.name: f
    for f in (
        BlockFormat("mxfp8-e4m3", FLOAT_FORMATS["e4m3"]),
        BlockFormat("mxfp8-e5m2", FLOAT_FORMATS["e5m2"]),
        BlockFormat("mxfp6-e3m2", FLOAT_FORMATS["e3m2"]),
        BlockFormat("mxfp6-e2m3", FLOAT_FORMATS["e2m3"]),
        BlockFormat("mxfp4", FLOAT_FORMATS["e2m1"]),
        BlockFormat("mxint8", _INT8),
    )
}


def named_block(name: str) -> BlockFormat:
    """The block format of that name. Raises PlanError for an unknown one."""
    try:
        return BLOCK_FORMATS[name]
    except KeyError:
        raise PlanError(f"unknown block format {name!r}; known: {', '.join(BLOCK_FORMATS)}{closest(name, BLOCK_FORMATS)}") from None
