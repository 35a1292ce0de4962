"""Floating-point formats in simulation: which values there are, and rounding to the nearest.

fp16 is IEEE 754 binary16, bf16 the upper half of binary32; e4m3 and e5m2 are those of the OCP 8-bit Floating Point
Specification (Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433, table 1); e3m2, e2m3 and e2m1 are
elements of the OCP Microscaling Formats Specification v1.0 (Rouhani et al. 2023, arXiv 2310.10537, table 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.errors import PlanError, closest
from shohin.formats.powers import power_below


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format with a sign bit and subnormals: ``mantissa / 2**mantissa_bits * 2**exponent``.

    Args:
        name: as in plans.
        exponent_bits: of the exponent field.
        mantissa_bits: after the leading one, which is not stored.
        bias: the exponent field less the exponent; fields 0 and 1 share the exponent ``1 - bias``.
        largest: the largest finite value. It follows from the bits only where it is known which codes are not numbers.
        infinity: whether there are codes for the infinities.
        nan: whether there are codes for NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    infinity: bool = False
    nan: bool = False

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal; the subnormals are its multiples."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def top_exponent(self) -> int:
        """The exponent of the largest value (emax in the specifications)."""
        return math.frexp(self.largest)[1] - 1

    def largest_in(self, dtype: torch.dtype) -> float:
        """The largest value of this format that tensors of the dtype can hold: below ``largest`` for fp16 in bfloat16 or the reverse."""
        held = torch.finfo(dtype)
        most = min(self.largest, held.max)
        bits = min(self.mantissa_bits, round(-math.log2(held.eps)))
        step = 2.0 ** (math.frexp(most)[1] - 1 - bits)
        return math.floor(most / step) * step

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` rounded to the nearest value of the format, ties to the even mantissa. Exact; same shape and dtype.

        Saturates as OCP's saturating conversion does: what lies beyond the largest value, infinities too, becomes the largest value
        with its sign, even where the format has infinities (`largest_in` says which value that is). Zero keeps its sign. NaN stays
        NaN, also in formats that have no code for it, so that a broken model is seen. Gradients pass straight through where
        ``|x|`` is at most the largest value and stop beyond it.
        """
        check_floating(self.name, x)
        limit = self.largest_in(x.dtype)
        clipped = x.double().clamp(-limit, limit)
        held = clipped.detach()
        step = (power_below(held) * 2.0**-self.mantissa_bits).clamp(min=self.smallest)
        snapped = torch.round(held / step) * step
        # held - clipped is +0 and carries the gradient; subtracting it, unlike adding it, keeps the sign of -0
        return (snapped - (held - clipped)).to(x.dtype)


def check_floating(name: str, x: Tensor) -> None:
    """Raises PlanError if ``x`` is not a floating-point tensor."""
    if not x.is_floating_point():
        raise PlanError(
            f"format {name!r} rounds floating-point tensors, not {x.dtype} (shape {tuple(x.shape)}); "
            f"leave this tensor out of the plan or convert it first"
        )


FLOAT_FORMATS = {
    f.name: f
    for f in (
        FloatFormat("fp16", 5, 10, 15, 65504.0, infinity=True, nan=True),
        FloatFormat("bf16", 8, 7, 127, (2 - 2.0**-7) * 2.0**127, infinity=True, nan=True),
        FloatFormat("e4m3", 4, 3, 7, 448.0, nan=True),  # e4m3fn: one mantissa of the top exponent is NaN, the others are numbers
        FloatFormat("e5m2", 5, 2, 15, 57344.0, infinity=True, nan=True),
        FloatFormat("e3m2", 3, 2, 3, 28.0),
        FloatFormat("e2m3", 2, 3, 1, 7.5),
        FloatFormat("e2m1", 2, 1, 1, 6.0),
    )
}


def named_float(name: str) -> FloatFormat:
    """The floating-point format of that name. Raises PlanError for an unknown one."""
    try:
        return FLOAT_FORMATS[name]
    except KeyError:
        raise PlanError(f"unknown float format {name!r}; known: {', '.join(FLOAT_FORMATS)}{closest(name, FLOAT_FORMATS)}") from None
