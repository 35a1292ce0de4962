"""How active units are where they are read: mean magnitude, and the share of zeros."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shohin.pruning.criteria.inputs import Inputs, Scores
from shohin.pruning.criteria.passes import forward
from shohin.pruning.criteria.readings import readings


def mean_activation(inputs: Inputs) -> Scores:
    """Mean of |x| over samples and positions (Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", arXiv 1611.06440), over all layers that read the unit.
    """
    return _averaged(inputs, torch.abs)


def apoz(inputs: Inputs) -> Scores:
    """One minus the average percentage of zeros (Hu et al. 2016, "Network Trimming", arXiv 1607.03250).

    It tells units apart only behind activations with exact zeros (ReLU); behind others every unit scores 1.
    """
    return _averaged(inputs, lambda x: (x != 0).double())


def _averaged(inputs: Inputs, measure: Callable[[Tensor], Tensor]) -> Scores:
    """The mean of a measure of each element over all that is read of a unit. Memory: a number for each channel of each reading."""
    listed = readings(inputs.graph)
    totals: list[Tensor] = [torch.zeros(one.channels, dtype=torch.float64) for one in listed]
    counts = [0] * len(listed)

    def take(number: int, x: Tensor, other: Tensor | None) -> None:
        line = measure(x).double().movedim(listed[number].axis, -1).flatten(0, -2)
        totals[number] += line.sum(0).cpu()
        counts[number] += len(line)

    forward(inputs, listed, take)
    scores, seen = inputs.zeros(), inputs.zeros()
    for one, total, count in zip(listed, totals, counts, strict=True):
        for group in one.owners:
            scores[group] += one.by_unit(total / max(count, 1), group)
            seen[group] += one.by_unit(torch.ones_like(total), group)
    return {name: values / seen[name].clamp_min(1) for name, values in scores.items()}
