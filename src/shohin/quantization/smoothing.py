"""Smoothing: a factor for each channel of an activation that floating operations make, so that one outlying channel does not take the
codes of all others; the weights of the layers that read it take the inverse, so that nothing but rounding changes.

Xiao et al., "SmoothQuant" (2211.10438), section 4: ``c = max|x|^a / max|w|^(1 - a)``. There the factors are folded into the operation
before; here they belong to the grid of the activation (a scale for each channel), so that what else reads it is not touched, and how
far the difficulty moves, ``a``, is chosen for each activation by the squared error of what its layers give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shohin.evidence.ranges import grid
from shohin.formats import Format, Quantizer
from shohin.program import Program, family
from shohin.quantization.sites import FUSED, IDENTITY, MOVES, PADS, POOLS, Sites, integer_layers

#: how much of the range's difficulty moves to the weights, of which the best is taken; None is no smoothing at all
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: of the range of the smoothed activation
CLIPS = (1.0, 0.9, 0.8, 0.7)
#: rows that the error is measured on
ROWS = 512
#: least share of the plain error that must go, or the activation keeps one scale
GAIN = 0.05


@dataclass
class Channels:
    """What was seen of an activation: the range of each channel, and rows spread evenly over the batches.

    Args:
        each: most rows kept of one batch.
    """

    each: int
    low: Tensor | None = None
    high: Tensor | None = None
    rows: list[Tensor] | None = None

    def update(self, x: Tensor) -> None:
        """Takes rows ``[n, F]``."""
        if not len(x):
            return
        low, high = x.amin(0), x.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.rows = [*(self.rows or []), x[:: -(-len(x) // self.each)].clone()]


Weigh = Callable[[Tensor], Quantizer]
"""A weight ``[O, F]`` to its quantizer, one scale for each output."""


def smoothed(
    seen: Channels, weights: Sequence[Tensor], form: Format, weigh: Weigh, shares: Iterable[float] = SHARES, gain: float = GAIN
) -> Quantizer | None:
    """The grid of an activation with a scale for each channel; None where one scale for all is as good.

    Args:
        seen: of the activation.
        weights: ``[O, F]`` of each layer that reads it.
        form: of the activation.
        weigh: how the weights are quantized.
        shares: of the difficulty, that are tried.
        gain: least share of the plain error that must go.

    Returns:
        A quantizer with ``axis=-1``: scales ``[F]`` of which the largest is that of the codes (see `Quantizer.factors`), one zero point for all.
    """
    if seen.rows is None or seen.low is None or seen.high is None:
        return None
    rows = torch.cat(seen.rows)
    rows = rows[:: -(-len(rows) // ROWS)].double()
    low, high = seen.low.double(), seen.high.double()
    most = torch.maximum(-low, high).clamp_min(0.0)
    if not bool(most.max() > 0):
        return None
    weight = torch.cat([w.detach().double() for w in weights])
    wanted = rows @ weight.T
    strong = weight.abs().amax(0)
    least_range, least_weight = float(most.max()) * 1e-4, max(float(strong.max()) * 1e-4, 1e-30)

    def judged(factors: Tensor) -> tuple[float, Quantizer]:
        quantized = _on_columns(weight, factors, weigh)
        tried = []
        for clip in CLIPS:
            q = _grid(low / factors, high / factors, factors, clip, form)
            tried.append((float((q.fake(rows) @ quantized.T - wanted).square().sum()), q))
        return min(tried, key=lambda pair: pair[0])

    plain, _ = judged(torch.ones_like(low))
    found = []
    for share in shares:
        factors = most.clamp_min(least_range) ** share / strong.clamp_min(least_weight) ** (1 - share)
        found.append(judged(factors / factors.max()))
    best, q = min(found, key=lambda pair: pair[0])
    return q if best < (1 - gain) * plain else None


def _grid(low: Tensor, high: Tensor, factors: Tensor, clip: float, form: Format) -> Quantizer:
    scale, zero = grid(float(low.min()) * clip, float(high.max()) * clip, form)
    scales = (scale * factors).float().double()
    return Quantizer(form, scales, torch.full((len(factors),), zero), axis=-1)


def _on_columns(weight: Tensor, factors: Tensor, weigh: Weigh) -> Tensor:
    return weigh(weight * factors).fake(weight * factors) / factors


def even_rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """The rows ``[n, F]`` of an activation ``[..., F]`` that count."""
    rows = value.detach().reshape(-1, value.shape[-1])
    return rows if mask is None else rows[mask]


def smoothable(program: Program, sites: Sites) -> dict[str, list[str]]:
    """Activation -> weights of the linear layers that read it: made by a floating operation that no integer kernel may absorb, each weight
    read once, and nothing else reads codes of it. Not behind a mean: OpenVINO fuses the factors into it and gets their axis wrong."""
    nodes = {node.name: node for node in program.graph.nodes}
    layers = {n.name: sites.layers[program.origins[n.name].address] for n in integer_layers(program, sites)}
    once = {weight for weight in layers.values() if list(layers.values()).count(weight) == 1}
    linear = {name: weight for name, weight in layers.items() if family(nodes[name]) == "linear" and weight in once}
    found = {name: taken for name, taken in sites.readers.items() if name in sites.own and taken <= linear.keys()}
    absorbed = {*FUSED, *PADS, *POOLS, "linear"}
    return {name: [linear[reader] for reader in sorted(taken)] for name, taken in found.items() if _made_by(nodes[name]) not in absorbed}


def _made_by(node: fx.Node) -> str:
    """The operation whose values these are, wherever they were moved."""
    while node.op == "call_function" and (family(node) in MOVES or family(node) in IDENTITY):
        source: Any = node.args[0]
        node = source
    return family_of(node)


def read_as_floats(program: Program, sites: Sites, name: str) -> bool:
    """True if operations without integer kernels read a node too."""
    node = next(n for n in program.graph.nodes if n.name == name)
    users = [u for user in node.users for u in (user.users if family_of(user) in IDENTITY else [user])]
    return any(user.name not in sites.readers[name] for user in users)


def family_of(node: fx.Node) -> str:
    """The family of an operation; "" of the output."""
    return family(node) if node.op == "call_function" else ""
