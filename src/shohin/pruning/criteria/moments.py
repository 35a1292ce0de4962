"""Second moments of what is read, streamed: one Gram matrix for each reading, whatever the number of batches.

Memory: ``8 * groups * features**2`` bytes for each reading; `rounds` splits readings into passes that stay below a limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from shohin.evidence.gram import GramAccumulator
from shohin.pruning.criteria.inputs import Inputs
from shohin.pruning.criteria.passes import forward
from shohin.pruning.criteria.readings import Reading

#: Gram matrices that are held at once, in bytes; a single larger one has a pass of its own
LIMIT = 1 << 30
#: rows for each feature of a layer, over all batches: more cost more than inverting the matrix and say little more
ROWS_PER_FEATURE = 8


def second_moments(inputs: Inputs, listed: Sequence[Reading], limit: int = LIMIT) -> Iterator[tuple[Reading, Tensor]]:
    """(reading, float64 (groups, features, features)): the covariance of its features where they are centred, else E[x x^T].

    One forward pass over the batches for each round of readings.
    """
    for part in rounds(listed, limit):
        sums = [_Sum(one, inputs) for one in part]
        forward(inputs, part, lambda number, x, other, sums=sums: sums[number].update(x, other))  # type: ignore[misc]
        for one in part:
            yield one, sums.pop(0).second()


def rounds(listed: Sequence[Reading], limit: int = LIMIT) -> list[list[Reading]]:
    """Readings whose Gram matrices fit into ``limit`` bytes together, in order; one that does not fit alone has its own round."""
    out: list[list[Reading]] = []
    held = 0
    for one in listed:
        need = 8 * one.groups * one.features**2
        if not out or held + need > limit:
            out.append([])
            held = 0
        out[-1].append(one)
        held += need
    return out


class _Sum:
    """Second moments of one reading."""

    def __init__(self, one: Reading, inputs: Inputs) -> None:
        self.one = one
        self._product: Tensor | None = None
        self._pairs = 0
        rows = min(4096, max(256, ROWS_PER_FEATURE * one.features // max(len(inputs.calls), 1)))
        self._gram = GramAccumulator(one.features * one.groups, rows, groups=one.groups, seed=inputs.seed)

    def update(self, x: Tensor, other: Tensor | None) -> None:
        one = self.one
        if other is not None:
            a, b = aligned(one, x, other)
            grams = (a.transpose(-2, -1) @ a) * (b.transpose(-2, -1) @ b)
            total = grams.sum(0).cpu()
            self._product = total if self._product is None else self._product + total
            self._pairs += a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        elif one.window is not None:
            self._gram.update(x, one.window)
        else:
            self._gram.update(x.movedim(one.axis, -1))

    def second(self) -> Tensor:
        if self._product is not None:  # heads are told apart: each has terms of its own
            return self._product / max(self._pairs, 1) * len(self._product)
        moments = self._gram.moments()
        return moments.covariance if self.one.centred else moments.second


def aligned(one: Reading, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands of a product as float64 (samples, heads, rows, terms): their common last axis is what the product contracts."""
    axis = one.partner[1] if one.partner is not None else -1
    a, b = x.detach().double(), other.detach().double().movedim(axis, -1)
    if a.dim() == b.dim() and a.dim() > 3 and a.shape[-3] != b.shape[-3] and 1 not in (a.shape[-3], b.shape[-3]):
        b = b.repeat_interleave(a.shape[-3] // b.shape[-3], -3)  # grouped queries
    batch = tuple(max(sizes) for sizes in zip(a.shape[:-2], b.shape[:-2], strict=True))
    a, b = (t.expand(*batch, *t.shape[-2:]) for t in (a, b))
    samples = batch[0] if batch else 1
    return a.reshape(samples, -1, *a.shape[-2:]), b.reshape(samples, -1, *b.shape[-2:])


def product_terms(a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """Sum of ``(a_td b_sd)**2`` over samples, heads and pairs for each term d, and the number of these."""
    terms = (a.square().sum(2) * b.square().sum(2)).sum((0, 1))
    return terms.cpu(), a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
