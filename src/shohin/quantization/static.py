"""Static integer quantization of a program: ranges from data, weights on a grid, biases corrected in one ordered pass.

Bias correction follows Nagel et al., "Data-Free Quantization" (1906.04721), section 4.2, with measured means: each layer's
bias absorbs the mean shift that its snapped weights and already snapped inputs cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call
from shohin.errors import DataError, PlanError
from shohin.evidence.calibration import METHODS, Method, Observer, Ranges, chosen_range, observe, site_methods
from shohin.evidence.ranges import grid
from shohin.evidence.reach import reached
from shohin.formats import Quantizer, named_format
from shohin.program import Folded, Program, call_inputs, family, fold, interpret, joined_inputs
from shohin.program.fold import CONVOLUTIONS
from shohin.program.nodes import argument
from shohin.program.program import shape_of
from shohin.quantization.quantized import Quantized, address_of
from shohin.quantization.sites import FUSED, IDENTITY, MOVES, PADS, POOLS, Sites, base, find_sites, quantizable
from shohin.quantization.smoothing import ROWS, Channels, columned, columns_of, even_rows, one_scale, readers_of, smoothed

#: the least scale of each output channel of a weight (a target's rule, for example pair-safe scales), or None
LeastScale = Callable[[Tensor, int], Tensor]
#: most samples whose means biases are corrected by, since they go through each layer at once; fewer where an activation is large, so that
#: none has more numbers than this, but never fewer than these
CORRECTED, NUMBERS, LEAST = 256, 2**24, 16
#: most steps of a bias: sums of 32 bits must not overflow
BIAS_LIMIT = 2**30


def quantize_program(
    program: Program,
    layers: set[str],
    calls: Sequence[Call],
    *,
    weight_format: str = "int8",
    activation_format: str = "uint8",
    ranges: Ranges = "mse",
    smoothing: bool = True,
    least_scale: LeastScale | None = None,
    correct_bias: bool = True,
) -> Quantized:
    """Quantizes the layers at the given addresses; the rest stays float.

    Args:
        program: with the values to quantize (trained, cut...).
        layers: addresses of convolutions and linear layers.
        calls: calibration batches, iterated twice.
        ranges: how ranges of activations are chosen, one of `shohin.evidence.calibration.METHODS`; or patterns of their addresses (an
            operation's, an input's name) to methods, of which the last one that matches decides, and "mse" where none does.
        smoothing: give activations that floating operations make, and that linear layers alone read as codes, a scale for each channel
            where that makes the layers' outputs more exact; their ranges are then chosen by that error. Not where another range method
            than "mse" was asked for. See `shohin.quantization.smoothing`.
        least_scale: (weight, groups) -> least scale of each output channel, in the weight's unit.

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
    methods = _methods(folded.program, sites, ranges)
    leading = _leading(folded.program, calls)
    masks = _masks(folded.program, sites, leading)
    smooth = {site: names for site, names in _smoothable(folded.program, sites).items() if smoothing and methods[site] is METHODS["mse"]}
    channels = {site: Channels(-(-ROWS // len(calls))) for site in smooth}
    observers, means = _observe(folded.program, sites, calls, methods, len(leading), masks, channels)
    activations = _activation_quantizers(sites, observers, methods, activation_format)
    tensors = dict(folded.program.tensors)
    weights: dict[str, Quantizer] = {}
    for site, names in smooth.items():
        q = smoothed(
            channels[site],
            [tensors[n] for n in names],
            named_format(activation_format),
            lambda w: weight_quantizer(w, weight_format, least_scale),
        )
        if q is not None:
            activations[site], columns = q, columns_of(q)
            for name in names:
                over = weight_quantizer((tensors[name].detach() / columns).float(), weight_format, least_scale)
                weights[name] = columned(over, columns)
    for node in folded.program.graph.nodes:
        origin = folded.program.origins.get(node.name)
        if origin and origin.address in sites.layers:
            name = sites.layers[origin.address]
            if name not in weights:
                groups = argument(node, 6, 1) if family(node) in CONVOLUTIONS else 1
                weights[name] = weight_quantizer(tensors[name], weight_format, least_scale, groups)
    tensors |= {name: q.fake(tensors[name].detach()).detach() for name, q in weights.items()}
    program = replace(folded.program, tensors=tensors)
    if correct_bias:
        program = replace(program, tensors=_corrected(program, sites, activations, leading, means, masks))
    program = replace(program, tensors=_with_integer_biases(program, sites, activations, weights))
    return Quantized(Folded(program, folded.folded), activations, weights, sites)


def placeholder(program: Program, layers: set[str]) -> Quantized:
    """A quantized program with made-up activation grids, for timing: what it computes is meaningless, what it costs is not."""
    folded = fold(program)
    sites = find_sites(folded.program, layers & set(quantizable(folded.program)))
    form = named_format("uint8")
    own = {}
    for name in sites.own:
        positive = sites.low.get(name) == 0.0
        own[name] = Quantizer(form, torch.tensor(6 / 255 if positive else 0.05, dtype=torch.float64), torch.tensor(0 if positive else 128))
    weights = {name: weight_quantizer(folded.program.tensors[name], "int7", None, steps=0) for name in sites.layers.values()}
    return Quantized(folded, {name: own[root] for name, root in sites.grids.items()}, weights, sites)


def _methods(program: Program, sites: Sites, ranges: Ranges) -> dict[str, Method]:
    """The range method of each site that has its own grid."""
    addresses = {name: address_of(program, name) for name in sites.grids}
    shared = {addresses[name]: addresses[root] for name, root in sites.grids.items() if name != root}
    chosen = site_methods(ranges, [addresses[name] for name in sites.own], shared)
    return {name: chosen[addresses[name]] for name in sites.own}


def _smoothable(program: Program, sites: Sites) -> dict[str, list[str]]:
    """Activation -> weights of the linear layers that read it: made by a floating operation that no integer kernel may absorb, each weight
    read once, and nothing else reads codes of it. Not behind a mean: OpenVINO fuses the factors into it and gets their axis wrong."""
    nodes = {node.name: node for node in program.graph.nodes}
    layers = {n.name: sites.layers[program.origins[n.name].address] for n in _integer_layers(program, sites)}
    once = {weight for weight in layers.values() if list(layers.values()).count(weight) == 1}
    linear = {name: weight for name, weight in layers.items() if family(nodes[name]) == "linear" and weight in once}
    found = readers_of(linear, {name: nodes_ for name, nodes_ in sites.readers.items() if name in sites.own})
    return {name: weights for name, weights in found.items() if _made_by(nodes[name]) not in {*FUSED, *PADS, *POOLS, "linear"}}


def _made_by(node: fx.Node) -> str:
    """The operation whose values these are, wherever they were moved."""
    while node.op == "call_function" and (family(node) in MOVES or family(node) in IDENTITY):
        source: Any = node.args[0]
        node = source
    return family(node) if node.op == "call_function" else "input"


def _integer_layers(program: Program, sites: Sites) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and program.origins[n.name].address in sites.layers]


def _masks(program: Program, sites: Sites, calls: Sequence[Call]) -> dict[str, Tensor]:
    """Linear layer on sequences -> which rows of these calls count, where padding that a mask hides does not."""
    layers = {n.name: n.meta["val"].dim() - 1 for n in _integer_layers(program, sites) if family(n) == "linear" and n.meta["val"].dim() > 2}
    found = reached(program, joined_inputs(program, calls, sum(call.size for call in calls)), layers)
    return {name: rows for name, rows in found.items() if bool(rows.any()) and not bool(rows.all())}


def _observe(
    program: Program,
    sites: Sites,
    calls: Iterable[Call],
    methods: Mapping[str, Method],
    counted: int,
    masks: Mapping[str, Tensor],
    channels: Mapping[str, Channels],
) -> tuple[dict[str, Observer], dict[str, tuple[Tensor, int]]]:
    """What watched the sites that have their own grid, and channel sums of every integer layer's output over the first ``counted`` calls.

    Args:
        masks: of these calls, see `_masks`.
        channels: shown the activations of all calls; where there are masks, of these alone.
    """
    observers = {name: method.observer(address_of(program, name)) for name, method in methods.items()}
    means: dict[str, tuple[Tensor, int]] = {}
    sums = True
    done = dict.fromkeys(masks, 0)

    def of_call(name: str, value: Tensor) -> Tensor | None:
        """The part of a layer's mask that is of this call."""
        count = value[..., 0].numel()
        return masks[name][done[name] : done[name] + count] if name in masks else None

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in observers:
            observe(observers[node.name], value)
        origin = program.origins[node.name]
        if node.name in channels and (sums or not masks.keys() & sites.readers[node.name]):
            used = [mask for reader in sites.readers[node.name] if (mask := of_call(reader, value)) is not None]
            channels[node.name].update(even_rows(value, torch.stack(used).any(0) if used else None))
        if sums and origin.address in sites.layers:
            total, count = _channel_sums(value, node, of_call(node.name, value))
            if node.name in done:
                done[node.name] += value[..., 0].numel()
            before = means.get(node.name)
            means[node.name] = (total, count) if before is None else (before[0] + total, before[1] + count)
        return value

    tensors = _channels_last(program)
    with torch.no_grad():
        for number, call in enumerate(calls):
            sums = number < counted
            inputs = call_inputs(program, call)
            for name, x in zip(program.inputs, inputs, strict=True):
                if name in observers:
                    observe(observers[name], x)
                if name in channels:
                    channels[name].update(even_rows(x, None))
            interpret(program, program.graph, tensors, inputs, visit)
    return observers, means


def _leading(program: Program, calls: Sequence[Call]) -> list[Call]:
    """The first calls whose samples go through each layer at once, at least one."""
    tensors = [n for n in program.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    largest = max((math.prod(shape_of(node)) // program.batch for node in tensors), default=1)
    most = min(CORRECTED, max(NUMBERS // max(largest, 1), LEAST))
    found, seen = [calls[0]], calls[0].size
    for call in calls[1:] if not program.fixed else ():
        seen += call.size
        if seen > most:
            break
        found.append(call)
    return found


def _channel_sums(value: Tensor, node: fx.Node, mask: Tensor | None) -> tuple[Tensor, int]:
    """The sum of each channel: within a sample in the tensor's own precision, which is far faster, over samples in float64.

    Args:
        mask: which rows of a linear layer's output count; None for all.
    """
    if mask is not None:
        return value.reshape(-1, value.shape[-1])[mask].double().sum(0), int(mask.sum())
    axis = _channel_axis(node, value)
    inner = [d for d in range(1, value.dim()) if d != axis]
    sums = value.sum(inner) if inner else value
    return (sums.double() if axis == 0 else sums.double().sum(0)), value.numel() // value.shape[axis]


def _channel_axis(node: fx.Node, value: Tensor) -> int:
    return 1 if family(node) in CONVOLUTIONS else value.dim() - 1


def _channels_last(program: Program) -> dict[str, Tensor]:
    """The program's tensors, with weights of two-dimensional convolutions in the layout in which they and what follows run fastest."""
    tensors = dict(program.tensors)
    for node in program.graph.nodes:
        if (
            node.op == "call_function"
            and family(node) == "conv2d"
            and isinstance(node.args[1], fx.Node)
            and node.args[1].name in program.names
        ):
            name = program.names[node.args[1].name]
            tensors[name] = tensors[name].detach().to(memory_format=torch.channels_last)
    return tensors


def _activation_quantizers(
    sites: Sites, observers: Mapping[str, Observer], methods: Mapping[str, Method], format_name: str
) -> dict[str, Quantizer]:
    form = named_format(format_name)
    own = {}
    for name, observer in observers.items():
        low, high = chosen_range(observer, form, methods[name])
        low = max(low, sites.low[name]) if name in sites.low else low
        high = min(high, sites.high[name]) if name in sites.high else high
        scale, zero = grid(low, high, form)
        if name in sites.high and sites.low.get(name) == 0.0:
            scale = min(scale, sites.high[name] / (form.high - form.low))
        own[name] = Quantizer(form, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))
    return {name: own[root] for name, root in sites.grids.items()}


def weight_quantizer(
    weight: Tensor, format_name: str, least_scale: LeastScale | None = None, groups: int = 1, steps: int = 40
) -> Quantizer:
    """Per-channel symmetric scales with the least squared error, none below the target's least scale.

    Args:
        weight: (out, in, *kernel).
        groups: of the convolution.
    """
    form = named_format(format_name)
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


def _corrected(
    program: Program,
    sites: Sites,
    activations: Mapping[str, Quantizer],
    calls: Sequence[Call],
    means: Mapping[str, tuple[Tensor, int]],
    masks: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Tensors with corrected biases. All these calls go through each layer before the next is corrected; the means are theirs, too."""
    tensors = dict(program.tensors)
    running = _channels_last(program)
    joined = joined_inputs(program, calls, sum(call.size for call in calls))
    grids: dict[str, Callable[[Tensor], Tensor]] = {name: partial(_snapped, q) for name, q in activations.items()}
    codes: dict[str, Tensor] = {}

    def feed(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What integers read of an activation that floating operations make."""
        snapped = [
            codes[base(given).name]
            if isinstance(given, fx.Node) and base(given).name in codes and node.name in sites.readers[base(given).name]
            else value
            for given, value in zip(node.args, args, strict=True)
        ]
        return tuple(snapped)

    def kept(name: str, value: Tensor) -> Tensor:
        if name not in grids:
            return value
        if name not in sites.readers:
            return grids[name](value)
        codes[name] = grids[name](value)
        return value

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in means and len(node.args) > 2 and isinstance(node.args[2], fx.Node):
            total, count = _channel_sums(value, node, masks.get(node.name))
            shift = means[node.name][0] / means[node.name][1] - total / count
            name = program.names[node.args[2].name]
            tensors[name] = (tensors[name].detach().double() + shift).to(tensors[name].dtype)
            shape = [1] * value.dim()
            shape[_channel_axis(node, value)] = -1
            value.add_(shift.to(value.dtype).reshape(shape))
        return kept(node.name, value)

    with torch.no_grad():
        inputs = [kept(name, x) for name, x in zip(program.inputs, joined, strict=True)]
        interpret(program, program.graph, running, tuple(inputs), visit, feed)
    return tensors


def _with_integer_biases(
    program: Program, sites: Sites, activations: Mapping[str, Quantizer], weights: Mapping[str, Quantizer]
) -> dict[str, Tensor]:
    """Tensors with the biases of integer layers on the grid of their sums, input scale times weight scale, as files hold them.

    A bias that several layers read, or that needs more than `BIAS_LIMIT` steps, stays as it is.
    """
    tensors = dict(program.tensors)
    for node in program.graph.nodes:
        if node.op != "call_function" or program.origins[node.name].address not in sites.layers or len(node.args) < 3:
            continue
        source, _, bias = node.args[:3]
        if not isinstance(bias, fx.Node) or bias.name not in program.names or len(bias.users) > 1 or not isinstance(source, fx.Node):
            continue
        data = activations.get(base(source).name)
        if data is None:
            continue
        name = program.names[bias.name]
        step = (one_scale(data).scale.float() * weights[sites.layers[program.origins[node.name].address]].scale.float()).double()
        codes = (tensors[name].detach().double() / step).round()
        if bool((codes.abs() <= BIAS_LIMIT).all()):
            tensors[name] = (codes * step).to(tensors[name].dtype)
    return tensors


def _snapped(q: Quantizer, x: Tensor) -> Tensor:
    """On the grid in one pass over memory: where a value lies halfway between codes, it may be the other one than `simulate` takes."""
    if q.axis is not None:
        return q.fake(x)
    return torch.fake_quantize_per_tensor_affine(x, float(q.scale.float()), int(q.zero_point), q.format.low, q.format.high)
