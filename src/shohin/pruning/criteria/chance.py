"""Random scores: the baseline that every criterion must beat (Li et al. 2022, "Revisiting Random Channel Pruning", arXiv 2205.05676)."""

from __future__ import annotations

import zlib

import torch

from shohin.pruning.criteria.inputs import Inputs, Scores


def random(inputs: Inputs) -> Scores:
    """Uniform in [0, 1), from the seed and the group's name: a group's scores do not depend on which other groups there are."""
    scores = {}
    for group in inputs.graph.groups:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{inputs.seed} {group.name}".encode()))
        scores[group.name] = torch.rand(group.size, generator=generator, dtype=torch.float64)
    return scores
