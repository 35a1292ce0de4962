"""A quantized program: tensors on their grids, and the grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from shohin.formats import Quantizer
from shohin.formats.scheme import Scheme
from shohin.program import Folded, Program
from shohin.quantization.dynamic import Dynamic
from shohin.quantization.floats import Rounding
from shohin.quantization.simulate import simulate
from shohin.quantization.sites import Sites, weight_of


@dataclass(frozen=True, eq=False)
class Quantized:
    """A program with weights on grids, and activations where layers compute on integers.

    Args:
        folded: the folded program; its tensors are snapped to their grids.
        activations: node name -> quantizer.
        weights: tensor name -> quantizer; of the integer layers, and of those whose activations stay float.
        sites: the sites.
        inputs: layer node -> how its input is rounded by itself: `Dynamic` codes, and floating-point formats, which are only simulated.
    """

    folded: Folded
    activations: Mapping[str, Quantizer]
    weights: Mapping[str, Quantizer]
    sites: Sites
    inputs: Mapping[str, Rounding] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        """The folded program with snapped tensors."""
        return self.folded.program

    def view(self) -> torch.nn.Module:
        """The module that simulates all bits."""
        return simulate(self.program, self.activations, self.sites.readers, self.inputs)

    def by_address(self) -> dict[str, Quantizer]:
        """Activation quantizers by address, weight quantizers by parameter name: a candidate's evidence."""
        return {**{address_of(self.program, n): q for n, q in self.activations.items()}, **self.weights}

    @property
    def dynamic(self) -> frozenset[str]:
        """Weights of the layers that round their input in the range that it has itself."""
        nodes = {node.name: node for node in self.program.graph.nodes}
        names = (weight_of(self.program, nodes[node]) for node, rounding in self.inputs.items() if isinstance(rounding, Dynamic))
        return frozenset(name for name in names if name is not None)

    def weight_formats(self) -> dict[str, str]:
        """Weight name -> "int8" where its layer computes on integers, else the scheme by which it is held."""
        integer = set(self.sites.layers.values()) | self.dynamic
        return {name: "int8" if name in integer else str(Scheme.of(q)) for name, q in self.weights.items()}


def address_of(program: Program, name: str) -> str:
    """The address of an activation: its operation's, or the name of the input."""
    return program.origins[name].address if name in program.origins else name
