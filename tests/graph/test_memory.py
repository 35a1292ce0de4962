"""Activation memory against a simulator that keeps a set of living tensors and nothing else, on random graphs of operations."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shohin.errors import ModelError
from shohin.graph import Graph, understand_program
from shohin.graph.lifetimes import lifetimes, operation_order
from shohin.graph.memory import Span, arena, memory, usage_of
from shohin.plan import Plan
from shohin.program import capture
from shohin.surgery import view
from surgery_cases import CASES
from surgery_checks import understood


def graph_of(model: nn.Module, *xs: Tensor) -> Graph:
    return understand_program(capture(model.eval(), xs))


def simulated(reads: list[list[int]], sizes: list[int], outputs: set[int], order: list[int]) -> list[int]:
    """Bytes alive at each step, tensor i being made by operation i from the tensors it reads; tensor -1 is the input.

    Straight from the definition: a tensor is there from the moment it is made until nothing that is still to come reads it.
    """
    made, usage = {-1}, []
    for step, operation in enumerate(order):
        made.add(operation)
        coming = {r for later in order[step:] for r in reads[later]} | outputs | {operation}
        usage.append(sum(sizes[t] for t in made & coming))
    return usage


class Wired(nn.Module):
    """Operation i makes a tensor of ``widths[i]`` columns from the sum over columns of what it reads."""

    def __init__(self, reads: list[list[int]], widths: list[int], outputs: list[int]) -> None:
        super().__init__()
        self.reads, self.widths, self.outputs = reads, widths, outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        known = {-1: x}
        for i, reads in enumerate(self.reads):
            known[i] = torch.cat([known[r] for r in reads] + [x[:, : self.widths[i]]], 1) if self.widths[i] else known[reads[0]]
        return tuple(known[i] for i in self.outputs)


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_peak_equals_the_simulator_on_random_graphs(seed: int) -> None:
    r = random.Random(seed)
    count = r.randint(2, 7)
    reads = [sorted({r.choice(range(-1, i)) for _ in range(r.randint(1, 3))}) for i in range(count)]
    widths = [r.randint(1, 3) for _ in range(count)]
    outputs = sorted({count - 1, r.randrange(count)})
    graph = graph_of(Wired(reads, widths, outputs), torch.randn(2, 4))
    sizes = {-1: 4}
    for i in range(count):
        sizes[i] = sum(sizes[t] for t in reads[i]) + widths[i]
    reads = [[*t, -1] for t in reads]  # the slice of x is a view
    cats = [a for a in operation_order(graph) if "/cat." in a]
    live = _reachable(reads, outputs)
    assert len(cats) == len(live)  # export leaves out what no output needs
    order = _shuffled(reads, live, r)
    mine = _order_of(graph, {i: cats[live.index(i)] for i in live}, order)
    wanted = simulated(reads, [*(4 * sizes[i] for i in range(count)), 16], set(outputs), order)
    found = memory(graph, order=mine)
    assert found.peak_bytes == max(wanted)
    assert found.address == next(a for a, n in zip([a for a in mine if "/cat." in a], wanted, strict=True) if n == max(wanted))
    assert [n for a, n in zip(mine, found.steps, strict=True) if "/cat." in a] == wanted
    assert memory(graph, order=mine, batch=3, element=2.0).peak_bytes == max(wanted) * 3 // 2
    assert found.arena_bytes >= found.peak_bytes


def _reachable(reads: list[list[int]], outputs: list[int]) -> list[int]:
    seen, stack = set[int](), list(outputs)
    while stack:
        i = stack.pop()
        if i >= 0 and i not in seen:
            seen.add(i)
            stack += reads[i]
    return sorted(seen)


def _shuffled(reads: list[list[int]], live: list[int], r: random.Random) -> list[int]:
    """A random order in which every operation follows what it reads."""
    left, out = set(live), list[int]()
    while left:
        ready = sorted(i for i in left if not any(t in left for t in reads[i]))
        out.append(r.choice(ready))
        left.remove(out[-1])
    return out


def _order_of(graph: Graph, cats: dict[int, str], order: list[int]) -> list[str]:
    """All operations, the slices first."""
    rest = [a for a in operation_order(graph) if a not in set(cats.values())]
    return [*rest, *(cats[i] for i in order)]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 9)), max_size=14))
def test_arena_holds_everything_apart_and_is_never_below_the_peak(rows: list[tuple[int, int, int]]) -> None:
    spans = [Span(size, min(a, b), max(a, b)) for size, a, b in rows]
    block, offsets = arena(spans)
    assert block >= max(usage_of(spans, 10), default=0)
    assert block <= sum(s.size for s in spans)
    for i, (a, x) in enumerate(zip(spans, offsets, strict=True)):
        assert x >= 0 and x + a.size <= block
        for b, y in list(zip(spans, offsets, strict=True))[:i]:
            together = a.birth <= b.death and b.birth <= a.death
            assert not together or x + a.size <= y or y + b.size <= x or not a.size or not b.size


def test_the_order_matters() -> None:
    """Two wide branches: one after the other needs less than side by side."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(2, 50), nn.Linear(50, 2), nn.Linear(2, 50), nn.Linear(50, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.d(self.c(x))

    graph = graph_of(Branches(), torch.randn(2, 2))
    one = ["a/linear.0", "b/linear.0", "c/linear.0", "d/linear.0", "/add.0"]
    both = ["c/linear.0", "a/linear.0", "d/linear.0", "b/linear.0", "/add.0"]
    assert operation_order(graph) == one
    assert memory(graph).peak_bytes == 4 * (2 + 50 + 2) == memory(graph, order=one).peak_bytes
    assert memory(graph, order=both).peak_bytes == 4 * (2 + 50 + 50)
    with pytest.raises(ModelError, match=r"'b/linear.0' comes before 'a/linear.0', which it reads"):
        memory(graph, order=[one[1], one[0], *one[2:]])
    with pytest.raises(ModelError, match=r"no operation of this program; did you mean 'a/linear.0'"):
        memory(graph, order=["a/linear", *one[1:]])
    with pytest.raises(ModelError, match=r"each of 5 operations once; missing: /add.0"):
        memory(graph, order=one[:4])


