"""Formats of layers that compute on integers: "int8", or "w4a8" for weights of 4 and activations of 8 bits; "int8 dynamic" where the range of
an activation is that of the values at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shohin.errors import PlanError
from shohin.formats.integer import FORMATS, Format

_WORD = re.compile(r"w([2-8])a([2-8])")
_DYNAMIC = " dynamic"
#: "int7" is how plans once wrote weights of 7 bits
_NAMES = {"int8": "w8a8", "int7": "w7a8"}


@dataclass(frozen=True)
class Bits:
    """Integer formats of a layer's weights (symmetric) and of its input (with a zero point).

    Args:
        dynamic: True if each input is rounded in the range that it has itself, False if in one that was chosen from data beforehand.
    """

    weights: Format
    activations: Format
    dynamic: bool = False

    @staticmethod
    def parse(text: str) -> Bits:
        """From "int8" or "wXaY" with 2 to 8 bits each, either with " dynamic" behind it. Raises PlanError for another text."""
        found = _matched(text)
        if found is None:
            raise PlanError(
                f"{text!r} is no format of integer layers: 'int8', or 'wXaY' with 2 to 8 bits each, such as 'w4a8'; 'int8 dynamic' for "
                "ranges of the values at hand"
            )
        return Bits(FORMATS[f"int{found[1]}"], FORMATS[f"uint{found[2]}"], text.endswith(_DYNAMIC))

    def __str__(self) -> str:
        word = "int8" if (self.weights.bits, self.activations.bits) == (8, 8) else f"w{self.weights.bits}a{self.activations.bits}"
        return word + _DYNAMIC * self.dynamic


def is_bits(text: str) -> bool:
    """True for the text of an integer format, False for a weight scheme, "float32" or anything else."""
    return _matched(text) is not None


def is_dynamic(text: str) -> bool:
    """True for the text of an integer format whose ranges of activations are those of the values at hand."""
    return is_bits(text) and text.endswith(_DYNAMIC)


def _matched(text: str) -> re.Match[str] | None:
    word = text.removesuffix(_DYNAMIC)
    return _WORD.fullmatch(_NAMES.get(word, word))


INT8 = Bits.parse("int8")
