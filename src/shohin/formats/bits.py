"""Formats of layers that compute on integers, as one word: "int8", or "w4a8" for weights of 4 and activations of 8 bits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shohin.errors import PlanError
from shohin.formats.integer import FORMATS, Format

_WORD = re.compile(r"w([2-8])a([2-8])")
#: "int7" is how plans once wrote weights of 7 bits
_NAMES = {"int8": "w8a8", "int7": "w7a8"}


@dataclass(frozen=True)
class Bits:
    """Integer formats of a layer's weights (symmetric) and of its input (with a zero point)."""

    weights: Format
    activations: Format

    @staticmethod
    def parse(text: str) -> Bits:
        """From "int8" or "wXaY" with 2 to 8 bits each. Raises PlanError for another word."""
        found = _WORD.fullmatch(_NAMES.get(text, text))
        if found is None:
            raise PlanError(f"{text!r} is no format of integer layers: 'int8', or 'wXaY' with 2 to 8 bits each, such as 'w4a8'")
        return Bits(FORMATS[f"int{found[1]}"], FORMATS[f"uint{found[2]}"])

    def __str__(self) -> str:
        return "int8" if (self.weights.bits, self.activations.bits) == (8, 8) else f"w{self.weights.bits}a{self.activations.bits}"


def is_bits(text: str) -> bool:
    """True for the word of an integer format, False for a weight scheme, "float32" or anything else."""
    return _WORD.fullmatch(_NAMES.get(text, text)) is not None


INT8 = Bits.parse("int8")
