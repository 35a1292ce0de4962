"""Weight scales that never saturate uint8 x int8 on x86 without VNNI.

There a kernel adds two products into a 16-bit register that saturates, before it sums in 32 bits. ONNX Runtime walks the reduction axis in
order (kernel row, kernel column, input channel), two by two; OpenVINO takes the channels of each kernel position two by two, which differs
where their number is odd. Scales here are safe in both orders, and on a CPU with VNNI, where nothing saturates, the same file gives the
same sums: so files are made with them everywhere, and do not depend on the CPU that they were made on. Activation codes reach 255, so a pair of weight codes of one sign
can saturate exactly if their magnitudes sum to more than 128. The remedy in use is 7-bit weights; a scale that keeps the worst
pair of each channel just safe loses 0.4-0.6 bit less, and is exact too. It must be computed on the final widths: which weights
are neighbours changes when channels are removed. (Observed on the kernels of both runtimes; not from a paper.)
"""

from __future__ import annotations

import torch
from torch import Tensor

#: the largest code of a symmetric int8 weight
LARGEST = 127
#: codes of one sign in a pair whose magnitudes sum to this are safe: 128 * 255 = 32640 < 32767
SAFE_SUM = 128


def _pairs(weight: Tensor) -> Tensor:
    """[out, in, *kernel] or [out, in] -> [out, pairs, 2]: pairs of the whole walk, and of each kernel position where these are others."""
    positions = weight.detach().movedim(1, -1).reshape(len(weight), -1, weight.shape[1])
    flat = positions.reshape(len(weight), -1)
    pairs = torch.nn.functional.pad(flat, (0, flat.shape[1] % 2)).reshape(len(weight), -1, 2)
    if weight.shape[1] % 2 == 0:
        return pairs
    return torch.cat([pairs, torch.nn.functional.pad(positions, (0, 1)).reshape(len(weight), -1, 2)], 1)


def is_depthwise(weight: Tensor, groups: int) -> bool:
    """True for one input channel per filter and several groups: such kernels do not pair products."""
    return weight.dim() > 2 and groups > 1 and weight.shape[1] == 1


def pair_safe_scale(weight: Tensor, groups: int = 1) -> Tensor:
    """Per-channel scales with ``|code| <= 127`` at which no pair can saturate.

    Args:
        weight: [out, in] of a linear layer, or [out, in / groups, *kernel] of a convolution; each group's pairs lie within the
            group's own input channels, so grouped convolutions need nothing special.
        groups: of the convolution. A depthwise one is exact anyway: its scale is the plain ``max|w| / 127``.

    Returns:
        Scales, shape [out], float64, positive.
    """
    values = weight.detach().double()
    pairs = _pairs(values)
    plain = pairs.abs().amax((1, 2)) / LARGEST
    if is_depthwise(weight, groups):
        return plain.clamp_min(torch.finfo(torch.float32).tiny)
    positive, negative = pairs.clamp_min(0).sum(-1), (-pairs).clamp_min(0).sum(-1)
    worst = torch.maximum(positive, negative).amax(1)
    # SAFE_SUM - 1: rounding raises the sum of two codes by one at most
    return torch.maximum(plain, worst / (SAFE_SUM - 1)).clamp_min(torch.finfo(torch.float32).tiny)


def may_saturate(codes: Tensor, groups: int = 1, *, largest: int = 255) -> bool:
    """True if some input makes a pair saturate.

    Args:
        codes: integer weight codes in the layout of `pair_safe_scale`.
        groups: of the convolution.
        largest: the largest activation code that occurs, if less than 255.
    """
    if is_depthwise(codes, groups):
        return False
    pairs = _pairs(codes.to(torch.int64))
    positive, negative = pairs.clamp_min(0).sum(-1), pairs.clamp_max(0).sum(-1)
    return bool(((positive * largest > 32767) | (negative * largest < -32768)).any())
