"""One look at the calibration data: what watches the activations, means of the layers' outputs, and which rows count."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call
from shohin.evidence.calibration import OBSERVED, Method, Observer, Ranges, observe, site_methods
from shohin.evidence.histogram import Extremes
from shohin.evidence.layer_rows import channel_axis
from shohin.evidence.reach import reached
from shohin.program import Program, call_inputs, family, interpret, joined_inputs
from shohin.program.execute import apart
from shohin.program.inputs import samples
from shohin.program.program import shape_of
from shohin.quantization.quantized import address_of
from shohin.quantization.sites import Sites, integer_layers
from shohin.quantization.smoothing import Channels, even_rows

#: most samples whose means biases are corrected by, since they go through each layer at once; fewer where an activation is large, so that
#: none has more numbers than this, but never fewer than these
CORRECTED, NUMBERS, LEAST = 256, 2**23, 8
#: most numbers of an activation that is only looked at, unless a single sample has more: what a processor's cache holds, since a network
#: is mostly waiting for memory otherwise (EfficientNet-Lite0: 16 ms for an image, 26 in batches of 16)
CACHED = 5 * 2**20


def range_methods(program: Program, sites: Sites, ranges: Ranges) -> dict[str, Method]:
    """The range method of each site that has its own grid."""
    addresses = {name: address_of(program, name) for name in sites.grids}
    shared = {addresses[name]: addresses[root] for name, root in sites.grids.items() if name != root}
    chosen = site_methods(ranges, [addresses[name] for name in sites.own], shared)
    return {name: chosen[addresses[name]] for name in sites.own}


def row_masks(program: Program, sites: Sites, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Linear layer on sequences -> which rows of these samples count, where padding that a mask hides does not."""
    layers = {n.name: n.meta["val"].dim() - 1 for n in integer_layers(program, sites) if family(n) == "linear" and n.meta["val"].dim() > 2}
    found = reached(program, inputs, layers)
    return {name: rows for name, rows in found.items() if bool(rows.any()) and not bool(rows.all())}


def observed(
    program: Program,
    sites: Sites,
    calls: Iterable[Call],
    methods: Mapping[str, Method],
    counted: int,
    masks: Mapping[str, Tensor],
    channels: Mapping[str, Channels],
    whole: bool = False,
) -> tuple[dict[str, Observer], dict[str, tuple[Tensor, int]]]:
    """What watched the sites that have their own grid, and channel sums of every integer layer's output over the first ``counted`` samples.

    Args:
        masks: of these samples, see `row_masks`.
        channels: shown the activations of all calls; where there are masks, of these alone.
        whole: see `taken_whole`; then ``counted`` ends with a call.
    """
    observers = {name: method.observer(address_of(program, name)) for name, method in methods.items()}
    means: dict[str, tuple[Tensor, int]] = {}
    sums, shown = True, OBSERVED
    done = dict.fromkeys(masks, 0)

    def of_call(name: str, value: Tensor) -> Tensor | None:
        """The part of a layer's mask that is of this call."""
        count = value[..., 0].numel()
        return masks[name][done[name] : done[name] + count] if name in masks else None

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in observers:
            observe(observers[node.name], value, shown)
        origin = program.origins[node.name]
        if node.name in channels and (sums or not masks.keys() & sites.readers[node.name]):
            used = [mask for reader in sites.readers[node.name] if (mask := of_call(reader, value)) is not None]
            channels[node.name].update(even_rows(value, torch.stack(used).any(0) if used else None))
        if sums and origin.address in sites.layers:
            total, count = channel_sums(value, node, of_call(node.name, value))
            if node.name in done:
                done[node.name] += value[..., 0].numel()
            before = means.get(node.name)
            means[node.name] = (total, count) if before is None else (before[0] + total, before[1] + count)
        return value

    tensors = channels_last(program)
    with torch.no_grad():
        for seen, share, inputs in in_slices(program, calls, whole, counted):
            sums, shown = seen < counted, max(int(OBSERVED * share), 1)
            for name, x in zip(program.inputs, inputs, strict=True):
                if name in observers:
                    observe(observers[name], x, shown)
                if name in channels:
                    channels[name].update(even_rows(x, None))
            interpret(program, program.graph, tensors, inputs, visit)
    return observers, means


def in_slices(program: Program, calls: Iterable[Call], whole: bool, counted: int = 0) -> Iterator[tuple[int, float, tuple[Any, ...]]]:
    """Inputs of as many samples as fit `CACHED`, in order: how many came before, their share of the batch, and they.

    Args:
        whole: give whole batches, see `taken_whole`.
        counted: no slice goes beyond the first so many samples.
    """
    most, seen = max(CACHED // largest_activation(program), 1), 0
    for call in calls:
        start = 0
        while start < call.size:
            stop = call.size if whole else min(start + most, call.size)
            if seen < counted and not whole:
                stop = min(stop, start + counted - seen)
            inputs = samples(call_inputs(program, call), call.size, start, stop)
            yield seen, (stop - start) / call.size, tuple(map(_rows_last, inputs))
            seen, start = seen + stop - start, stop


def taken_whole(program: Program, calls: Sequence[Call], methods: Mapping[str, Method]) -> bool:
    """True if batches must not be cut: the model fixes their size or lets samples act on each other, or a range is of each batch."""
    moving = any(isinstance(o, Extremes) and o.momentum is not None for o in (m.observer("") for m in methods.values()))
    return moving or not apart(program, call_inputs(program, calls[0]), calls[0].size)


def _rows_last(x: Any) -> Any:
    """Images in the layout of `channels_last`."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


def largest_activation(program: Program) -> int:
    """Numbers for one sample of the largest tensor that an operation makes."""
    tensors = [n for n in program.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    return max(1, max((math.prod(shape_of(node)) // program.batch for node in tensors), default=1))


def leading(program: Program, calls: Sequence[Call], whole: bool = False) -> tuple[tuple[Any, ...], int]:
    """The first samples, which go through each layer at once, and how many these are; with ``whole`` those of whole calls, at least one."""
    most = min(CORRECTED, max(NUMBERS // largest_activation(program), LEAST))
    if program.fixed:
        return call_inputs(program, calls[0]), calls[0].size
    if whole:
        ends = list(itertools.accumulate(call.size for call in calls))
        most = max([end for end in ends if end <= most], default=ends[0])
    return joined_inputs(program, calls, most), min(most, sum(call.size for call in calls))


def channel_sums(value: Tensor, node: fx.Node, mask: Tensor | None) -> tuple[Tensor, int]:
    """The sum of each channel: within a sample in the tensor's own precision, which is far faster, over samples in float64.

    Args:
        mask: which rows of a linear layer's output count; None for all.
    """
    if mask is not None:
        return value.reshape(-1, value.shape[-1])[mask].double().sum(0), int(mask.sum())
    axis = channel_axis(node, value)
    inner = [d for d in range(1, value.dim()) if d != axis]
    sums = value.sum(inner) if inner else value
    return (sums.double() if axis == 0 else sums.double().sum(0)), value.numel() // value.shape[axis]


def channels_last(program: Program) -> dict[str, Tensor]:
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
