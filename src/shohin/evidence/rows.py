"""Layer inputs as rows: what a linear layer or a convolution multiplies its weights with, a bounded sample of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shohin.errors import DataError

Spread = int | Sequence[int]


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution with zero padding.

    Args:
        kernel: size in each spatial dimension; its length is the number of spatial dimensions.
        stride, dilation: an int or one for each dimension.
        padding: an int, one for each dimension, "valid" or "same" (stride 1).
        groups: of the convolution.
    """

    kernel: tuple[int, ...]
    stride: Spread = 1
    padding: Spread | str = 0
    dilation: Spread = 1
    groups: int = 1

    @property
    def taps(self) -> int:
        """Kernel positions: the product of ``kernel``."""
        out = 1
        for k in self.kernel:
            out *= k
        return out

    def pads(self) -> list[tuple[int, int]]:
        """Zeros before and after, for each spatial dimension."""
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel)
        if self.padding == "same":
            totals = [d * (k - 1) for k, d in zip(self.kernel, self._each(self.dilation), strict=True)]
            return [(t // 2, t - t // 2) for t in totals]
        if isinstance(self.padding, str):
            raise DataError(f"padding must be numbers, 'valid' or 'same'; got {self.padding!r}")
        return [(p, p) for p in self._each(self.padding)]

    def strides(self) -> list[int]:
        """Stride for each spatial dimension."""
        return self._each(self.stride)

    def dilations(self) -> list[int]:
        """Dilation for each spatial dimension."""
        return self._each(self.dilation)

    def _each(self, value: Spread) -> list[int]:
        values = [value] * len(self.kernel) if isinstance(value, int) else [int(v) for v in value]
        if len(values) == 1:
            values = values * len(self.kernel)
        if len(values) != len(self.kernel):
            raise DataError(f"a window of {len(self.kernel)} dimensions got {len(values)} values: {values}")
        return values


def linear_rows(x: Tensor, max_rows: int | None = None, generator: torch.Generator | None = None, *others: Tensor) -> tuple[Tensor, ...]:
    """Rows of tensors ``[..., features]``, the same random ones of each.

    Args:
        x: ``[..., F]``.
        max_rows: at most this many rows, drawn without replacement; None takes all.
        generator: draws them.
        others: tensors with the same leading dimensions (a layer's output).

    Returns:
        ``([n, F], [n, F'], ...)``.
    """
    flat = [t.reshape(-1, t.shape[-1]) for t in (x, *others)]
    count = flat[0].shape[0]
    if any(t.shape[0] != count for t in flat):
        raise DataError(f"inputs and outputs have other leading dimensions: {[tuple(t.shape) for t in (x, *others)]}")
    chosen = _sample(count, max_rows, generator)
    return tuple(flat) if chosen is None else tuple(t[chosen.to(t.device)] for t in flat)


def conv_rows(
    x: Tensor,
    window: Window,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
    output: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Input patches of a convolution at random output positions; only the sampled ones are ever copied.

    Args:
        x: ``[N, C, *spatial]``.
        window: the convolution's geometry.
        max_rows: at most this many positions of all ``N * prod(output size)``; None takes all.
        generator: draws them without replacement.
        output: ``[N, O, *output size]``, sampled at the same positions.
        at: these positions instead of random ones, indices into all of them.

    Returns:
        Patches ``[n, C * prod(kernel)]`` in the order of ``weight.reshape(O, -1)`` (channel, then kernel position), and
        output rows ``[n, O]`` or None.
    """
    dims = len(window.kernel)
    if x.dim() != dims + 2:
        raise DataError(f"a convolution with kernel {window.kernel} needs an input [N, C, {dims} spatial]; got {tuple(x.shape)}")
    flat_pads = [p for pair in reversed(window.pads()) for p in pair]
    view = F.pad(x, flat_pads) if any(flat_pads) else x
    for i, (k, s, d) in enumerate(zip(window.kernel, window.strides(), window.dilations(), strict=True)):
        if view.shape[2 + i] < (k - 1) * d + 1:
            raise DataError(f"the kernel {window.kernel} is larger than the padded input {tuple(view.shape)}")
        view = view.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
    view = view.movedim(1, 1 + dims)  # [N, *output size, C, *kernel], still a view
    sizes = view.shape[: 1 + dims]
    if output is not None and (output.shape[0], *output.shape[2:]) != tuple(sizes):
        raise DataError(f"the output {tuple(output.shape)} does not fit the input {tuple(x.shape)}: expected [N, O, {tuple(sizes[1:])}]")
    chosen = _sample(sizes.numel(), max_rows, generator) if at is None else at
    last = None if output is None else output.movedim(1, -1)
    if chosen is None:
        patches = view.reshape(sizes.numel(), -1)
        return patches, None if last is None else last.reshape(sizes.numel(), -1)
    where = torch.unravel_index(chosen.to(x.device), sizes)
    return view[where].flatten(1), None if last is None else last[where]


def _sample(count: int, limit: int | None, generator: torch.Generator | None) -> Tensor | None:
    if limit is None or count <= limit:
        return None
    return torch.randperm(count, generator=generator)[:limit].sort().values
