"""Powers of two near a number, exactly: from the bits, since a rounded log2 is off by one beside a power."""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.errors import PlanError

#: sign and fraction cleared, the exponent field of a float64 is the power of two itself
_EXPONENT = 0x7FF0000000000000


def power_below(x: Tensor) -> Tensor:
    """The largest power of two that is at most ``|x|``, for a float64 tensor; detached.

    0 where ``x`` is 0 or a float64 subnormal, infinity where it is infinite or NaN.
    """
    return (x.detach().view(torch.int64) & _EXPONENT).view(torch.float64)


def power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is at least ``scale``: a range that the scale covered stays covered. Same dtype, detached.

    Raises PlanError for a scale that is not positive, not finite or above the largest power of two of its dtype.
    """
    wide = scale.detach().double()
    fraction, _ = torch.frexp(wide)  # in [0.5, 1): the quotient below is a power of two, and so exact
    power = torch.where(fraction == 0.5, wide, wide / fraction).to(scale.dtype)
    wrong = wide[~((wide > 0) & power.isfinite())]
    if wrong.numel():
        raise PlanError(
            f"{wrong.numel()} of {scale.numel()} scales, the first {float(wrong[0])!r}, have no power of two above them in "
            f"{scale.dtype}; scales must be positive and finite: give a range that is neither empty nor infinite"
        )
    return power
