"""Batch normalization scales (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv 1708.06519)."""

from __future__ import annotations

import torch

from shohin.graph.kinds import Use, uses
from shohin.pruning.criteria.inputs import Inputs, Scores
from shohin.pruning.criteria.weights import producing_slices, weight_value

NORMS = ("batch_norm", "instance_norm")


def norm_scale(inputs: Inputs) -> Scores:
    """Sum of the absolute scales of the batch normalizations that a unit passes.

    Such a scale is the standard deviation that the channel leaves its normalization with. A group that passes none gets the
    same quantity for inputs of unit variance: the L2 norm of each producing slice, summed over the layers that make the unit.
    """
    program = inputs.graph.program
    nodes = {n.name: n for n in program.graph.nodes}
    scores = inputs.zeros()
    for group in inputs.graph.groups:
        norms: dict[str | None, Use] = {u.weight: u for u in uses(inputs.graph)[group.name] if u.family in NORMS and u.weight}
        for use in norms.values():
            owner = torch.from_numpy(use.owner)
            scale = weight_value(program, nodes[str(use.weight)]).double().abs()
            scores[group.name].index_add_(0, owner[owner >= 0], scale[owner >= 0])
        if not norms:
            for rows in producing_slices(inputs.graph, group):
                scores[group.name] += rows.norm(dim=1)
    return scores
