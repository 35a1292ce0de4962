"""The view and the cut against an oracle that was written by hand and shares no code with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_models as models
from shohin.plan import Plan
from shohin.surgery import cut, rewrite, understand, view, view_of
from surgery_cases import CASES
from surgery_checks import answers, close, random_plan, understood

PLANS = 5


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_expected(name: str) -> None:
    _, graph = understood(name)
    assert graph.sizes == dict(CASES[name].sizes), graph.frozen


@pytest.mark.parametrize("name", CASES)
def test_view_and_cut_equal_the_oracle(name: str) -> None:
    case = CASES[name]
    model, graph = understood(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for seed in range(PLANS):
        plan = random_plan(case, graph, seed)
        kept = {**{n: tuple(range(s)) for n, s in case.sizes.items()}, **plan.widths}
        oracle = case.oracle(model, kept)
        result = cut(model, graph, plan)
        assert result.proof.holds and result.proof.error < 1e-10
        assert case.form == "any" or result.form == case.form, result.reason
        seen = view(graph, plan)
        for batch in (1, 3):
            call = case.call(batch, 10 + seed)
            wanted = answers(oracle, call)
            close(answers(seen, call), wanted, ("view", plan.widths))
            close(answers(result.model, call), wanted, ("cut", plan.widths))
        if result.form == "module":
            assert type(result.model) is type(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the user's model was changed"
    assert before.keys() == model.state_dict().keys()


def test_attention_stays_in_the_users_class_when_its_head_dims_are_cut() -> None:
    """The query rows make up for the default scale, which follows the head dim; the oracle test checks the numbers."""
    model, graph = understood("vit sdpa")
    name = "layers.0.attn.q.weight"
    plan = Plan(graph.program.fingerprint, {f"{name}#2": (0, 2), "layers.0.attn.v.weight": (1, 3)})
    result = cut(model, graph, plan)
    assert result.form == "module", result.reason
    assert set(result.rewritten.scaled) == {name, "layers.0.attn.q.bias"}
    kept = [i for i in range(12) if i % 4 in (0, 2)]
    whole, part = model.get_parameter(name), result.model.get_parameter(name)
    assert torch.allclose(part, whole[kept] * 0.5**0.5, rtol=1e-14)


@pytest.mark.parametrize("fused", [True, False])
def test_queries_that_are_read_twice_are_not_scaled(fused: bool) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj, self.out = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
            return self.proj(o) if fused else self.proj(o) + self.out(q.transpose(1, 2).reshape(b, n, -1))

    torch.manual_seed(0)
    model = models.lively(Odd())
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    graph = understand(model, (x,))
    rewritten = rewrite(graph, Plan(graph.program.fingerprint, {"qkv.weight#2": (0, 3)}))
    assert bool(rewritten.scaled) is fused and bool(rewritten.mended) is not fused
    rows = [p * 8 + h * 4 + d for p in range(3) for h in range(2) for d in (0, 3)]
    q, k, v = F.linear(x, model.qkv.weight[rows], model.qkv.bias[rows]).view(3, 5, 3, 2, 2).permute(2, 0, 3, 1, 4)
    o = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).reshape(3, 5, -1)
    columns = [h * 4 + d for h in range(2) for d in (0, 3)]
    wanted = F.linear(o, model.proj.weight[:, columns], model.proj.bias)
    if not fused:
        wanted = wanted + F.linear(q.transpose(1, 2).reshape(3, 5, -1), model.out.weight[:, columns], model.out.bias)
    assert torch.allclose(view_of(graph, rewritten)(x), wanted, rtol=1e-10)
