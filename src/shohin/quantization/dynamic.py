"""Layers that round their input in the range that it has itself: nothing is chosen from data, and nothing lies beyond the range.

One range for the whole tensor, as ONNX's DynamicQuantizeLinear has it, zero within it; so the answer for a sample depends on its batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.formats import Bits, Format
from shohin.program import Program
from shohin.quantization.sites import weight_of


@dataclass(frozen=True)
class Dynamic:
    """How such a layer rounds what it reads.

    Args:
        format: of the codes, with a zero point.
    """

    format: Format

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` on its grid, in float32 throughout as runtimes compute it; gradients go straight through."""
        values = x.detach()
        if not values.numel():
            return x
        low, high = values.amin().clamp_max(0.0), values.amax().clamp_min(0.0)
        scale = torch.where(high > low, (high - low) / (self.format.high - self.format.low), torch.ones_like(low))
        zero = (self.format.low - low / scale).clamp(self.format.low, self.format.high).round()
        codes = torch.clamp(torch.round(values / scale) + zero, self.format.low, self.format.high)
        return x + ((codes - zero) * scale - values)


def dynamic_layers(program: Program, formats: Mapping[str, Bits]) -> dict[str, tuple[str, Bits]]:
    """Node of each of these linear layers -> its weight's name, and its format.

    Args:
        formats: of the layers, by address.
    """
    named = {node: weight_of(program, node) for node in program.graph.nodes}
    places = {node: program.origins[node.name].address for node, name in named.items() if name is not None}
    return {node.name: (str(named[node]), formats[place]) for node, place in places.items() if place in formats}
