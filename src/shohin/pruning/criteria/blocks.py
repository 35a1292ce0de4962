"""Depth: how much each region and layer that can be skipped changes what passes through it, or the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from shohin.errors import DataError, ShohinError
from shohin.evidence.divergence import Divergence
from shohin.graph import Graph, Region
from shohin.graph.labels.core import Labels
from shohin.plan import Plan
from shohin.program import call_inputs, interpret
from shohin.pruning.criteria.inputs import Inputs
from shohin.surgery import view


@dataclass(frozen=True)
class BlockScores:
    """Scores of what can be skipped.

    Args:
        scores: name of a region or layer -> score; a higher one is kept longer.
        left_out: name -> why it has none.
    """

    scores: Mapping[str, float]
    left_out: Mapping[str, str]


def cosine_change(inputs: Inputs) -> BlockScores:
    """One minus the cosine of a region's input and output, the mean over samples and positions (Men et al. 2024, "ShortGPT", arXiv
    2403.03853); between 0 (nothing turns) and 2. One forward pass over the batches.

    Vectors lie along the axis whose units can be removed (the width of a transformer, the channels of a CNN); where there is not
    exactly one, a sample's whole tensor is one vector.
    """
    _needs_batches(inputs, "cosine_change")
    graph = inputs.graph
    axes = {region.name: _feature_axis(graph, region) for region in _regions(graph)}
    totals = dict.fromkeys(axes, 0.0)
    counts = dict.fromkeys(axes, 0)
    ends = _by_end(graph)
    for call in inputs.calls:
        program, given = graph.program, call_inputs(graph.program, call)
        held: dict[str, Tensor] = {n: x for n, x in zip(program.inputs, given, strict=True) if isinstance(x, Tensor)}
        wanted = {r.input for r in _regions(graph)}

        def visit(node: fx.Node, value: Any, args: tuple[Any, ...], held: dict[str, Tensor] = held, wanted: set[str] = wanted) -> Any:
            if node.name in wanted:
                held[node.name] = value
            for region in ends.get(node.name, ()):
                change = _turned(held[region.input], value, axes[region.name])
                totals[region.name] += float(change.sum())
                counts[region.name] += change.numel()
            return value

        with torch.no_grad():
            interpret(program, program.graph, program.tensors, given, visit)
        if inputs.tick is not None:
            inputs.tick()
    scores = {name: totals[name] / counts[name] for name in axes if counts[name] and totals[name] == totals[name]}
    return BlockScores(
        scores, {name: "its input or output is NaN on the batches, or is not computed" for name in axes if name not in scores}
    )


def skip_divergence(inputs: Inputs) -> BlockScores:
    """How far the answers go from the model's own when a region is skipped (Kim et al. 2024, "Shortened LLaMA", arXiv 2402.02834).

    Mean Kullback-Leibler divergence in nats of class scores, relative squared error of other answers: see
    `shohin.evidence.divergence`. No labels. One forward pass over the batches for each region, and memory for the answers.
    """
    _needs_batches(inputs, "skip_divergence")
    graph = inputs.graph
    fingerprint = graph.program.fingerprint
    measure = Divergence(view(graph, Plan(fingerprint)), inputs.calls)
    scores, left_out = {}, {}
    for region in _regions(graph):
        try:
            scores[region.name] = measure(view(graph, Plan(fingerprint, skips=(region.name,))))
        except ShohinError as error:
            left_out[region.name] = str(error)
        if inputs.tick is not None:
            inputs.tick()
    return BlockScores(scores, left_out)


#: name -> how depth is scored
BLOCK_CRITERIA: dict[str, Callable[[Inputs], BlockScores]] = {"cosine": cosine_change, "divergence": skip_divergence}


def _needs_batches(inputs: Inputs, name: str) -> None:
    if not inputs.calls:
        raise DataError(f"{name} needs batches: give Data(train=loader); labels are not needed")


def _regions(graph: Graph) -> Iterator[Region]:
    yield from graph.regions
    yield from graph.layers


def _by_end(graph: Graph) -> dict[str, list[Region]]:
    ends: dict[str, list[Region]] = {}
    for region in _regions(graph):
        ends.setdefault(region.output, []).append(region)
    return ends


def _feature_axis(graph: Graph, region: Region) -> int | None:
    labels = graph.labels.get(region.output)
    varying = labels.varying if isinstance(labels, Labels) else ()
    return varying[0] if len(varying) == 1 and varying[0] > 0 else None


def _turned(before: Tensor, after: Tensor, axis: int | None) -> Tensor:
    a, b = before.double(), after.double()
    if axis is None:
        a, b, axis = a.flatten(1), b.flatten(1), 1
    return 1 - F.cosine_similarity(a, b, dim=axis)
