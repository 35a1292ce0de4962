"""Memory that the activations of a model need: the least that any allocator can do with, and what a simple one needs.

Peak: the largest sum of what is alive at one operation. Arena: one block in which every activation has a fixed place, as
runtimes without an allocator plan it (greedy by size, Pisarchyk and Lee 2020, 2001.03288); never below the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from shohin.graph.lifetimes import Lifetime, lifetimes, operation_order
from shohin.plan import Plan

if TYPE_CHECKING:
    from shohin.graph.graph import Graph


@dataclass(frozen=True)
class Span:
    """Bytes that are needed from one step to another, both included."""

    size: int
    birth: int
    death: int


@dataclass(frozen=True)
class Memory:
    """Memory of activations for one order of operations.

    Args:
        peak_bytes: the largest sum of what is alive at one operation; its arguments and results are.
        address: of that operation, the first if several are equal; "" if there is none.
        alive: (address, bytes) of what is alive then, the largest first.
        arena_bytes: size of a block in which every activation has a fixed place.
        offsets: place of each activation in that block, in bytes, by the address that makes it.
        steps: bytes alive at each operation, in order.
    """

    peak_bytes: int
    address: str
    alive: tuple[tuple[str, int], ...]
    arena_bytes: int
    offsets: tuple[tuple[str, int], ...]
    steps: tuple[int, ...]


def memory(
    graph: Graph,
    plan: Plan | None = None,
    *,
    batch: int = 1,
    element: float = 4.0,
    order: Sequence[str] | None = None,
    reuse: bool = False,
) -> Memory:
    """Memory of the activations of a model, seen through a plan.

    Args:
        plan: its widths and skips are applied.
        batch: samples in one call.
        element: bytes of a floating-point activation element (integers and booleans have their own).
        order: addresses of all operations as they are executed (`operation_order`); default program order.
        reuse: elementwise operations write over an argument that nothing reads later.

    Raises:
        ModelError: if the order is impossible. KeyError: if the plan skips what is no region.
    """
    plan = plan or Plan(graph.program.fingerprint)
    kept, skipped = graph.kept(plan), tuple(plan.skips)
    alive = lifetimes(graph, order, reuse=reuse, skipped=skipped)
    steps = list(order) if order is not None else operation_order(graph, skipped)
    spans = [Span(_bytes(life, kept, batch, element), life.birth, life.death) for life in alive]
    usage = usage_of(spans, len(steps))
    peak, at = max(((n, -i) for i, n in enumerate(usage)), default=(0, 0))
    then = [(life.address, s.size) for life, s in zip(alive, spans, strict=True) if s.birth <= -at <= s.death and s.size]
    block, offsets = arena(spans)
    return Memory(
        peak,
        steps[-at] if steps else "",
        tuple(sorted(then, key=lambda row: -row[1])),
        block,
        tuple(zip((life.address for life in alive), offsets, strict=True)),
        tuple(usage),
    )


def _bytes(life: Lifetime, kept: dict[str, int], batch: int, element: float) -> int:
    count = sum(t.at(kept) for t in life.elements) * (batch if life.batched else 1)
    return round(count * (element if life.itemsize is None else life.itemsize))


def usage_of(spans: Sequence[Span], steps: int) -> list[int]:
    """Bytes alive at each of ``steps`` steps."""
    change = [0] * (steps + 1)
    for span in spans:
        first, last = max(span.birth, 0), min(span.death, steps - 1)
        if first <= last:
            change[first] += span.size
            change[last + 1] -= span.size
    return list(accumulate(change[:steps]))


def arena(spans: Sequence[Span]) -> tuple[int, list[int]]:
    """(size of the block, offset of each span): the largest span first, each at the lowest place that is free while it lives."""
    offsets = [0] * len(spans)
    placed: list[int] = []
    for index in sorted(range(len(spans)), key=lambda i: (-spans[i].size, spans[i].birth, i)):
        span = spans[index]
        together = [i for i in placed if spans[i].birth <= span.death and span.birth <= spans[i].death]
        place = 0
        for other in sorted(together, key=offsets.__getitem__):
            if offsets[other] - place >= span.size:
                break
            place = max(place, offsets[other] + spans[other].size)
        offsets[index] = place
        placed.append(index)
    return max((offsets[i] + spans[i].size for i in placed), default=0), offsets
