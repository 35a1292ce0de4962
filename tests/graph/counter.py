"""A counter of multiply-accumulates by forward hooks on layers: it sees modules and their shapes, never a graph.

Work between layers (attention written with matmul) is not seen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


def hooked_macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """MACs of the layers of one call."""
    total = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        nonlocal total
        total += _macs(module, [*inputs, *named.values()], output)

    whole = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    inside = {id(child) for m in whole for child in m.modules() if child is not m}
    handles = [m.register_forward_hook(add, with_kwargs=True) for m in model.modules() if id(m) not in inside]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return total


def _macs(module: nn.Module, inputs: list[Any], output: Any) -> int:
    if isinstance(module, _CONV):
        return output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, _TRANSPOSED):
        return inputs[0].numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.Bilinear):
        return output.numel() * module.in1_features * module.in2_features
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, *inputs[:3])
    if type(module) in _GATES:
        return _recurrent(module, inputs[0], _GATES[type(module)])
    return 0


def _attention(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> int:
    width, axis = module.embed_dim, 1 if module.batch_first else 0
    batch, queries, keys = query.shape[1 - axis], query.shape[axis], key.shape[axis]
    projections = queries * width * width * 2 + keys * width * (module.kdim + module.vdim)
    return batch * (projections + 2 * queries * keys * width)


def _recurrent(module: Any, x: Tensor, gates: int) -> int:
    positions, hidden = x.numel() // x.shape[-1], module.hidden_size
    if not hasattr(module, "num_layers"):
        return positions * gates * hidden * (module.input_size + hidden)
    directions = 2 if module.bidirectional else 1
    out = getattr(module, "proj_size", 0) or hidden
    total = 0
    for layer in range(module.num_layers):
        given = module.input_size if layer == 0 else out * directions
        total += positions * directions * (gates * hidden * (given + out) + (hidden * out if out != hidden else 0))
    return total
