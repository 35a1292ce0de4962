"""Criteria of gradients: Taylor expansions of the loss, and optimal brain damage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shohin.data import Call, Data, first_output
from shohin.errors import DataError
from shohin.evidence.fisher import UnitSaliency
from shohin.pruning.criteria.inputs import Inputs, Scores
from shohin.pruning.criteria.passes import Step, backward, gates
from shohin.pruning.criteria.readings import Reading, readings
from shohin.pruning.saliency import group_saliency, sampled_loss


def taylor(inputs: Inputs) -> Scores:
    """Half the mean of squares of each sample's gate gradient: the expected loss of removal (Molchanov et al. 2019, arXiv
    1906.10771; Theis et al. 2018, arXiv 1801.05787). Needs no labels; see `shohin.pruning.saliency`.

    Groups that it finds no reader of (read by a product with a weight, a recurrent layer, or by no layer) are judged by one more pass.
    """
    data = data_of(inputs)
    scores = group_saliency(inputs.graph, data, inputs.calls, seed=inputs.seed, tick=inputs.tick)
    unseen = {name for name, values in scores.items() if not bool(values.any())}
    listed = [one for one in readings(inputs.graph) if unseen & one.owners.keys()]
    if not listed:
        return scores
    samples = sum(call.size for call in inputs.calls)
    for step in backward(inputs, listed, drawn_loss(inputs)):
        for group, total in unit_gates(listed, step).items():
            if group in unseen:
                scores[group] = scores[group] + total.square().sum(0) / (2 * samples)
    return scores


def first_order(inputs: Inputs) -> Scores:
    """``|mean over a batch of sum(g * w)|`` over the weights that read a unit, averaged over the batches (Molchanov et al. 2019,
    "Importance Estimation for Neural Network Pruning", arXiv 1906.10771): the first-order change of the loss if the unit goes.

    The loss is the task's: labels or `Data(loss=...)` are needed (under answers drawn from the model itself the mean is zero).

    Raises:
        DataError: without labels and without a loss.
    """
    listed, scores = readings(inputs.graph), inputs.zeros()
    data = data_of(inputs)
    for step in backward(inputs, listed, data.batch_loss):
        for group, total in unit_gates(listed, step).items():
            scores[group] += total.mean(0).abs() / len(inputs.calls)
    return scores


def obd(inputs: Inputs) -> Scores:
    """``1/2 sum of E[g**2] * w**2`` over all parameters that a unit owns (LeCun et al. 1990, "Optimal Brain Damage"), the diagonal
    Fisher information as Hessian. With answers drawn from the model, the squared gradient of a batch is an unbiased estimate.

    Memory: one gradient of the model.
    """
    graph = inputs.graph
    totals = {
        g.name: UnitSaliency({n: {axis: torch.from_numpy(i) for axis, i in axes.items()} for n, axes in g.slices.items()})
        for g in graph.groups
    }
    for step in backward(inputs, (), drawn_loss(inputs), parameters=True):
        for group in graph.groups:
            if any(name in step.gradients for name in group.slices):
                totals[group.name].update(graph.program.tensors, step.gradients, step.size)
    return {name: one.obd() if one.updates else torch.zeros(graph.sizes[name], dtype=torch.float64) for name, one in totals.items()}


def unit_gates(listed: list[Reading], step: Step) -> dict[str, Tensor]:
    """Group -> gradient of each sample's loss with respect to a gate on each unit, float64 (samples, units), all readings together."""
    found: dict[str, Tensor] = {}
    for number, x in step.taken.items():
        for group, line in gates(listed[number], x, step.size).items():
            if not bool(torch.isfinite(line).all()):
                raise DataError(f"a gradient at {listed[number].node} is NaN or Inf: check the data and the loss")
            found[group] = found[group] + line if group in found else line
    return found


def drawn_loss(inputs: Inputs) -> Any:
    """``loss(outputs, call)``: the user's loss, or the likelihood of answers drawn from the model's own distribution."""
    data, generator = data_of(inputs), torch.Generator().manual_seed(inputs.seed)

    def loss(outputs: Any, call: Call) -> Tensor:
        if not bool(torch.isfinite(first_output(outputs)).all()):
            raise DataError("the model's answers on the calibration batches hold NaN or Inf: look for NaN in the data or the weights")
        return sampled_loss(outputs, call, data, generator)

    return loss


def data_of(inputs: Inputs) -> Data:
    """The data, which gives the loss. Raises DataError without it."""
    if inputs.data is None:
        raise DataError("a criterion of gradients needs the data's loss: give Inputs(graph, data, calls)")
    return inputs.data
