"""Means that changed weights shift, and their correction: biases and batch normalization statistics of a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shohin.errors import DataError
from shohin.evidence.layer_rows import channel_axis, output_rows
from shohin.program import Program, family, interpret
from shohin.program.fold import CONVOLUTIONS
from shohin.program.nodes import argument


@dataclass(frozen=True, eq=False)
class Means:
    """Of the dense program on the calibration inputs.

    Args:
        outputs: layer node with a bias -> mean output ``[O]``.
        norms: batch normalization node -> mean and variance of its input ``[C]``.
        rows: layer node -> output rows ``[n, O]``.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def biases(program: Program) -> dict[str, str]:
    """Convolution or linear node -> its bias, where nothing else reads that."""
    out = {}
    for node in program.graph.nodes:
        bias = argument(node, 2) if family(node) in (*CONVOLUTIONS, "linear") else None
        if isinstance(bias, fx.Node) and bias.name in program.names and len(bias.users) == 1:
            out[node.name] = program.names[bias.name]
    uses = Counter(id(program.tensors[bias]) for bias in out.values())
    return {node: bias for node, bias in out.items() if uses[id(program.tensors[bias])] == 1}


def norms(program: Program) -> dict[str, tuple[str, str]]:
    """Batch normalization node in evaluation mode -> names of its running mean and variance, where nothing else reads them."""
    out = {}
    for node in program.graph.nodes:
        if family(node) != "batch_norm" or node.args[5] is not False:
            continue
        own = [a for a in node.args[3:5] if isinstance(a, fx.Node) and a.name in program.names and len(a.users) == 1]
        if len(own) == 2:
            out[node.name] = (program.names[own[0].name], program.names[own[1].name])
    return out


def moments_along(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over all other axes, float64 ``[C]``."""
    lines = x.detach().movedim(axis, 0).flatten(1).double()
    return lines.mean(1), lines.var(1, correction=0)


def mean_output(node: fx.Node, value: Tensor, at: Tensor | None) -> Tensor:
    """Mean of a layer's outputs, float64 ``[O]``, over these rows (all, if there are none): padding would outweigh what is seen.

    Raises:
        DataError: if it is NaN or Inf.
    """
    if at is None or not len(at):
        mean = moments_along(value, channel_axis(node, value))[0]
    else:
        mean = output_rows(node, value, at).double().mean(0)
    if not bool(torch.isfinite(mean).all()):
        raise DataError("the output of a layer holds NaN or Inf on the calibration data: check the data and the model")
    return mean


def dense_means(
    program: Program,
    inputs: tuple[Any, ...],
    places: Mapping[str, Tensor],
    taken: Callable[[fx.Node, Tensor], Tensor | None],
) -> Means:
    """One pass over the dense program; memory: its activations, two vectors for each layer, and what is ``taken`` of its outputs.

    Args:
        places: layer node -> the rows that its mean is taken over; absent: all.
    """
    found, with_bias, normalized = Means(), biases(program), norms(program)

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        rows = taken(node, value)
        if rows is not None:
            found.rows[node.name] = rows
        if node.name in with_bias:
            found.outputs[node.name] = mean_output(node, value, places.get(node.name))
        if node.name in normalized:
            found.norms[node.name] = moments_along(args[0], 1)
        return value

    interpret(program, program.graph, program.tensors, inputs, visit)
    return found


def shifted_bias(node: fx.Node, value: Tensor, bias: Tensor, mean: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layer's output and its bias with the mean over these rows that the dense layer's output had; unchanged where that is equal."""
    axis = channel_axis(node, value)
    shift = (mean - mean_output(node, value, at)).to(bias)
    return value + shift.reshape(-1, *[1] * (value.dim() - 1 - axis)), bias + shift


def moved_statistics(x: Tensor, dense: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Running mean and variance after the input has changed.

    The change is measured on the same samples before and after, so that what these samples happen to be cancels: the mean is
    shifted by the difference of the sample means, the variance scaled by the quotient of the sample variances.
    """
    mean, variance = moments_along(x, 1)
    ratio = torch.where((dense[1] > 0) & (variance > 0), variance / dense[1].clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return old[0] + (mean - dense[0]).to(old[0]), old[1] * ratio.to(old[1])


def applied(program: Program, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The program's tensors with changes."""
    return {name: changed.get(name, t.detach()) for name, t in program.tensors.items()}
