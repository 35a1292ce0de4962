"""One tensor as the few numbers that are not zero and where they stand, if that is smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shohin.errors import RunError

#: bytes of a tensor for each byte that it is stored in, at most: of 8-byte numbers a bit mask alone comes to this
EXPANSION = 64
_MOST_DIMENSIONS = 64
#: the last byte of -0.0
_SIGN = 0x80
_FIELDS = {"dense": {"dense"}, "bits": {"bits", "values", "shape"}, "gaps": {"gaps", "values", "shape"}}


def packed(tensor: Tensor) -> dict[str, Tensor]:
    """The smallest of three forms: field -> tensor.

    - ``dense``: the tensor;
    - ``bits`` (one bit for each element, the first lowest in its byte) and ``values``: ``n / 8`` bytes and what stays;
    - ``gaps`` (a byte for each value and one more: zeros before it, and after the last) and ``values``, where no gap is above 255
      and the tensor is at most 64 times as large.

    ``shape`` is int64. Zero is what consists of zero bytes alone; NaN is a value. Where multiplication with a mask has left many -0.0,
    these are zeros too and ``negative`` holds one bit for each zero. All come back bit for bit.
    """
    flat = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
    count, size = flat.numel(), flat.element_size()
    dense = {"dense": flat.reshape(tensor.shape)}
    if not count:
        return dense
    raw = flat.view(torch.uint8).reshape(count, size)
    stays, extra = _stays(raw.numpy())
    places = np.flatnonzero(stays)
    overhead = 8 * tensor.dim() + sum(t.numel() for t in extra.values())
    best, cost = dense, count * size
    bits = (count + 7) // 8 + len(places) * size + overhead
    if bits < cost:
        best, cost = {"bits": torch.from_numpy(np.packbits(stays, bitorder="little"))}, bits
    gaps = np.diff(np.concatenate([[-1], places, [count]])) - 1
    short = len(gaps) + len(places) * size + overhead
    if short < cost and int(gaps.max()) <= 255 and count * size <= EXPANSION * short:
        best, cost = {"gaps": torch.from_numpy(gaps.astype(np.uint8))}, short
    if best is dense:
        return dense
    return (
        best
        | extra
        | {
            "values": raw[torch.from_numpy(places)].reshape(-1).view(flat.dtype),
            "shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
    )


def _stays(raw: np.ndarray) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Which elements (rows of bytes, the lowest first) are values, and the signs of the zeros where that pays."""
    rest, top = raw[:, :-1].any(1), raw[:, -1]
    zero = ~rest & ((top == 0) | (top == _SIGN))
    negative = zero & (top == _SIGN)
    if int(negative.sum()) * raw.shape[1] <= int(zero.sum()) / 8:
        return rest | (top != 0), {}
    return ~zero, {"negative": torch.from_numpy(np.packbits(negative[zero], bitorder="little"))}


def unpacked(fields: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of what `packed` gave.

    Raises:
        RunError: if the fields contradict each other. Nothing larger than `EXPANSION` times what is stored is allocated.
    """
    form = next((f for f, wanted in _FIELDS.items() if wanted == (set(fields) if f == "dense" else set(fields) - {"negative"})), None)
    if form is None:
        raise RunError(f"the sparse file is damaged: {name} is stored as {sorted(fields)}")
    if form == "dense":
        return fields["dense"]
    values, code = fields["values"], fields[form]
    shape, count = _shape(fields["shape"], name)
    stored = values.numel() * values.element_size() + code.numel() + 8 * len(shape)
    if code.dtype != torch.uint8 or code.dim() != 1 or values.dim() != 1 or count * values.element_size() > EXPANSION * stored:
        raise _lie(name, shape)
    places = _from_bits(code, count) if form == "bits" else _from_gaps(code, count)
    if places is None or len(places) != values.numel():
        raise _lie(name, shape)
    raw = torch.zeros(count, values.element_size(), dtype=torch.uint8)
    if "negative" in fields:
        zero = np.ones(count, bool)
        zero[places] = False
        signs = _from_bits(fields["negative"], int(zero.sum()))
        if signs is None:
            raise _lie(name, shape)
        raw[torch.from_numpy(np.flatnonzero(zero)[signs]), -1] = _SIGN
    raw[torch.from_numpy(places)] = values.contiguous().view(torch.uint8).reshape(len(places), values.element_size())
    return raw.reshape(-1).view(values.dtype).reshape(shape)


def _shape(field: Tensor, name: str) -> tuple[tuple[int, ...], int]:
    if field.dtype != torch.int64 or field.dim() != 1 or len(field) > _MOST_DIMENSIONS:
        raise RunError(f"the sparse file is damaged: the shape of {name} is no list of at most {_MOST_DIMENSIONS} whole numbers")
    shape = tuple(field.tolist())
    if any(n < 1 for n in shape):
        raise _lie(name, shape)
    return shape, math.prod(shape)


def _lie(name: str, shape: tuple[int, ...]) -> RunError:
    return RunError(f"the sparse file is damaged: the shape {shape} of {name} does not fit what is stored of it; write the file again")


def _from_bits(code: Tensor, count: int) -> np.ndarray | None:
    if code.dtype != torch.uint8 or code.dim() != 1 or len(code) != (count + 7) // 8:
        return None
    bits = np.unpackbits(code.numpy(), bitorder="little")
    return None if bits[count:].any() else np.flatnonzero(bits[:count])


def _from_gaps(code: Tensor, count: int) -> np.ndarray | None:
    ends = np.cumsum(code.numpy().astype(np.int64) + 1) - 1
    return ends[:-1] if len(ends) and int(ends[-1]) == count else None


@dataclass(frozen=True)
class Key:
    """The name of a stored tensor: ``field/name``."""

    field: str
    name: str

    @staticmethod
    def parse(text: str) -> Key:
        """Raises RunError without a slash."""
        field, slash, name = text.partition("/")
        if not slash:
            raise RunError(f"the sparse file is damaged: {text!r} is no name of a field; was it written by shohin?")
        return Key(field, name)

    def __str__(self) -> str:
        return f"{self.field}/{self.name}"
