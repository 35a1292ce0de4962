"""Rows of a layer's inputs and outputs at the same positions."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from shohin.evidence.layers import LayerWeight, window_of
from shohin.evidence.rows import conv_rows
from shohin.program import family


def channel_axis(node: fx.Node, value: Tensor) -> int:
    """The axis of a layer's output that its bias goes along."""
    weight = node.args[1]
    if family(node) == "linear" or not isinstance(weight, fx.Node):
        return value.dim() - 1
    return value.dim() - 1 - len(weight.meta["val"].shape[2:])


def input_rows(node: fx.Node, x: Tensor, weight: LayerWeight, at: Tensor) -> Tensor:
    """The rows ``[n, G * F]`` of these output positions that the layer multiplies its weight with."""
    window = window_of(node, weight.shape)
    if window is None:
        return x.reshape(-1, x.shape[-1])[at]
    return conv_rows(x if x.dim() == len(window.kernel) + 2 else x.unsqueeze(0), window, at=at)[0]


def output_rows(node: fx.Node, value: Tensor, at: Tensor) -> Tensor:
    """The outputs ``[n, O]`` at these positions; a copy, which does not hold the whole output."""
    last = value.movedim(channel_axis(node, value), -1)
    return last.reshape(-1, last.shape[-1])[at]


def cross_moments(x: Tensor, missing: Tensor, groups: int, centred: bool) -> Tensor:
    """``E[x r^T]`` of input rows ``[n, G * F]`` and missing outputs ``[n, G * R]``, float64 ``[G, F, R]``; centred, their covariance."""
    left, right = (torch.unflatten(t.detach().to("cpu", torch.float64), 1, (groups, -1)).transpose(0, 1) for t in (x, missing))
    if centred:
        right = right - right.mean(1, keepdim=True)
    out: Tensor = left.transpose(1, 2) @ right / len(x)
    return out
