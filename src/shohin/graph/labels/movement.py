"""Data movement: the operator itself runs on the label tensor, so its index mapping needs no rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shohin.graph.labels.context import Context, Parameter, rule
from shohin.graph.labels.core import Labels, from_tensor
from shohin.program import concrete, family, shape_of
from shohin.program.nodes import arguments, flatten, run

MOVEMENT = [
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "cat",
    "concat",
    "stack",
    "split",
    "split_with_sizes",
    "chunk",
    "slice",
    "select",
    "unbind",
    "squeeze",
    "unsqueeze",
    "expand",
    "expand_as",
    "repeat",
    "repeat_interleave",
    "movedim",
    "swapaxes",
    "narrow",
    "roll",
    "flip",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "tile",
    "view_as",
    "index_select",
    "index",
    "adjoint",
    "mT",
    "hstack",
    "vstack",
    "numpy_T",
]
SPATIAL = [
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "constant_pad_nd",
    "pad",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "max_pool2d_with_indices",
]
#: movements that take an index tensor
INDEXING = frozenset(["index", "index_select", "repeat_interleave"])


@rule(*MOVEMENT)
def movement(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Runs the operator on labels. Index tensors keep their values where these are known."""
    if family(node) in INDEXING and not _can_index(context, node, args):
        return NotImplemented
    moved = [_moved(context, a, i) for i, a in enumerate(args)]
    result = move(node, moved)
    return from_tensor(result) if isinstance(result, torch.Tensor) else [from_tensor(r) for r in result]


def move(node: fx.Node, args: list[Any]) -> Any:
    """The operator on label tensors. Their strides are not those of the tensors, so a view may have to copy."""
    if family(node) == "view" and not isinstance(args[1], torch.dtype):
        return args[0].reshape(args[1])
    return run(node, args, node.kwargs)


def _moved(context: Context, value: Any, position: int) -> Any:
    """An argument as the operator needs it: labels for what is moved (the first argument), values for a known index."""
    if isinstance(value, (tuple, list)):
        return [_moved(context, v, position) for v in value]
    if isinstance(value, (Labels, Parameter)) or (isinstance(value, torch.Tensor) and not position):
        return context.labels(value).full()
    return value


def _can_index(context: Context, node: fx.Node, args: tuple[Any, ...]) -> bool:
    """False if an index that is not known selects along an axis on which labels vary (or as a mask)."""
    unknown = [v for v in flatten(args[1:]) if isinstance(v, (Labels, Parameter))]
    if not unknown:
        return True
    if family(node) == "repeat_interleave":
        return False
    if family(node) == "index":
        places = [i for i, v in enumerate(args[1]) if isinstance(v, (Labels, Parameter))]
        if any(arguments(node)[1][i].meta["val"].dtype == torch.bool for i in places):
            return False
    else:
        places = [args[1] % len(args[0].shape)]
    return not set(places) & set(context.labels(args[0]).varying)


@rule(*SPATIAL)
def spatial(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Operators that touch only the last one to three axes: labels may vary on the others, and stay."""
    x = context.labels(args[0])
    val = node.meta["val"]
    shape = tuple(concrete(s) for s in (val if isinstance(val, torch.Tensor) else val[0]).shape)
    name, rank = family(node), len(shape)
    if "pad" in name:
        touched = {rank - 1 - i // 2 for i, n in enumerate(args[1]) if not isinstance(n, int) or n}
    else:
        touched = set(range(rank - next(int(c) for c in name if c.isdigit()), rank))
    if 1 in x.varying and 1 not in touched:
        x = context.collapse(x, touched)
    if set(x.varying) & (touched | {d for d, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b}):
        return NotImplemented
    result = Labels(x.data, shape)
    return result if isinstance(val, torch.Tensor) else [result, result]


#: reductions -> position of the reduced axes among the arguments
REDUCTIONS = {
    "mean": 1,
    "sum": 1,
    "amax": 1,
    "amin": 1,
    "std": 1,
    "var": 1,
    "logsumexp": 1,
    "prod": 1,
    "any": 1,
    "all": 1,
    "argmax": 1,
    "argmin": 1,
    "linalg_vector_norm": 2,
}


@rule(*REDUCTIONS)
def reduction(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Reduction over axes on which labels do not vary; over a prunable axis the divisor would change: frozen."""
    x = context.labels(args[0])
    place = REDUCTIONS[family(node)]
    dims = args[place] if len(args) > place else None
    whole = dims is None or isinstance(dims, bool) or dims == []
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    reduced = set(range(len(x.shape))) if whole else {d % len(x.shape) for d in listed}
    if set(x.varying) & reduced:
        return NotImplemented
    shape = shape_of(node)
    keep = len(shape) == len(x.shape)
    data = x.data if keep else x.data.reshape([n for d, n in enumerate(x.data.shape) if d not in reduced])
    return Labels(data, shape)


@rule("softmax", "log_softmax", "cumsum", "cumprod", "_softmax", "_log_softmax")
def along_axis(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Mixes along one axis, which must not be prunable."""
    x = context.labels(args[0])
    return NotImplemented if (args[1] % len(x.shape)) in x.varying else x
