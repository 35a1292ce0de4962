"""Accuracy before bits: which layers must stay float so that quality keeps a bound, and why each of them.

Layers are ordered by how far their own rounding moves the model's answers, to first order (see `shohin.quantization.damage`). So the fewest
go back, and a search over how many needs some measurements of quality, not one for each layer. Where it is the codes of its input that do
the damage, the layer that makes these codes goes back with it: a layer that reads codes gains nothing from computing in floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from shohin.data import Call
from shohin.program import Program
from shohin.quantization.causes import beyond_ranges, unlike_training
from shohin.quantization.damage import Damage, damages
from shohin.quantization.quantized import Quantized


@dataclass(frozen=True)
class Kept:
    """A quantized program that keeps a bound on quality.

    Args:
        quantized: it.
        formats: of the layers that are not float.
        returned: address of each layer that stays float -> why.
        quality: of the float program, of the one with every layer quantized, and of this one.
    """

    quantized: Quantized
    formats: dict[str, str]
    returned: dict[str, str]
    quality: tuple[float, float, float]


def fewest_returned(
    program: Program,
    calls: Sequence[Call],
    formats: Mapping[str, str],
    make: Callable[[Mapping[str, str]], Quantized],
    quality: Callable[[nn.Module], float],
    plain: float,
    holds: Callable[[float], bool],
    fresh: Sequence[Call] = (),
    seed: int = 0,
) -> Kept:
    """Quantizes all but the fewest layers with which quality holds; those whose rounding moves the answers most go back first.

    Args:
        formats: address of each layer -> its format.
        make: quantizes the program by formats.
        quality: of a view.
        plain: quality of the float program.
        holds: whether a quality is good enough; that of the float program is.
        fresh: other batches than those of calibration, to tell where these were too few.

    Returns:
        What was made. With every layer float again, nothing is quantized.
    """
    whole = make(formats)
    first = quality(whole.view())
    if holds(first):
        return Kept(whole, dict(formats), {}, (plain, first, first))
    found = damages(program, whole, calls, seed)
    order = list(dict.fromkeys(a for address, damage in found.items() for a in (address, damage.together) if a is not None))
    tried: dict[int, tuple[Quantized, dict[str, str], float]] = {}

    def good(count: int) -> bool:
        if count not in tried:
            left = {a: f for a, f in formats.items() if a not in set(order[:count])}
            made = make(left)
            tried[count] = (made, left, quality(made.view()) if left else plain)
        return holds(tried[count][2])

    high = 1
    while high < len(order) and not good(high):
        high *= 2
    high, low = min(high, len(order)), high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    good(high)
    made, left, reached = tried[high]
    causes = {**beyond_ranges(program, whole, calls, fresh), **unlike_training(program, calls)}
    return Kept(made, left, {a: _why(a, order[:high], found, causes) for a in order[:high]}, (plain, first, reached))


def _why(address: str, returned: Sequence[str], found: Mapping[str, Damage], causes: Mapping[str, str]) -> str:
    """A layer's own reason, or whose input it makes."""
    readers = [a for a in returned if found[a].together == address and found[a].moved > found[address].moved]
    return f"it makes the input of {readers[0]}" if readers else causes.get(address, found[address].reason)
