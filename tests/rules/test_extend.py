# mypy: ignore-errors
"""Operators of one's own: frozen by name without a rule, prunable with one, and a wrong rule is found out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shohin.extend import Context, Labels, NotConforming, conform, contract, follow, merge, reduce, rule, set_argument
from shohin.graph.labels.rules import RULES
from shohin.plan import Plan
from shohin.surgery import cut, understand
from shohin.surgery.follow import FOLLOW


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))


def operator(name, schema, function, fake, backward):
    """A custom operator with its shapes and its gradient."""
    made = torch.library.custom_op(f"shohin_tests::{name}", function, mutates_args=(), schema=schema)
    made.register_fake(fake)
    made.register_autograd(backward, setup_context=_save)
    return made


def _gate_backward(ctx, g):
    x, y = ctx.saved_tensors
    return g * y.sigmoid(), g * x * y.sigmoid() * (1 - y.sigmoid())


def _places_backward(ctx, g):
    x, w = ctx.saved_tensors
    return torch.einsum("bsc,st->btc", g, w), torch.einsum("bsc,btc->st", g, x)


soft_gate = operator(
    "soft_gate", "(Tensor x, Tensor y) -> Tensor", lambda x, y: x * y.sigmoid(), lambda x, y: torch.empty_like(x), _gate_backward
)
#: the second half of the last axis, then the first
swap_halves = operator(
    "swap_halves",
    "(Tensor x) -> Tensor",
    lambda x: x.roll(x.shape[-1] // 2, -1),
    torch.empty_like,
    lambda ctx, g: g.roll(-(g.shape[-1] // 2), -1),
)
#: each element takes in those before it
running_sum = operator(
    "running_sum", "(Tensor x) -> Tensor", lambda x: x.cumsum(-1), torch.empty_like, lambda ctx, g: g.flip(-1).cumsum(-1).flip(-1)
)
#: less the mean of the last axis
centred = operator(
    "centred", "(Tensor x) -> Tensor", lambda x: x - x.mean(-1, True), torch.empty_like, lambda ctx, g: g - g.mean(-1, keepdim=True)
)
#: [batch, heads * width] -> [batch, width, heads]
into_heads = operator(
    "into_heads",
    "(Tensor x, SymInt heads, SymInt width) -> Tensor",
    lambda x, heads, width: x.reshape(len(x), heads, width).transpose(1, 2).clone(),
    lambda x, heads, width: x.new_empty(x.shape[0], width, heads),
    lambda ctx, g: (g.transpose(1, 2).flatten(1), None, None),
)
#: [batch, t, c], [s, t] -> [batch, s, c]
mixed_places = operator(
    "mixed_places",
    "(Tensor x, Tensor w) -> Tensor",
    lambda x, w: torch.einsum("btc,st->bsc", x, w),
    lambda x, w: x.new_empty(x.shape[0], w.shape[0], x.shape[2]),
    _places_backward,
)


@pytest.fixture(autouse=True)
def tables():
    """The tables of rules as they were before the test."""
    before = dict(RULES), dict(FOLLOW)
    yield
    for table, old in zip((RULES, FOLLOW), before, strict=True):
        table.clear()
        table.update(old)


class Around(nn.Module):
    """``a -> function -> b``, with a layer before that does not meet the operator."""

    def __init__(self, function, width=6):
        super().__init__()
        self.z, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, width), nn.Linear(width, 2)
        self.function = function

    def forward(self, x):
        return self.b(self.function(self.a(self.z(x))))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c, self.b = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(soft_gate(self.a(x), self.c(x)))


def example():
    torch.manual_seed(0)
    return (torch.randn(2, 5),)


def test_an_operator_without_a_rule_is_frozen_with_its_address_and_line():
    graph = understand(Gated(), example())
    assert graph.sizes == {}
    found = next(f for f in graph.frozen if "soft_gate" in f.address)
    assert found.address == "/shohin_tests::soft_gate.0"
    assert "shohin_tests.soft_gate.default has no rule" in found.reason
    assert "test_extend.py" in found.line and "self.b(soft_gate(self.a(x), self.c(x)))" in found.line
    with pytest.raises(NotConforming, match=r"soft_gate\.0: operator shohin_tests\.soft_gate\.default has no rule"):
        conform(Gated(), example())


def test_with_a_rule_it_is_prunable_and_the_cut_is_of_the_users_class():
    rule("shohin_tests::soft_gate")(lambda context, node, args: merge(context, node, *args))
    model = Gated()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = conform(model, example(), groups={"a.weight": 6})
    assert set(graph.group("a.weight").slices) == {"a.weight", "a.bias", "c.weight", "c.bias", "b.weight"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "conform changed the model"
    graph = understand(model, example())
    made = cut(model, graph, Plan(graph.program.fingerprint, {"a.weight": (1, 4)}))
    assert made.form == "module" and type(made.model) is Gated and made.model.c.weight.shape == (2, 5)


def test_conform_takes_calls_by_keyword_and_tells_expected_groups():
    rule("shohin_tests::soft_gate")(lambda context, node, args: merge(context, node, *args))
    conform(Gated(), {"x": example()[0]}, plans=1)
    conform(Gated(), example()[0], plans=1)
    with pytest.raises(NotConforming, match=r"expected the groups \{'a.weight': 5\}, found \{'a.weight': 6\}"):
        conform(Gated(), example(), groups={"a.weight": 5})


def test_a_rule_that_says_no_freezes_the_operator():
    rule("shohin_tests::soft_gate")(lambda context, node, args: NotImplemented)
    graph = understand(Gated(), example())
    assert graph.sizes == {} and any("soft_gate.default does not follow prunable axes here" in f.reason for f in graph.frozen)


def test_a_rule_that_fails_freezes_the_operator_and_says_how():
    rule("shohin_tests::soft_gate")(lambda context, node, args: args[2])
    graph = understand(Gated(), example())
    assert graph.sizes == {} and any("IndexError" in f.reason for f in graph.frozen)


@pytest.mark.parametrize("name", ["swap_halves", "running_sum", "centred"])
def test_a_rule_that_claims_independence_of_what_is_mixed_is_found_out(name):
    """The groups are as wished and every cut equals its view; only the original with zeros tells."""
    rule(f"shohin_tests::{name}")(lambda context, node, args: context.labels(args[0]))
    mixed = getattr(torch.ops.shohin_tests, name)
    model = Around(lambda x: mixed(x))
    graph = understand(model.double(), (example()[0].double(),))
    assert graph.sizes == {"z.weight": 4, "a.weight": 6}
    made = cut(model, graph, Plan(graph.program.fingerprint, {"a.weight": (0, 1, 5)}))
    assert made.proof.holds
    with pytest.raises(NotConforming, match=r"with the plan \{.*a\.weight: .*\} output 0 differs by"):
        conform(model, example(), groups={"z.weight": 4, "a.weight": 6})


def test_a_rule_that_swaps_where_the_operator_does_not_is_found_out():
    def swapped(context: Context, node, args):
        x = context.labels(args[0])
        half = x.shape[-1] // 2
        return context.tidy([torch.from_numpy(p).roll(half, -1).numpy() if p.shape[-1] > 1 else p for p in x.planes], x.shape)

    rule("shohin_tests::soft_gate")(swapped)
    with pytest.raises(NotConforming, match="output 0 differs by"):
        conform(Around(lambda x: soft_gate(x, x)), example(), groups={"z.weight": 4, "a.weight": 6})


def test_right_rules_for_operators_that_mix():
    """Statistics are noted; what is swapped goes in pairs; a running sum stays whole."""

    def mean_free(context, node, args):
        x = context.labels(args[0])
        reduce(context, x, [len(x.shape) - 1], keep=True, changes=True)
        return x

    def pairs(context, node, args):
        x = context.labels(args[0])
        plane = x.plane(len(x.shape) - 1)
        if plane.size > 1:
            halves = plane.reshape(2, -1)
            context.classes.unite(halves[0], halves[1])
        return context.labels(x)

    rule("shohin_tests::centred")(mean_free)
    rule("shohin_tests::swap_halves")(pairs)
    rule("shohin_tests::running_sum")(lambda context, node, args: NotImplemented)
    assert conform(Around(lambda x: centred(x)), example(), groups={"z.weight": 4, "a.weight": 6}).group("a.weight").normalized
    conform(Around(lambda x: swap_halves(x)), example(), groups={"z.weight": 4, "a.weight": 3})
    conform(Around(lambda x: running_sum(x)), example(), groups={"z.weight": 4})


def heads(context, node, args):
    """Labels of ``[batch, heads * width]`` as ``[batch, width, heads]``."""
    x = context.labels(args[0])
    _, count, width = args
    planes = [p.reshape(1, count, width).transpose(0, 2, 1) for p in x.planes]
    return context.tidy(planes, (x.shape[0], width, count))


def headed(x):
    return into_heads(x, 2, 3).tanh().flatten(1)


def test_without_follow_what_the_integers_prevent_is_frozen():
    rule("shohin_tests::into_heads")(heads)
    graph = understand(Around(headed), example())
    assert graph.sizes == {"z.weight": 4}
    assert {f.address for f in graph.frozen} >= {"a.weight", "a.weight#2"}
    reasons = [f.reason for f in graph.frozen if f.address.startswith("a.")]
    assert all(
        "/shohin_tests::into_heads.0: the operator gives" in r and "its integers need a rule (shohin.extend.follow)" in r for r in reasons
    )
    conform(Around(headed), example(), groups={"z.weight": 4})


@pytest.mark.parametrize("early", [True, False])
def test_follow_that_gives_another_shape_is_found_out(early):
    """The number of heads follows and the width does not; in whatever order rule and follow are registered."""

    def sizes(work, node, copy):
        set_argument(work, node, copy, 1, work.shape(work.of(node))[2])

    if early:
        follow("shohin_tests::into_heads")(sizes)
    rule("shohin_tests::into_heads")(heads)
    if not early:
        follow("shohin_tests::into_heads")(sizes)
    graph = understand(Around(headed), example())
    assert graph.sizes == {"z.weight": 4, "a.weight": 2}
    assert any("would stay; its integers need a rule" in f.reason for f in graph.frozen)


def test_with_follow_the_integers_change_with_the_cut():
    @follow("shohin_tests::into_heads")
    def sizes(work, node, copy):
        labels = work.of(node)
        if labels is not None:
            _, width, count = work.shape(labels)
            set_argument(work, node, copy, 1, count)
            set_argument(work, node, copy, 2, width)

    rule("shohin_tests::into_heads")(heads)
    conform(Around(headed), example(), groups={"z.weight": 4, "a.weight": 2, "a.weight#2": 3})


def test_a_contraction_with_a_weight():
    def places(context, node, args):
        x, w = args
        sizes = dict(zip("btcst", (*x.shape, *w.shape), strict=True))
        return contract(context, node, [(x, "btc"), (w, "st")], "bsc", sizes)

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.t, self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 6), nn.Linear(24, 2)
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return self.b(mixed_places(self.a(self.t(x.transpose(1, 2)).transpose(1, 2)), self.w).flatten(1))

    rule("shohin_tests::mixed_places")(places)
    torch.manual_seed(0)
    conform(Mixer(), (torch.randn(2, 4, 5),), groups={"t.weight": 3, "a.weight": 6, "b.weight": 4})


def test_numbers_that_are_not_finite_are_told_from_wrong_rules():
    with pytest.raises(NotConforming, match="is not finite: try the operator where zero is inside its domain"):
        conform(Around(torch.reciprocal), example())


def test_labels_are_what_rules_get():
    seen = []
    rule("shohin_tests::soft_gate")(lambda context, node, args: seen.append(args) or merge(context, node, *args))
    understand(Gated(), example())
    ((x, y),) = seen
    assert isinstance(x, Labels) and isinstance(y, Labels) and x.shape == (2, 6) and x.varying == y.varying == (1,)


def test_the_documentation_runs():
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(compile(blocks[0], "extending.md", "exec"), names)
    assert names["graph"].sizes == {"first.weight": 3, "first.weight#2": 4}
