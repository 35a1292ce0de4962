"""Data movement: the operator itself runs on the label tensor, so its index mapping needs no rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shohin.graph.labels.context import Context, Parameter, _tensors, rule
from shohin.graph.labels.core import Labels, from_tensor, rigid

MOVEMENT = ["view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "cat", "concat", "stack", "split", "split_with_sizes", "chunk", "slice", "select", "unbind", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "movedim", "swapaxes", "narrow", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tile", "view_as", "index_select", "index", "adjoint", "mT", "hstack", "vstack", "numpy_T"]
SPATIAL = ["max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "max_pool2d_with_indices"]


@rule(*MOVEMENT)
def movement(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Runs the operator on labels. Index tensors keep their values where they are constants of the model."""
    run = [_runnable(context, a, i) for i, a in enumerate(args)]
    if any(r is NotImplemented for r in run):
        return NotImplemented
    result = node.target(*run, **node.kwargs)  # type: ignore[operator]
    if isinstance(result, torch.Tensor):
        return from_tensor(result)
    return [from_tensor(r) for r in result]


def _runnable(context: Context, value: Any, position: int) -> Any:
    if isinstance(value, (tuple, list)) and _tensors(value):
        items = [_runnable(context, v, position) for v in value]
        return NotImplemented if any(i is NotImplemented for i in items) else items
    if isinstance(value, Parameter):
        constant = context.program.tensors[value.name]
        if not constant.is_floating_point():
            return constant.detach().cpu()
        return context.labels(value).full()
    if isinstance(value, Labels):
        # a computed index would need its values: only the moved tensor itself may be unknown
        return NotImplemented if position and value.rigid and not value.shape else context.labels(value).full()
    return value


@rule(*SPATIAL)
def spatial(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Operators that touch only trailing axes: labels may vary on the first two axes, and stay."""
    x = context.labels(args[0])
    val = node.meta["val"]
    first = val if isinstance(val, torch.Tensor) else val[0]
    from shohin.program import concrete

    shape = tuple(concrete(s) for s in first.shape)
    changed = {d for d, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b} | set(range(2, len(shape)))
    if set(x.varying) & changed:
        return NotImplemented
    result = Labels(x.data, shape)
    return result if isinstance(val, torch.Tensor) else [result, rigid(shape)]


@rule("mean", "sum", "amax", "amin", "std", "var", "logsumexp", "prod", "any", "all", "argmax", "norm")
def reduction(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Reduction over axes on which labels do not vary; over a prunable axis the divisor would change: frozen."""
    x = context.labels(args[0])
    dims = args[1] if len(args) > 1 else None
    reduced = set(range(len(x.shape))) if dims in (None, []) else {d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)}
    if set(x.varying) & reduced:
        return NotImplemented
    from shohin.program import shape_of

    shape = shape_of(node)
    keep = len(shape) == len(x.shape)
    data = x.data if keep else x.data.reshape([n for d, n in enumerate(x.data.shape) if d not in reduced])
    return Labels(data, shape)


@rule("softmax", "log_softmax", "cumsum", "_softmax", "sort")
def along_axis(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Mixes along one axis, which must not be prunable."""
    x = context.labels(args[0])
    return NotImplemented if (args[1] % len(x.shape)) in x.varying else x
