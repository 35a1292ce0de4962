"""What rounding alone does not explain: calibration data unlike what the model was trained on, or too little of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call
from shohin.evidence.means import moments_along, norms
from shohin.program import Program, call_inputs, fold, interpret
from shohin.program.inputs import samples
from shohin.quantization.damage import SAMPLES, beyond
from shohin.quantization.quantized import Quantized
from shohin.quantization.sites import base, integer_layers, weight_of

#: channels' means so many standard deviations from those of batch normalization, in the mean over channels, are of other data
DRIFT = 1.0
#: share of new values beyond a range, and how many times that of the calibration data it is
NEW, TIMES = 1e-3, 4.0


def unlike_training(program: Program, calls: Sequence[Call]) -> dict[str, str]:
    """Layer address -> why, where the statistics of the batch normalization behind it are not those of these batches.

    Args:
        program: whose batch normalizations are not folded.
    """
    own, means = norms(program), dict[str, Tensor]()

    def feed(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if node.name in own:
            means[node.name] = moments_along(args[0], 1)[0]
        return args

    with torch.no_grad():
        for call in calls[:1]:
            interpret(program, program.graph, program.tensors, _few(program, call), feed=feed)
    found = {}
    for node in program.graph.nodes:
        source: Any = base(node.args[0]) if node.name in means else None
        if source is None or weight_of(program, source) is None:
            continue
        mean, variance = (program.tensors[name].detach().double() for name in own[node.name])
        away = ((means[node.name] - mean).abs() / variance.clamp_min(1e-12).sqrt()).mean()
        if float(away) > DRIFT:
            found[program.origins[source.name].address] = (
                f"the calibration data are not like those that its batch normalization has seen: its channels' means lie {float(away):.1f} "
                "standard deviations away"
            )
    return found


def beyond_ranges(program: Program, quantized: Quantized, known: Sequence[Call], fresh: Sequence[Call]) -> dict[str, str]:
    """Layer address -> why, where new data go beyond the range of its input far more often than those that the range was chosen from."""
    plain = fold(program).program
    seen, new = (_shares(plain, quantized, calls) for calls in (known, fresh))
    return {
        address: f"too little calibration data: {share:.1%} of what it reads on validation lies beyond the range, {seen[address]:.1%} before"
        for address, share in new.items()
        if share > NEW and share > TIMES * seen[address]
    }


def _shares(program: Program, quantized: Quantized, calls: Sequence[Call]) -> dict[str, float]:
    """Layer address -> share of its input's values beyond its range, on the first batch."""
    layers = {node.name for node in integer_layers(program, quantized.sites)}
    found: dict[str, float] = {}

    def feed(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        source: Any = node.args[0] if node.name in layers else None
        q = quantized.activations.get(base(source).name) if source is not None else None
        if q is not None:
            found[program.origins[node.name].address] = float(beyond(args[0], q))
        return args

    with torch.no_grad():
        for call in calls[:1]:
            interpret(program, program.graph, program.tensors, _few(program, call), feed=feed)
    return found


def _few(program: Program, call: Call) -> tuple[Any, ...]:
    return samples(call_inputs(program, call), call.size, 0, call.size if program.fixed else SAMPLES)
