"""Integer formats: which codes there are."""

from __future__ import annotations

from dataclasses import dataclass

from shohin.errors import PlanError, closest


@dataclass(frozen=True)
class Format:
    """An integer format. ``low`` and ``high`` bound the codes; a symmetric format has zero point 0."""

    name: str
    bits: int
    low: int
    high: int
    symmetric: bool


def _signed(bits: int) -> Format:
    return Format(f"int{bits}", bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, True)


def _unsigned(bits: int) -> Format:
    return Format(f"uint{bits}", bits, 0, 2**bits - 1, False)


FORMATS = {
    f.name: f
    for f in (
        *(_signed(bits) for bits in range(2, 7)),
        Format("int7", 7, -63, 63, True),  # int8 storage, codes that cannot saturate u8s8 pairs on AVX2
        Format("int8", 8, -127, 127, True),
        *(_unsigned(bits) for bits in range(2, 9)),
        Format("int32", 32, -(2**31), 2**31 - 1, True),
    )
}


def named_format(name: str) -> Format:
    """The format of that name. Raises PlanError for an unknown one."""
    try:
        return FORMATS[name]
    except KeyError:
        raise PlanError(f"unknown format {name!r}; known: {', '.join(FORMATS)}{closest(name, FORMATS)}") from None
