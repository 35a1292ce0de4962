"""Weights times activations (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor

from shohin.pruning.criteria.inputs import Inputs, Scores
from shohin.pruning.criteria.moments import aligned, product_terms
from shohin.pruning.criteria.passes import forward
from shohin.pruning.criteria.readings import readings


def wanda(inputs: Inputs) -> Scores:
    """``sum of |W| * ||x||`` over all weights that read a unit, ``||x||`` the root mean square of the input channel.

    Where no weight reads a unit but another activation does (queries and keys), the root mean square of the products.
    Memory: a number for each channel of each reading.
    """
    listed = readings(inputs.graph)
    totals: list[Tensor] = [torch.zeros(one.channels, dtype=torch.float64) for one in listed]
    counts = [0] * len(listed)

    def take(number: int, x: Tensor, other: Tensor | None) -> None:
        one = listed[number]
        if other is not None and one.partner is not None:
            a, b = aligned(one, x, other)
            terms, count = product_terms(a, b)
            totals[number] += terms
        else:
            line = x.detach().double().movedim(one.axis, -1).flatten(0, -2)
            totals[number] += line.square().sum(0).cpu()
            count = len(line)
        counts[number] += count

    forward(inputs, listed, take)
    scores = inputs.zeros()
    for one, total, count in zip(listed, totals, counts, strict=True):
        size = (total / max(count, 1)).sqrt()
        weight = one.matrix(inputs.graph.program).abs().sum(1).reshape(one.channels, -1).sum(1)
        for group in one.owners:
            scores[group] += one.by_unit(weight * size, group)
    return scores
