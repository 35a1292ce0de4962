"""Saliency ranks units as removing them does, and layer-wise refitting wins back what slicing lost."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import Call, Data
from shohin.errors import DataError
from shohin.evidence.reach import reached
from shohin.plan import Plan
from shohin.program import joined_inputs
from shohin.pruning.layerwise import refit
from shohin.pruning.saliency import group_saliency
from shohin.surgery import rewrite, understand, view, view_of


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 16, 3, padding=1)
        self.a, self.n, self.b = nn.Conv1d(16, 24, 3, padding=1), nn.BatchNorm1d(24), nn.Conv1d(24, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((x + self.b(F.relu(self.n(self.a(x))))).mean(-1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(5))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = self.inner(x)
        q, k, v = (layer(x).view(b, n, 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.head((x + self.out(y.transpose(1, 2).reshape(b, n, 16))).mean(1))


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def residual_task() -> tuple[nn.Module, Data, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(256, 3, 20)
    y = (x.mean(-1) @ torch.randn(3, 5)).argmax(1)
    return trained(Residual(), x, y), Data(train=[(x[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]), x


def divergence(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        p, q = model(x).log_softmax(-1), other(x).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_saliency_ranks_units_as_removing_them_does() -> None:
    model, data, x = residual_task()
    graph = understand(model, (x[:2],))
    saliency = group_saliency(graph, data, list(data.calls("train")))
    for group in graph.groups:
        real = []
        for unit in range(group.size):
            plan = Plan(graph.program.fingerprint, {group.name: tuple(i for i in range(group.size) if i != unit)})
            real.append(divergence(model, view(graph, plan), x))
        rank = spearmanr(saliency[group.name].numpy(), real).statistic
        assert rank > 0.7, (group.name, rank)
        assert 0.2 < float(saliency[group.name].sum()) / sum(real) < 5, group.name  # in the loss's own unit


def test_dims_that_only_queries_and_keys_share_have_a_saliency() -> None:
    torch.manual_seed(1)
    x = torch.randn(128, 6, 16)
    y = x[:, 0, :4].argmax(1)
    model = trained(Attention(), x, y)
    graph = understand(model, (x[:2],))
    saliency = group_saliency(graph, Data(train=[(x, y)]), list(Data(train=[(x, y)]).calls("train")))
    assert {g.name.split(".")[0] for g in graph.groups} >= {"q", "v", "inner"}
    assert all(float(s.sum()) > 0 and bool((s >= 0).all()) for s in saliency.values())


def test_a_unit_that_nothing_reads_has_no_saliency() -> None:
    model, data, x = residual_task()
    with torch.no_grad():
        model.b.weight[:, [3, 7]] = 0
    graph = understand(model, (x[:2],))
    saliency = group_saliency(graph, data, list(data.calls("train")))["a.weight"]
    assert float(saliency[[3, 7]].abs().max()) == 0.0
    assert int((saliency == 0).sum()) == 2


def test_saliency_needs_batches() -> None:
    model, data, x = residual_task()
    with pytest.raises(DataError, match="needs batches"):
        group_saliency(understand(model, (x[:2],)), data, [])


@pytest.mark.parametrize("statistics", [False, True])
def test_refitting_wins_back_what_slicing_lost(statistics: bool) -> None:
    model, data, x = residual_task()
    graph = understand(model, (x[:2],))
    calls = list(data.calls("train"))
    saliency = group_saliency(graph, data, calls)
    widths = {g.name: tuple(sorted(saliency[g.name].topk(g.size * 5 // 8).indices.tolist())) for g in graph.groups}
    plan = Plan(graph.program.fingerprint, widths)
    rewritten = rewrite(graph, plan)
    module = view_of(graph, rewritten)
    sliced = divergence(model, module, x)
    values = refit(graph, plan, rewritten, dict(module.state_dict()), calls, statistics=statistics)
    module.load_state_dict(values, strict=False)
    fresh = torch.randn(512, 3, 20)
    assert divergence(model, module, x) < 0.35 * sliced
    assert divergence(model, module, fresh) < 0.5 * sliced


def test_refitting_without_layers_takes_new_statistics_alone() -> None:
    model, data, x = residual_task()
    graph = understand(model, (x[:2],))
    plan = Plan(graph.program.fingerprint, {"a.weight": tuple(range(0, 24, 2))})
    rewritten = rewrite(graph, plan)
    before = dict(view_of(graph, rewritten).state_dict())
    values = refit(graph, plan, rewritten, before, list(data.calls("train")), weights=False, statistics=True)
    changed = {name for name, value in values.items() if not torch.equal(value, before[name])}
    assert changed == {"n.running_mean", "n.running_var"}
    assert reached(graph.program, joined_inputs(graph.program, list(data.calls("train")), 8), {}) == {}


def test_refitting_is_exact_where_removed_channels_are_copies_of_kept_ones() -> None:
    model, data, x = residual_task()
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias, model.n.weight, model.n.bias, model.n.running_mean, model.n.running_var):
            tensor[12:] = tensor[:12]
    graph = understand(model, (x[:2],))
    plan = Plan(graph.program.fingerprint, {"a.weight": tuple(range(12))})
    rewritten = rewrite(graph, plan)
    module = view_of(graph, rewritten)
    values = refit(graph, plan, rewritten, dict(module.state_dict()), list(data.calls("train")), statistics=False, ridges=(1e-8,))
    module.load_state_dict(values, strict=False)
    with torch.no_grad():
        assert float((module(x) - model(x)).abs().max()) < 3e-4 * float(model(x).abs().max())


class Masked(nn.Module):
    """A feed-forward layer over words whose padding is hidden from the output."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.b(torch.relu(self.a(x)))
        return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def test_padding_does_not_outweigh_what_is_seen() -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    ids = torch.randint(1, 50, (64, 40))
    mask = torch.zeros(64, 40)
    mask[:, :4] = 1.0
    mask[0] = 1.0
    ids[mask == 0] = 0
    graph = understand(model, (ids[:4], mask[:4]))
    calls = [Call((ids, mask), {}, None, None)]
    layers = {n.name: -1 for n in graph.program.graph.nodes if n.op == "call_function" and "linear" in n.name}
    rows = reached(graph.program, joined_inputs(graph.program, calls, 64), layers)
    assert rows and all(torch.equal(r, mask.bool().flatten()) for r in rows.values())
    plan = Plan(
        graph.program.fingerprint, {graph.groups[0].name: tuple(range(8))} if graph.groups[0].size == 32 else {"a.weight": tuple(range(8))}
    )
    rewritten = rewrite(graph, plan)
    module = view_of(graph, rewritten)
    before = float((module(ids, mask) - model(ids, mask)).square().mean())
    module.load_state_dict(refit(graph, plan, rewritten, dict(module.state_dict()), calls, rows=256), strict=False)
    assert float((module(ids, mask) - model(ids, mask)).square().mean()) < 0.3 * before


def test_a_depthwise_layer_is_refitted_too() -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU()
    model = nn.Sequential(*first, nn.Conv2d(16, 16, 3, padding="same", groups=16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(64, 3, 8, 8)
    graph = understand(model, (x[:2],))
    plan = Plan(graph.program.fingerprint, {g.name: tuple(range(g.size - 2)) for g in graph.groups})
    rewritten = rewrite(graph, plan)
    start = dict(view_of(graph, rewritten).state_dict())
    values = refit(graph, plan, rewritten, start, [Call((x,), {}, None, None)])
    assert not torch.equal(values["4.weight"], start["4.weight"])
    module = view_of(graph, rewritten)
    sliced = float((module(x) - model(x)).square().mean())
    module.load_state_dict(values, strict=False)
    assert float((module(x) - model(x)).square().mean()) < 0.5 * sliced
