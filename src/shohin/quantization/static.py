"""Static integer quantization of a program: ranges from data, weights on a grid, biases corrected in one ordered pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shohin.data import Call
from shohin.errors import DataError, PlanError
from shohin.evidence.calibration import METHODS, Method, Observer, Ranges, chosen_range
from shohin.evidence.ranges import grid
from shohin.formats import INT8, Bits, Format, Quantizer, Scheme
from shohin.program import Folded, Program, family, fold
from shohin.program.fold import CONVOLUTIONS
from shohin.program.nodes import argument
from shohin.quantization.biases import corrected, on_the_grid_of_sums
from shohin.quantization.grids import fitted_grid
from shohin.quantization.observation import leading, observed, range_methods, row_masks, taken_whole
from shohin.quantization.quantized import Quantized
from shohin.quantization.sites import Sites, base, find_sites, integer_layers, quantizable
from shohin.quantization.smoothing import GAIN, ROWS, Channels, read_as_floats, smoothable, smoothed

#: the least scale of each output channel of a weight (a target's rule, for example pair-safe scales), or None
LeastScale = Callable[[Tensor, int], Tensor]


#: scales that are tried for each output of a weight
STEPS = 40
#: the same, where no more than factors are chosen by them
ROUGHLY = 10


def quantize_program(
    program: Program,
    layers: set[str],
    calls: Sequence[Call],
    *,
    formats: Bits | Mapping[str, Bits] = INT8,
    ranges: Ranges = "mse",
    smoothing: bool = True,
    least_scale: LeastScale | None = None,
    snapped: Mapping[str, Quantizer] | None = None,
    correct_bias: bool = True,
) -> Quantized:
    """Quantizes the layers at the given addresses; the rest stays float.

    Args:
        program: with the values to quantize (trained, cut...).
        layers: addresses of convolutions and linear layers.
        calls: calibration batches, iterated twice.
        formats: of all layers, or of each by its address. An activation that several layers read has the bits of the one that asks for
            the most; what no layer reads (a sum of two sums, say) has 8.
        ranges: how ranges of activations are chosen, one of `shohin.evidence.calibration.METHODS`; or patterns of their addresses (an
            operation's, an input's name) to methods, of which the last one that matches decides, and "mse" where none does.
        smoothing: give activations that floating operations make, and that linear layers alone read as codes, a scale for each channel
            where that makes the layers' outputs more exact; their ranges are then chosen by that error. Not where another range method
            than "mse" was asked for. See `shohin.quantization.smoothing`.
        least_scale: (weight, groups) -> least scale of each output channel, in the weight's unit.
        snapped: grids of weights that lie on them already; what these layers read is not smoothed.

    Raises:
        DataError: if there is no calibration data, or an activation on it is NaN or Inf (its address is named).
        PlanError: if an address is not a layer, a range method is unknown, or a pattern matches nothing.
    """
    if not calls:
        raise DataError("static quantization needs calibration batches: give Data(train=loader)")
    folded = fold(program)
    sites = find_sites(folded.program, layers)
    unknown = layers - set(sites.layers)
    if unknown:
        raise PlanError(f"{sorted(unknown)[0]!r} is not a convolution or linear layer with a weight of the model")
    methods = range_methods(folded.program, sites, ranges)
    whole = taken_whole(folded.program, calls, methods)
    first, counted = leading(folded.program, calls, whole)
    masks = row_masks(folded.program, sites, first)
    ready = dict(snapped or {})
    smooth = {
        site: names
        for site, names in smoothable(folded.program, sites).items()
        if smoothing and methods[site] is METHODS["mse"] and not ready.keys() & set(names)
    }
    channels = {site: Channels(-(-ROWS // len(calls))) for site in smooth}
    observers, means = observed(folded.program, sites, calls, methods, counted, masks, channels, whole)
    chosen = {address: formats if isinstance(formats, Bits) else formats[address] for address in sites.layers}
    forms = activation_formats(folded.program, sites, chosen)
    activations = _activation_quantizers(sites, observers, methods, forms)
    tensors, weights = dict(folded.program.tensors), ready
    held = {sites.layers[address]: bits.weights for address, bits in chosen.items()}
    for site, names in smooth.items():
        shared = read_as_floats(folded.program, sites, site)  # then smoothing spares these readers its rounding, too
        gain = 0.0 if shared else GAIN
        q = smoothed(
            channels[site],
            [tensors[n] for n in names],
            forms[site],
            lambda w, form=held[names[0]]: weight_quantizer(w, form, least_scale, steps=ROUGHLY),  # type: ignore[misc]
            gain=gain,
        )
        if q is not None:
            activations[site] = q
            for name in names:
                over = weight_quantizer((tensors[name].detach() / q.factors).float(), held[name], least_scale)
                weights[name] = replace(over, columns=q.factors)
    for node in integer_layers(folded.program, sites):
        name = sites.layers[folded.program.origins[node.name].address]
        if name not in weights:
            groups = argument(node, 6, 1) if family(node) in CONVOLUTIONS else 1
            weights[name] = weight_quantizer(tensors[name], held[name], least_scale, groups)
    tensors |= {name: q.fake(tensors[name].detach()).detach() for name, q in weights.items()}
    program = replace(folded.program, tensors=tensors)
    if correct_bias:
        program = replace(program, tensors=corrected(program, sites, activations, first, means, masks))
    program = replace(program, tensors=on_the_grid_of_sums(program, sites, activations, weights))
    return Quantized(Folded(program, folded.folded), activations, weights, sites)


def placeholder(program: Program, layers: set[str]) -> Quantized:
    """A quantized program with made-up activation grids, for timing: what it computes is meaningless, what it costs is not."""
    folded = fold(program)
    sites = find_sites(folded.program, layers & set(quantizable(folded.program)))
    form = INT8.activations
    own = {}
    for name in sites.own:
        positive = sites.low.get(name) == 0.0
        own[name] = Quantizer(form, torch.tensor(6 / 255 if positive else 0.05, dtype=torch.float64), torch.tensor(0 if positive else 128))
    weights = {
        name: weight_quantizer(folded.program.tensors[name], Bits.parse("w7a8").weights, None, steps=0) for name in sites.layers.values()
    }
    return Quantized(folded, {name: own[root] for name, root in sites.grids.items()}, weights, sites)


def activation_formats(program: Program, sites: Sites, formats: Mapping[str, Bits]) -> dict[str, Format]:
    """Node that has its own grid -> its format: the most bits that a layer which reads it (or what only moves it) asks for; 8 if none does.

    Args:
        formats: of the integer layers, by address.
    """
    asked: dict[str, list[Format]] = {name: [] for name in sites.own}
    for node in integer_layers(program, sites):
        source: Any = node.args[0]
        asked[sites.grids[base(source).name]].append(formats[program.origins[node.name].address].activations)
    return {name: max(found, key=lambda form: form.bits, default=INT8.activations) for name, found in asked.items()}


def _activation_quantizers(
    sites: Sites, observers: Mapping[str, Observer], methods: Mapping[str, Method], forms: Mapping[str, Format]
) -> dict[str, Quantizer]:
    own = {}
    for name, observer in observers.items():
        form = forms[name]
        low, high = chosen_range(observer, form, methods[name])
        low = max(low, sites.low[name]) if name in sites.low else low
        high = min(high, sites.high[name]) if name in sites.high else high
        scale, zero = grid(low, high, form)
        if name in sites.high and sites.low.get(name) == 0.0:
            scale = min(scale, sites.high[name] / (form.high - form.low))
        own[name] = Quantizer(form, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))
    return {name: own[root] for name, root in sites.grids.items()}


def weight_quantizer(weight: Tensor, form: Format, least_scale: LeastScale | None = None, groups: int = 1, steps: int = STEPS) -> Quantizer:
    """Per-channel symmetric scales with the least squared error, none below the target's least scale.

    Args:
        weight: (out, in, *kernel).
        form: with less than 7 bits no kernel can saturate, and the target's least scale does not count.
        groups: of the convolution.
    """
    if form.bits < 7:
        return fitted_grid(weight, Scheme(form))
    flat = weight.detach().double().reshape(len(weight), -1)
    largest = flat.abs().amax(1).clamp_min(1e-12)
    least = torch.zeros_like(largest) if least_scale is None else least_scale(weight.detach(), groups).double()
    best = torch.maximum(largest / form.high, least)
    error = _error(flat, best, form.high)
    for share in torch.linspace(0.5, 0.99, steps).tolist():
        scale = torch.maximum(largest * share / form.high, least)
        e = _error(flat, scale, form.high)
        best, error = torch.where(e < error, scale, best), torch.minimum(e, error)
    return Quantizer(form, best, torch.zeros(len(weight), dtype=torch.int64), axis=0)


def _error(flat: Tensor, scale: Tensor, high: int) -> Tensor:
    s = scale[:, None]
    return (flat - (flat / s).round().clamp(-high, high) * s).square().sum(1)
