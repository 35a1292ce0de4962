"""Plans make round trips; checkpoints of the original load into a cut; training modes follow."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import small_models as models
from shohin.errors import PlanError
from shohin.plan import Plan
from shohin.program import capture
from shohin.surgery import cut, understand, view
from shohin.surgery.cut import state_by_name
from surgery_cases import CASES
from surgery_checks import answers, close, random_plan, understood

SOME = ["resnet", "densenet", "tied", "vit fused", "vit sdpa", "unet", "chunks"]


@pytest.mark.parametrize("name", SOME)
def test_json_gives_the_same_view(name: str) -> None:
    _, graph = understood(name)
    plan = random_plan(CASES[name], graph, 2)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.digest == plan.digest and hash(again) == hash(plan)
    call = CASES[name].call(2, 0)
    close(answers(view(graph, again), call), answers(view(graph, plan), call), plan)


@pytest.mark.parametrize("name", SOME)
def test_then_equals_cutting_twice(name: str) -> None:
    """The cut model has groups of the same names; a plan for them, after the first plan, is one plan for the original."""
    model, graph = understood(name)
    first = random_plan(CASES[name], graph, 4)
    once = cut(model, graph, first)
    call = CASES[name].call(2, 0)
    narrow = understand(once.model, call)
    left = {g: len(first.widths[g]) for g in first.widths}
    assert {g: n for g, n in left.items() if n > 1}.items() <= narrow.sizes.items()
    second = Plan(narrow.program.fingerprint, {g: tuple(range(0, n, 2)) for g, n in narrow.sizes.items()})
    twice = view(narrow, second)
    together = view(graph, first.then(second))
    close(answers(together, call), answers(twice, call), (first, second))


@pytest.mark.parametrize("name", SOME)
def test_merge_equals_both(name: str) -> None:
    _, graph = understood(name)
    whole = random_plan(CASES[name], graph, 1)
    parts = [Plan(whole.fingerprint, {g: k}) for g, k in whole.widths.items()]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged == whole
    with pytest.raises(PlanError):
        whole.merge(Plan(whole.fingerprint, {next(iter(whole.widths)): (0, 1, 2)}))


def test_fingerprint_knows_structure_and_not_weights() -> None:
    example = CASES["resnet"].call(1, 0)
    a, b = CASES["resnet"].build().double().eval(), CASES["resnet"].build().double().eval()
    assert capture(a, example).fingerprint == capture(b, example).fingerprint
    assert capture(a, example).weights_hash() != capture(b, example).weights_hash()
    assert capture(a, example).fingerprint != capture(CASES["flatten"].build().double(), CASES["flatten"].call(1, 0)).fingerprint
    narrow = models.Gated()
    narrow.down = nn.Linear(9, 4)
    x = (torch.randn(1, 6),)
    assert capture(narrow, x).fingerprint != capture(models.Gated(), x).fingerprint


@pytest.mark.parametrize("name", SOME)
def test_a_checkpoint_of_the_original_loads_into_the_cut(name: str) -> None:
    model, graph = understood(name)
    plan = random_plan(CASES[name], graph, 3)
    result = cut(model, graph, plan)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    loaded = copy.deepcopy(result.model)
    loaded.load_state_dict(state_by_name(result.rewritten, other.state_dict()), strict=result.form == "module")
    expected = cut(other, understand(other, CASES[name].call(1, 0)), plan)
    call = CASES[name].call(2, 1)
    close(answers(loaded, call), answers(expected.model, call), plan)


@pytest.mark.parametrize("form", ["module", "program"])
def test_training_mode_follows_the_original(form: str) -> None:
    """Batch statistics are used and running statistics are updated; the original's stay."""
    model, graph = understood("resnet")
    plan = Plan(graph.program.fingerprint)
    same = cut(model, graph, plan, form=form).model.train()
    reference = copy.deepcopy(model).train()
    call = CASES["resnet"].call(4, 0)
    before = model.bn.running_mean.clone()
    close([same(*call.args)], [reference(*call.args)], form)
    state = same.state_dict()
    for key, value in reference.state_dict().items():
        if "running" in key:
            assert torch.allclose(state[key], value, rtol=1e-12), key
    assert torch.equal(model.bn.running_mean, before)


def test_a_cut_has_its_own_tensors_and_ties() -> None:
    model, graph = understood("tied")
    for form in ("module", "program"):
        result = cut(model, graph, Plan(graph.program.fingerprint, {"l1.weight": (0, 1, 5)}), form=form)
        own = dict(result.model.named_parameters(remove_duplicate=False))
        assert own["embed.weight"] is own["head.weight"]
        theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert not theirs & {p.untyped_storage().data_ptr() for p in own.values()}
        assert set(result.model.state_dict()) == set(model.state_dict())


def test_a_view_holds_only_what_is_kept() -> None:
    model, graph = understood("resnet")
    plan = random_plan(CASES["resnet"], graph, 1)
    seen = view(graph, plan)
    held = sum(t.untyped_storage().nbytes() for t in {id(t): t for t in (*seen.parameters(), *seen.buffers())}.values())
    exact = sum(t.numel() * t.element_size() for t in (*seen.parameters(), *seen.buffers()))
    assert held == exact < sum(t.numel() * t.element_size() for t in model.parameters()) / 4


def test_frozen_parameters_stay_frozen() -> None:
    model = CASES["gated"].model()
    model.a.weight.requires_grad_(False)
    graph = understand(model, CASES["gated"].call(1, 0))
    for form in ("module", "program"):
        result = cut(model, graph, Plan(graph.program.fingerprint, {"b.weight": (1, 2)}), form=form)
        flags = {n: p.requires_grad for n, p in result.model.named_parameters()}
        assert not flags["a.weight"] and flags["b.weight"]


@pytest.mark.parametrize("form", ["module", "program"])
def test_cut_models_can_be_copied_and_saved(form: str) -> None:
    model, graph = understood("mobilenet")
    result = cut(model, graph, random_plan(CASES["mobilenet"], graph, 2), form=form)
    call = CASES["mobilenet"].call(2, 0)
    close(answers(copy.deepcopy(result.model), call), answers(result.model, call), form)
    if form == "module":
        close(answers(pickle.loads(pickle.dumps(result.model)), call), answers(result.model, call), form)


class _Heads(torch.nn.Module):
    """Attention with the default scale, whose head dims a cut class must make up for in its query rows."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8
        self.q, self.k, self.v = (torch.nn.Linear(16, 32) for _ in range(3))
        self.out = torch.nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (f(x).view(x.shape[0], -1, 4, self.dim).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).view(x.shape[0], -1, 4, 8).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], -1, 32))


def test_a_cut_that_shares_values_equals_the_rewritten_program_with_them() -> None:
    from shohin.program import ProgramModule
    from shohin.surgery import cut, cut_sharing_values, understand

    torch.manual_seed(0)
    model, x = _Heads().eval(), torch.randn(3, 6, 16)
    graph = understand(model, (x[:2],))
    group = next(g for g in graph.groups if g.name.startswith("q.weight") and g.size == 8)
    plan = Plan(graph.program.fingerprint, {group.name: (0, 1, 2, 4)})
    assert cut(model, graph, plan).rewritten.scaled  # the case: a class with other values than the program
    made = cut_sharing_values(model, graph, plan)
    values = {**made.rewritten.sliced(), **dict(made.model.named_parameters())}
    program = ProgramModule(graph.program, made.rewritten.graph, values)
    with torch.no_grad():
        assert torch.allclose(program(x), made.model(x), atol=1e-6)
