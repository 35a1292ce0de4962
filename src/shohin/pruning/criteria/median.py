"""Filter pruning via the geometric median (He et al. 2019, FPGM, arXiv 1811.00250): what others can stand in for goes first."""

from __future__ import annotations

import torch

from shohin.pruning.criteria.inputs import Inputs, Scores
from shohin.pruning.criteria.weights import producing_slices


def geometric_median(inputs: Inputs) -> Scores:
    """Sum of the Euclidean distances from a unit's producing weights to those of all other units of its group.

    A unit near the geometric median has the smallest sum. The slices of all layers that make the units are one vector.
    """
    scores = inputs.zeros()
    for group in inputs.graph.groups:
        squared = torch.zeros(group.size, group.size, dtype=torch.float64)
        for rows in producing_slices(inputs.graph, group):
            squared += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        scores[group.name] = squared.sqrt().sum(1)
    return scores