def test_views_need_no_memory_and_elementwise_operations_may_write_over_their_argument() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)  # 2 x 12
            a, b = y.reshape(-1, 3, 4).transpose(1, 2).chunk(2, 1)
            return torch.relu(a.sigmoid() + b)

    graph = graph_of(Views(), torch.randn(2, 12))
    assert memory(graph).peak_bytes == 4 * (12 + 12)
    alive = {life.address: (life.birth, life.death) for life in lifetimes(graph)}
    assert alive.keys() == {"x", "/tanh.0", "/sigmoid.0", "/add.0", "/relu.0"}  # no view among them
    order = operation_order(graph)
    assert alive["/tanh.0"][1] == order.index("/add.0")  # read through its second half
    assert len(lifetimes(graph, reuse=True)) == 3  # sum and relu write over the sigmoid; the input is left as it is


def test_a_chain_of_elementwise_operations_needs_one_tensor_more_than_its_input() -> None:
    chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sigmoid(), nn.Tanh())
    graph = graph_of(chain, torch.randn(2, 8))
    assert memory(graph).peak_bytes == memory(graph, reuse=True).peak_bytes == 64
    assert len(lifetimes(graph)) == 5 and len(lifetimes(graph, reuse=True)) == 2


def test_integers_have_their_own_size_and_constants_are_no_activations() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) + torch.arange(4.0)

    graph = graph_of(Lookup(), torch.randint(0, 9, (2, 5)))
    assert memory(graph, element=1).steps[0] == 5 * 8 + 5 * 4
    assert not [life for life in lifetimes(graph) if "arange" in life.address]


def test_parts_of_a_recurrence_are_apart() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[1][0]

    graph = graph_of(Last(), torch.randn(2, 5, 3))
    made = [life for life in lifetimes(graph) if life.address == "layer/gru.0"]
    assert [round(sum(t.at({}) for t in life.elements)) for life in made] == [30, 6]
    assert memory(graph).peak_bytes == 4 * (15 + 6 + 36)  # input, initial state, sequence and last state


PLANNED = ["resnet", "mobilenet", "unet", "densenet", "vit fused", "vit separate", "chunks", "flatten"]


@pytest.mark.parametrize("name", PLANNED)
def test_memory_through_a_plan_is_the_memory_of_what_it_leaves(name: str) -> None:
    _, graph = understood(name)
    r = random.Random(3)
    widths = {g.name: tuple(sorted(r.sample(range(g.size), r.randint(1, g.size)))) for g in graph.groups}
    for skips in ((), tuple(region.name for region in graph.regions if region.residual)):
        plan = Plan(graph.program.fingerprint, widths, skips)
        left = memory(graph, plan)
        assert left.peak_bytes == measured(view(graph, plan), CASES[name].call(1, 0).args)
        assert left.peak_bytes <= memory(graph).peak_bytes and left.arena_bytes >= left.peak_bytes


def measured(model: nn.Module, args: tuple[Tensor, ...]) -> int:
    """Peak of a model that is executed operation by operation, its tensors seen as they are made (in float64: halved)."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen = Traced(own)
    inputs = tuple(x.clone() for x in args)
    for x in inputs:
        seen.hold(x)
    with seen:
        out = model(*inputs)
    return seen.peak(out, inputs) // 2


class Traced(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what every operator reads and makes, by memory."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.kept, self.calls = own, list[Tensor](), list[tuple[set[int], set[int]]]()
        self.size: dict[int, int] = {}

    def hold(self, tensor: Tensor) -> int:
        """Keeps a tensor, so that no other can take its memory."""
        self.kept.append(tensor)
        key = tensor.untyped_storage()._cdata
        self.size[key] = max(self.size.get(key, 0), tensor.numel() * tensor.element_size())
        return key

    def __torch_dispatch__(self, func: Callable[..., object], types: object, args: object = (), kwargs: object = None) -> object:
        given = [self.hold(t) for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        made = [self.hold(t) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.calls.append((set(given) - self.own, set(made) - self.own))
        return out

    def peak(self, out: object, inputs: tuple[Tensor, ...]) -> int:
        """The largest sum of what is alive at one call."""
        kept = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(out)}
        alive = {t.untyped_storage()._cdata for t in inputs}
        most = 0
        real = [(given, made) for given, made in self.calls if made - given]  # views make nothing
        for i, (read, new) in enumerate(real):
            alive = (alive | new) & (set().union(*(g for g, _ in real[i:])) | kept | new)
            most = max(most, sum(self.size[k] for k in alive | read))
        return most
