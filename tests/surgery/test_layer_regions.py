"""Whole layers of transformers as choices: the cut is the model that a person makes by leaving layers out."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shohin.data import Call
from shohin.errors import PlanError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.surgery import cut, understand, view
from small_models import lively
from surgery_checks import answers, close


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        q, k, v = (f(x).view(n, length, self.heads, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    """``post``: normalized after each addition; else before each branch."""

    def __init__(self, width: int, hidden: int, post: bool) -> None:
        super().__init__()
        self.post, self.attn = post, Attention(width, 2)
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.post:
            x = self.n1(x + self.attn(x, mask))
            return self.n2(x + self.fc2(F.gelu(self.fc1(x))))
        x = x + self.attn(self.n1(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.n2(x))))


class Stack(nn.Module):
    def __init__(self, depth: int, post: bool, by_name: bool) -> None:
        super().__init__()
        self.layer, self.by_name = nn.ModuleList(Layer(8, 12, post) for _ in range(depth)), by_name

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x=x, mask=mask) if self.by_name else layer(x, mask)
        return x


class Text(nn.Module):
    """Words and a mask in, one vector out."""

    def __init__(self, depth: int, post: bool, masked: bool, by_name: bool = False) -> None:
        super().__init__()
        self.masked, self.words, self.encoder, self.head = masked, nn.Embedding(20, 8), Stack(depth, post, by_name), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(self.words(ids), mask[:, None, None, :].bool() if self.masked else None)
        m = mask[:, :, None].to(x.dtype)
        return self.head((x * m).sum(1) / m.sum(1))


@dataclass(frozen=True)
class Kind:
    post: bool
    masked: bool
    by_name: bool = False


KINDS = {
    "post": Kind(True, False),
    "post masked": Kind(True, True),
    "pre": Kind(False, False),
    "pre masked": Kind(False, True),
    "by name": Kind(True, True, True),
}
DEPTH = 3
known: dict[str, tuple[nn.Module, Graph]] = {}


def inputs(batch: int, seed: int) -> Call:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return Call((torch.randint(0, 20, (batch, 5), generator=g), mask), {}, None, None)


def understood(name: str) -> tuple[nn.Module, Graph]:
    if name not in known:
        torch.manual_seed(3)
        kind = KINDS[name]
        model = lively(Text(DEPTH, kind.post, kind.masked, kind.by_name))
        known[name] = model, understand(model, inputs(2, 0))
    return known[name]


def without(model: nn.Module, skipped: tuple[int, ...]) -> nn.Module:
    """By hand: a shorter list of layers."""
    made = copy.deepcopy(model)
    made.encoder.layer = nn.ModuleList(layer for i, layer in enumerate(made.encoder.layer) if i not in skipped)
    return made


def plan_of(graph: Graph, skipped: tuple[int, ...], widths: dict[str, tuple[int, ...]] | None = None) -> Plan:
    return Plan(graph.program.fingerprint, widths or {}, tuple(f"encoder.layer.{i}" for i in skipped))


@pytest.mark.parametrize("name", KINDS)
def test_each_layer_is_a_choice_and_what_only_holds_layers_is_none(name: str) -> None:
    _, graph = understood(name)
    names = {r.name for r in graph.layers}
    assert {f"encoder.layer.{i}" for i in range(DEPTH)} <= names
    assert not names & {"encoder", "encoder.layer"}
    assert not names & {r.name for r in graph.regions}


@pytest.mark.parametrize("name", KINDS)
def test_a_cut_without_layers_is_the_model_with_a_shorter_list(name: str) -> None:
    model, graph = understood(name)
    for count in range(1, DEPTH + 1):
        for skipped in itertools.combinations(range(DEPTH), count):
            plan, wanted, call = plan_of(graph, skipped), without(model, skipped), inputs(4, 9)
            close(answers(view(graph, plan), call), answers(wanted, call), ("view", skipped))
            made = cut(model, graph, plan)
            assert made.form == "module" and made.proof.holds, made.reason
            close(answers(made.model, call), answers(wanted, call), ("cut", skipped))
            assert sum(p.numel() for p in made.model.parameters()) == sum(p.numel() for p in wanted.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_what_stays_keeps_its_weights_and_names(name: str) -> None:
    model, graph = understood(name)
    state = cut(model, graph, plan_of(graph, (1,))).model.state_dict()
    whole = model.state_dict()
    assert set(state) == {n for n in whole if not n.startswith("encoder.layer.1.")}
    assert all(torch.equal(t, whole[n]) for n, t in state.items())


@pytest.mark.parametrize("name", ["post masked", "pre masked"])
def test_what_lies_in_a_skipped_layer_is_skipped_with_it(name: str) -> None:
    """Naming an inner region too changes nothing, whichever of them share an output."""
    model, graph = understood(name)
    outer = graph.region("encoder.layer.1")
    inner = [r.name for r in (*graph.regions, *graph.layers) if r.nodes < outer.nodes]
    assert inner
    alone, both = plan_of(graph, (1,)), Plan(graph.program.fingerprint, {}, ("encoder.layer.1", *inner))
    call = inputs(3, 5)
    close(answers(view(graph, both), call), answers(view(graph, alone), call), inner)
    made = cut(model, graph, both)
    assert made.form == "module", made.reason
    close(answers(made.model, call), answers(without(model, (1,)), call), inner)
    assert graph.macs(both) == graph.macs(alone)
    assert graph.memory(both) == graph.memory(alone)


@pytest.mark.parametrize("name", KINDS)
def test_fewer_layers_cost_a_smaller_share(name: str) -> None:
    _, graph = understood(name)
    whole = graph.macs()
    each = [whole - graph.macs(plan_of(graph, (i,))) for i in range(DEPTH)]
    assert each[0] > 0 and len(set(each)) == 1
    assert graph.macs(plan_of(graph, (0, 2))) == whole - 2 * each[0]
    shorter = understand(without(known[name][0], (0, 2)), inputs(2, 0))
    assert graph.macs(plan_of(graph, (0, 2))) == shorter.macs()


@pytest.mark.parametrize("name", ["post masked", "pre"])
def test_layers_and_widths_in_one_plan(name: str) -> None:
    model, graph = understood(name)
    kept = (0, 2, 3, 7, 8, 11)
    widths = {f"encoder.layer.{i}.fc1.weight": kept for i in range(DEPTH)}
    wanted = without(model, (0,))
    for layer in wanted.encoder.layer:
        gone = [i for i in range(12) if i not in kept]
        layer.fc2.weight.data[:, gone] = 0
    call = inputs(3, 8)
    made = cut(model, graph, plan_of(graph, (0,), widths))
    assert made.form == "module", made.reason
    assert [layer.fc1.out_features for layer in list(made.model.encoder.layer)[1:]] == [6, 6]
    close(answers(made.model, call), answers(wanted, call), widths)


@pytest.mark.parametrize("post", [True, False])
def test_a_list_of_one_layer_offers_the_layer(post: bool) -> None:
    torch.manual_seed(4)
    model = lively(Text(1, post, masked=True))
    graph = understand(model, inputs(2, 0))
    names = [r.name for r in (*graph.layers, *graph.regions)]
    assert "encoder.layer.0" in names and "encoder" not in names and "encoder.layer" not in names
    made = cut(model, graph, plan_of(graph, (0,)))
    assert made.form == "module", made.reason
    close(answers(made.model, inputs(3, 1)), answers(without(model, (0,)), inputs(3, 1)), post)


def test_a_layer_that_does_not_exist_is_named_with_the_closest() -> None:
    model, graph = understood("post")
    with pytest.raises(PlanError, match=r"encoder\.layer\.7.*encoder\.layer\."):
        cut(model, graph, plan_of(graph, (7,)))


def test_a_planner_chooses_among_the_smallest_regions_only() -> None:
    """Costs are told by region; a layer is not counted twice."""
    _, graph = understood("pre")
    known_regions = {r.name for r in graph.regions}
    assert {name for op in graph.costs for name in op.regions} <= known_regions


class Torch(nn.Module):
    """torch's own attention: sizes that the first layer computes are read by the others too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Own() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layer:
            x = layer(x)
        return x.mean(1)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.attn = nn.LayerNorm(8), nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.fc(self.n2(x))


def test_the_first_layer_is_a_choice_though_others_read_its_sizes() -> None:
    torch.manual_seed(5)
    model = lively(Torch())
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    graph = understand(model, (x[:2],))
    assert {r.name for r in graph.layers} == {f"encoder.layer.{i}" for i in range(DEPTH)}
    for skipped in ((0,), (0, 2)):
        made, wanted = cut(model, graph, plan_of(graph, skipped)), without(model, skipped)
        assert made.form == "module", made.reason
        close(answers(made.model, Call((x,), {}, None, None)), answers(wanted, Call((x,), {}, None, None)), skipped)
