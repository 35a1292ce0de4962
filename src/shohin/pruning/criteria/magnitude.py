"""Magnitude of the slices that make a unit (Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710)."""

from __future__ import annotations

from shohin.pruning.criteria.inputs import Inputs, Scores
from shohin.pruning.criteria.weights import producing_slices


def l1(inputs: Inputs) -> Scores:
    """Sum of the absolute weights that make a unit, over all layers that do."""
    scores = inputs.zeros()
    for group in inputs.graph.groups:
        for rows in producing_slices(inputs.graph, group):
            scores[group.name] += rows.abs().sum(1)
    return scores


def l2(inputs: Inputs) -> Scores:
    """Sum of the squared weights that make a unit, over all layers that do. The order is that of the L2 norm."""
    scores = inputs.zeros()
    for group in inputs.graph.groups:
        for rows in producing_slices(inputs.graph, group):
            scores[group.name] += rows.square().sum(1)
    return scores
