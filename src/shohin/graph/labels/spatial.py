"""Operators on the last axes of an image or a sequence: pooling, padding, resampling, windows, Fourier transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.context import Context
from shohin.graph.labels.core import Labels, axes_of, rigid
from shohin.graph.labels.rules import rule
from shohin.program import concrete, family, shape_of
from shohin.program.nodes import argument

SPATIAL = [
    *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"{kind}_pad{n}d" for n in (1, 2, 3) for kind in ("reflection", "replication")),
    *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "grid_sampler_2d",
    "grid_sampler_3d",
]
SAMPLERS = frozenset(["grid_sampler", "grid_sampler_2d", "grid_sampler_3d"])


def _across(context: Context, node: fx.Node, value: Any, touched: set[int]) -> Labels:
    """Labels of what is mixed along ``touched`` axes: what differs along them and elsewhere is united; what differs only there is frozen."""
    x = context.labels(value)
    for plane in x.planes:
        if set(axes_of(plane)) <= touched:
            context.freeze(node, f"{node.target} works along a prunable axis", plane)
    return context.collapse(context.labels(x), touched)


@rule(*SPATIAL)
def spatial(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Operators that touch only the last one to three axes: labels may vary on the others, and stay."""
    val = node.meta["val"]
    shape = tuple(concrete(s) for s in (val if isinstance(val, torch.Tensor) else val[0]).shape)
    count = next(int(c) for c in family(node) if c.isdigit())
    touched = set(range(len(shape) - count, len(shape)))
    x = context.labels(args[0])
    slid = {axis: start for axis in sorted(touched) for start in _slides(node, x, axis, count) if start is not None}
    if slid:  # what stays moves up: the statistics of a window are of the neighbours that stay
        x = _slid(context, x, slid, shape)
    x = _across(context, node, x, touched - set(slid))
    if family(node) in SAMPLERS:
        context.freeze(node, "samples at places that are prunable", args[1])
    result = Labels(x.planes, shape)
    return result if isinstance(val, torch.Tensor) else [result, result]


def _slides(node: fx.Node, x: Labels, axis: int, count: int) -> list[int]:
    """Where the middle of the first window lies, if a pool slides by single steps along a prunable axis of its own (local response
    normalization slides along channels); else nothing.
    """
    plane, place = x.plane(axis), axis - (len(x.shape) - count)
    if not family(node).startswith("avg_pool") or axes_of(plane) != (axis,):
        return []
    kernel, stride, padding = (argument(node, i, default) for i, default in ((1, 1), (2, ()), (3, 0)))

    def along(value: Any) -> int:
        values = value if isinstance(value, (list, tuple)) else [value]
        return int(values[place if len(values) > 1 else 0])

    steps = along(stride) if stride not in ((), []) else along(kernel)
    return [along(kernel) // 2] if steps == 1 and along(padding) == 0 and not argument(node, 4, False) else []


def _slid(context: Context, x: Labels, starts: dict[int, int], shape: tuple[int, ...]) -> Labels:
    """The labels of the middles of all windows."""
    planes = []
    for plane in x.planes:
        axis = axes_of(plane)[0]
        if axis in starts:
            context.normalized.append(plane)
            plane = plane.take(np.arange(starts[axis], starts[axis] + shape[axis]), axis)
        planes.append(plane)
    return context.tidy(planes, tuple(shape[d] if d in starts else n for d, n in enumerate(x.shape)))


@rule("grid_sampler")
def grid_sampler(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Samples an image at given places."""
    shape = shape_of(node)
    x = _across(context, node, args[0], set(range(2, len(shape))))
    context.freeze(node, "samples at places that are prunable", args[1])
    return Labels(x.planes, shape)


@rule("pad", "constant_pad_nd")
def pad(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Padding of whole axes leaves labels alone; constants added along a prunable axis get labels of their own."""
    shape, rank = shape_of(node), len(shape_of(node))
    x = context.labels(args[0])
    amounts = {rank - 1 - i: (args[1][2 * i], args[1][2 * i + 1]) for i in range(len(args[1]) // 2)}
    padded = {d for d, (a, b) in amounts.items() if not (isinstance(a, int) and isinstance(b, int)) or a or b}
    constant = family(node) == "constant_pad_nd" or len(args) < 3 or args[2] == "constant"
    prunable = {d for d in padded if x.plane(d).size > 1 and axes_of(x.plane(d)) == (d,) and constant and min(amounts[d]) >= 0}
    x = _across(context, node, x, padded - prunable)
    planes = []
    for plane in x.planes:
        axis = axes_of(plane)[0]
        if axis in prunable:
            before, after = amounts[axis]
            fresh = context.classes.fresh(before + after)
            parts = [fresh[:before], plane.reshape(-1), fresh[before:]]
            plane = np.concatenate(parts).reshape([-1 if d == axis else 1 for d in range(rank)])
        planes.append(plane)
    return context.tidy(planes, shape)


@rule("im2col")
def im2col(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``[batch, channels, *space] -> [batch, channels * kernel, windows]``: the kernel's places lie inside a channel."""
    x = _across(context, node, args[0], {0, *range(2, len(args[0].shape))})
    shape = shape_of(node)
    if not x.planes:
        return rigid(shape)
    labels = np.repeat(x.along(len(x.shape) - 3), shape[-2] // x.shape[-3])
    return context.tidy([labels.reshape([-1 if d == len(shape) - 2 else 1 for d in range(len(shape))])], shape)


@rule("col2im")
def col2im(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The inverse of im2col: places of one channel are added up."""
    x = _across(context, node, args[0], {0, len(args[0].shape) - 1})
    shape = shape_of(node)
    if not x.planes:
        return rigid(shape)
    grid = x.along(len(x.shape) - 2).reshape(shape[-3], -1)
    context.classes.unite(grid, grid[:, :1])
    return context.tidy([grid[:, 0].reshape([-1 if d == len(shape) - 3 else 1 for d in range(len(shape))])], shape)


@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft")
def fourier(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """A transform along one axis (argument 2, the last by default)."""
    axis = (args[2] if len(args) > 2 and args[2] is not None else -1) % len(args[0].shape)
    return Labels(_across(context, node, args[0], {axis}).planes, shape_of(node))


@rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn")
def fourier_n(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """A transform along several axes (argument 2; the last two, or all)."""
    rank = len(args[0].shape)
    default = [-2, -1] if family(node).endswith("2") else list(range(rank))
    axes = args[2] if len(args) > 2 and args[2] is not None else default
    return Labels(_across(context, node, args[0], {d % rank for d in axes}).planes, shape_of(node))


@rule("view_as_complex", "view_as_real", "tril", "triu")
def last_axes(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Pairs of the last axis become complex numbers (or back); triangles of the last two axes."""
    x, shape = context.labels(args[0]), shape_of(node)
    if family(node) in ("tril", "triu"):
        return _across(context, node, x, {len(shape) - 2, len(shape) - 1})
    if family(node) == "view_as_real":
        return Labels(tuple(p[..., None] for p in x.planes), shape)
    x = _across(context, node, x, {len(x.shape) - 1})
    return Labels(tuple(p[..., 0] for p in x.planes), shape)
