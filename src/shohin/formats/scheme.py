"""Weight schemes: how a layer holds its weights while its activations stay float, as one line of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shohin.errors import PlanError
from shohin.formats.integer import Format, named_format
from shohin.formats.quantizer import Quantizer

PREFIX = "weights "
_FORM = "'weights FORMAT', 'weights FORMAT tensor', 'weights FORMAT channel' or 'weights FORMAT group N', such as 'weights uint4 group 32'"


@dataclass(frozen=True)
class Scheme:
    """An integer format and which weights share a scale.

    Args:
        format: of the codes; an asymmetric one ("uint4") has a zero point beside each scale.
        granularity: what shares a scale: the tensor, an output channel, or ``group`` consecutive weights of a channel.
        group: weights of a group.
    """

    format: Format
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group: int | None = None

    @staticmethod
    def parse(text: str) -> Scheme:
        """A scheme from its text. Raises PlanError for another form or an unknown format."""
        words = text.split()
        if not words or words[0] != PREFIX.strip() or len(words) < 2:
            raise PlanError(f"{text!r} is no weight format: {_FORM}")
        form, rest = named_format(words[1]), words[2:]
        if form.bits > 8:
            raise PlanError(f"{text!r}: weights have at most 8 bits, and {form.name} has {form.bits}")
        if rest in (["tensor"], ["channel"], []):
            return Scheme(form, "tensor" if rest == ["tensor"] else "channel")
        if len(rest) == 2 and rest[0] == "group" and rest[1].isdecimal() and int(rest[1]) > 0:
            return Scheme(form, "group", int(rest[1]))
        raise PlanError(f"{text!r} is no weight format: {_FORM}")

    @staticmethod
    def of(quantizer: Quantizer) -> Scheme:
        """The scheme of a weight's quantizer."""
        granularity: Literal["tensor", "channel", "group"] = (
            "tensor" if quantizer.axis is None else "group" if quantizer.group else "channel"
        )
        return Scheme(quantizer.format, granularity, quantizer.group)

    def __str__(self) -> str:
        return f"{PREFIX}{self.format.name} {self.granularity}{f' {self.group}' if self.group else ''}"

    def size(self, outputs: int, inputs: int) -> int:
        """Bytes of a weight ``[outputs, inputs]``: packed codes, float32 scales, packed zero points."""
        scales = {"tensor": 1, "channel": outputs, "group": outputs * math.ceil(inputs / (self.group or inputs))}[self.granularity]
        zeros = 0 if self.format.symmetric else scales * self.format.bits
        return math.ceil(outputs * inputs * self.format.bits / 8) + 4 * scales + math.ceil(zeros / 8)


def is_scheme(text: str) -> bool:
    """True for the text of a weight scheme, False for a format of weights and activations."""
    return text.startswith(PREFIX)
