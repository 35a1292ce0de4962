"""The slices of weights that make a unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shohin.graph import Graph, UnitGroup
from shohin.graph.kinds import uses
from shohin.program import Program
from shohin.program.nodes import run


def weight_value(program: Program, node: fx.Node) -> Tensor:
    """A weight: the model's own tensor, or what the forward computes from some (weight standardization), on the CPU."""
    if node.name in program.names:
        return program.tensors[program.names[node.name]].detach().cpu()
    with torch.no_grad():
        found: Tensor = run(
            node, fx.map_arg(node.args, lambda n: weight_value(program, n)), fx.map_arg(node.kwargs, lambda n: weight_value(program, n))
        )
    return found.detach()


def unit_indices(owner: Tensor, units: int) -> list[Tensor]:
    """The indices that each unit owns, ascending; empty for a unit that owns none."""
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner[owner >= 0], minlength=units)
    return list(torch.split(order[int((owner < 0).sum()) :], counts.tolist()))


def producing_slices(graph: Graph, group: UnitGroup) -> Iterator[Tensor]:
    """For each weight that makes the units of a group: (units, elements) float64, the unit's slices flattened in order.

    A convolution, linear layer, embedding or recurrent layer makes units along its output axis; biases and normalizations do
    not count, and a depthwise convolution passes units through. A group that no weight makes (added parameters alone) is
    represented by all it owns.
    """
    seen: set[tuple[str, int]] = set()
    program = graph.program
    nodes = {n.name: n for n in program.graph.nodes}
    for use in uses(graph)[group.name]:
        name = program.names.get(use.tensor, use.tensor)
        if use.role == "makes" and (name, use.axis) not in seen:
            seen.add((name, use.axis))
            yield _rows(weight_value(program, nodes[use.tensor]), use.axis, torch.from_numpy(use.owner), group.size)
    if not seen:
        for name, axes in group.slices.items():
            for axis, indices in axes.items():
                if program.tensors[name].is_floating_point():
                    line = program.tensors[name].detach().cpu().double().movedim(axis, 0)
                    yield line[torch.from_numpy(indices)].flatten(1)


def _rows(weight: Tensor, axis: int, owner: Tensor, units: int) -> Tensor:
    """A unit that owns fewer indices than others is filled up with zeros."""
    line = weight.double().movedim(axis, 0).flatten(1)
    parts: Sequence[Any] = [line[indices].flatten() for indices in unit_indices(owner, units)]
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
