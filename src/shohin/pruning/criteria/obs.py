"""Optimal brain surgeon with the layer Hessian: what a unit's removal costs when all that stays is refitted.

For a layer with outputs W x, the squared error that is left when the features u are removed and the others take over by least
squares is ``tr(W_u ((H^-1)_uu)^-1 W_u^T)`` with H the second moments of its input (Hassibi & Stork 1993; for structures: Frantar
et al. 2022, arXiv 2208.11580; Kurtic et al. 2023, ZipLM, arXiv 2302.04089). A unit costs what it costs all layers that read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shohin.errors import DataError
from shohin.program import Program
from shohin.pruning.criteria.gradient import drawn_loss
from shohin.pruning.criteria.inputs import Inputs, Scores
from shohin.pruning.criteria.moments import second_moments
from shohin.pruning.criteria.passes import backward, gates
from shohin.pruning.criteria.readings import Reading, readings

#: added to the diagonal of the correlation matrix of a layer's features
DAMPING = 1e-2


def layer_obs(inputs: Inputs, *, damping: float = DAMPING) -> Scores:
    """The squared error at the outputs of the layers that read a unit, after refitting; every output counts alike.

    Labels are not needed, nor gradients. Memory: see `shohin.pruning.criteria.moments`.
    """
    scores = inputs.zeros()
    for one, second in second_moments(inputs, readings(inputs.graph)):
        matrix = one.matrix(inputs.graph.program)
        for group in one.owners:
            scores[group] += unit_costs(one, matrix, second, group, damping)
    return scores


def obs(inputs: Inputs, *, damping: float = DAMPING) -> Scores:
    """Estimated increase of the loss: as `layer_obs`, each output weighted by half the mean squared gradient of the loss there.

    The Fisher information of a layer is taken as a product of its input's second moments and its outputs' squared gradients (Martens &
    Grosse 2015, arXiv 1503.05671; the diagonal of the latter), a sample's gradients summed over positions. Answers are drawn from the
    model as in "taylor": no labels. Where outputs have no gradient of their own (attention scores, recurrent layers), the mean square
    of the gate gradients is taken, which is no more than "taylor" there.
    """
    scores = inputs.zeros()
    weighted, direct = sensitivities(inputs, readings(inputs.graph))
    for group, values in direct.items():
        scores[group] += values / 2
    for one, second in second_moments(inputs, list(weighted)):
        matrix = weighted_matrix(one, inputs.graph.program, weighted[one])
        for group in one.owners:
            scores[group] += unit_costs(one, matrix, second, group, damping)
    return scores


def weighted_matrix(one: Reading, program: Program, importance: Tensor) -> Tensor:
    """The matrix of a reading whose squared outputs are estimates of the loss: (groups, outputs, features).

    Args:
        importance: of each output, float64 (outputs of all groups,).
    """
    matrix = one.matrix(program)
    by_row = importance.reshape(one.groups, -1, 1)
    by_row = by_row.repeat_interleave(matrix.shape[1] // by_row.shape[1], 1)  # the taps of a transposed convolution
    return matrix * (by_row / 2).sqrt()


def unit_costs(one: Reading, matrix: Tensor, second: Tensor, group: str, damping: float) -> Tensor:
    """What each unit of a group costs one reading: float64 (units,).

    Args:
        matrix: (groups, outputs, features).
        second: (groups, features, features); of a product, one for each head.
    """
    out = torch.zeros(one.sizes[group], dtype=torch.float64)
    for number, units, features in one.unit_features(group):
        for own in second if one.form == "product" else second[number : number + 1]:
            out.index_add_(0, units, removal_costs(matrix[number], own, features, damping))
    return out


def removal_costs(matrix: Tensor, second: Tensor, features: Tensor, damping: float = DAMPING) -> Tensor:
    """Increase of ``E|W x|**2``'s error for each set of features that is removed alone, the others refitted.

    Damping is on correlations, so that nothing depends on the scale of a feature.

    Args:
        matrix: W, float64 (outputs, F).
        second: E[x x^T], float64 (F, F).
        features: int64 (units, k).
        damping: share of each feature's variance that others are not believed to explain.

    Returns:
        float64 (units,), at least 0.
    """
    inverse, scaled = inverse_and_weights(matrix, second, damping)
    blocks = inverse[features.unsqueeze(2), features.unsqueeze(1)]
    w = scaled[:, features].permute(1, 2, 0)
    costs: Tensor = (w * torch.linalg.solve(blocks, w)).sum((1, 2)).clamp_min(0)
    return costs


def inverse_and_weights(matrix: Tensor, second: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(inverse of the damped correlations, weights of features scaled to a variance of one); features that are always zero weigh
    nothing and correlate with none.
    """
    variance = second.diagonal().clamp_min(0)
    alive = variance > variance.max() * 1e-12
    scale = torch.where(alive, variance, 0).sqrt()
    inverse = alive / torch.where(alive, scale, 1)
    correlation = (second * inverse.outer(inverse)).fill_diagonal_(1)
    return _inverse(correlation, damping), matrix * scale


def _inverse(matrix: Tensor, damping: float) -> Tensor:
    """The inverse of a damped positive semi-definite matrix; the damping is raised until it can be factored."""
    share, eye = damping, torch.eye(len(matrix), dtype=matrix.dtype)
    while share < 10:
        factor, info = torch.linalg.cholesky_ex(matrix + share * eye)
        if not int(info):
            return torch.cholesky_inverse(factor)
        share = max(share * 10, 1e-12)
    raise DataError("the second moments of a layer's input are not positive: check the calibration data for NaN or Inf")


def sensitivities(inputs: Inputs, listed: Sequence[Reading]) -> tuple[dict[Reading, Tensor], Scores]:
    """(reading -> E of the squared gradient of a sample at each output; group -> mean squared gates of the readings whose
    outputs have no gradient of their own).
    """
    nodes = {one.node for one in listed if _output(one) is not None}
    totals: dict[Reading, Tensor] = {}
    direct: Scores = {}
    samples = sum(call.size for call in inputs.calls)
    for step in backward(inputs, listed, drawn_loss(inputs), outputs=nodes):
        for number, one in enumerate(listed):
            axis, y = _output(one), step.outputs.get(one.node)
            if axis is None and number in step.taken:
                for group, line in gates(one, step.taken[number], step.size).items():
                    direct[group] = direct.get(group, torch.zeros(())) + line.square().sum(0) / samples
            elif axis is not None and y is not None and y.grad is not None:
                line = _squares(y.grad.double().movedim(axis, -1), step.size).cpu()
                totals[one] = totals.get(one, torch.zeros_like(line)) + line * (step.size**2 / samples)
    return totals, direct


def _squares(gradient: Tensor, size: int) -> Tensor:
    """Sum over samples of the squared gradient at each output, for errors that are alike at all positions or, where that is more
    (behind a normalization over positions they cancel), for errors that are independent.

    Args:
        gradient: (..., outputs); what comes before the outputs is sample by sample.
    """
    lines = gradient.reshape(size, -1, gradient.shape[-1]) if gradient.shape[0] % size == 0 else gradient.flatten(0, -2)[None]
    return torch.maximum(lines.sum(1).square().sum(0), lines.square().sum((0, 1)))


def _output(one: Reading) -> int | None:
    """The axis of the operation's output that the rows of the matrix belong to; None if there is none."""
    if one.form == "output":
        return one.axis
    return one.layer.out_axis if one.layer is not None else None
