"""Optimal brain surgeon for units: equal to removing them and refitting by brute force, one at a time and one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import Data
from shohin.evidence.divergence import Divergence
from shohin.plan import Plan
from shohin.pruning.criteria import CRITERIA, Inputs
from shohin.pruning.criteria.elimination import Piece, eliminate, obs_greedy
from shohin.pruning.criteria.moments import rounds, second_moments
from shohin.pruning.criteria.obs import inverse_and_weights, layer_obs, obs, removal_costs
from shohin.pruning.criteria.readings import readings
from shohin.pruning.layerwise import refit
from shohin.surgery import rewrite, understand, view_of

D = torch.float64


def left_over(x: Tensor, y: Tensor, gone: list[int], bias: bool) -> float:
    """Mean squared error, summed over outputs, of the best linear map from the columns of x that stay to y."""
    stays = [i for i in range(x.shape[1]) if i not in gone]
    kept = torch.cat([x[:, stays], torch.ones(len(x), int(bias), dtype=D)], 1)
    found = torch.linalg.lstsq(kept, y, driver="gelsd").solution
    return float((y - kept @ found).square().sum(1).mean())


def inputs_of(model: nn.Module, x: Tensor, batches: int = 1) -> Inputs:
    data = Data(train=list(x.chunk(batches)))
    return Inputs(understand(model, (x[:2],)), data, list(data.calls("train")))


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 3), st.integers(1, 4))
def test_costs_of_removal_are_those_of_least_squares(seed: int, units: int, width: int, outputs: int) -> None:
    torch.manual_seed(seed)
    size = units * width + 2  # two features belong to nobody
    x = torch.randn(200, size, dtype=D) @ torch.randn(size, size, dtype=D)
    w = torch.randn(outputs, size, dtype=D)
    features = torch.randperm(size)[: units * width].reshape(units, width)
    found = removal_costs(w, x.T @ x / 200, features, 1e-12)
    for unit, gone in enumerate(features.tolist()):
        assert float(found[unit]) == pytest.approx(left_over(x, x @ w.T, gone, bias=False), rel=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_hidden_neurons_cost_what_refitting_their_reader_leaves(bias: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias)).double().eval()
    x = torch.randn(150, 5, dtype=D)
    found = layer_obs(inputs_of(model, x, 3), damping=1e-10)["0.weight"]
    hidden = model[:2](x).detach()
    y = hidden @ model[2].weight.detach().T
    for unit in range(8):
        assert float(found[unit]) == pytest.approx(left_over(hidden, y, [unit], bias), rel=1e-4, abs=1e-12)


def test_channels_cost_what_refitting_their_reader_leaves() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1)).double().eval()
    x = torch.randn(6, 2, 6, 6, dtype=D)
    found = layer_obs(inputs_of(model, x), damping=1e-10)["0.weight"]
    patches = F.unfold(model[:2](x).detach(), 3, padding=1).transpose(1, 2).reshape(-1, 45)
    y = patches @ model[2].weight.detach().reshape(4, 45).T
    for unit in range(5):
        assert float(found[unit]) == pytest.approx(left_over(patches, y, list(range(9 * unit, 9 * unit + 9)), True), rel=1e-4)


def test_groups_of_a_convolution_have_second_moments_of_their_own() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(2, 6, 1), nn.Tanh(), nn.Conv1d(6, 4, 1, groups=2), nn.Tanh(), nn.Conv1d(4, 2, 1)).double().eval()
    x = torch.randn(40, 2, 4, dtype=D)
    found = layer_obs(inputs_of(model, x), damping=1e-10)
    rows = model[:2](x).detach().transpose(1, 2).reshape(-1, 6)
    w = model[2].weight.detach().squeeze(2)
    groups = [(rows[:, :3], rows[:, :3] @ w[:2].T), (rows[:, 3:], rows[:, 3:] @ w[2:].T)]
    for unit in range(3):  # the same place of both groups
        expected = sum(left_over(a, b, [unit], True) for a, b in groups)
        assert float(found["0.weight#2"][unit]) == pytest.approx(expected, rel=1e-4)


def test_with_answers_that_are_means_of_a_gaussian_the_loss_is_half_the_squared_error() -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.ReLU(), nn.Conv1d(6, 40, 1)).double().eval()
    inputs = inputs_of(model, torch.randn(200, 3, 5, dtype=D), 4)
    squared, loss = layer_obs(inputs)["0.weight"], obs(inputs)["0.weight"]
    torch.testing.assert_close(loss, squared * 5 / 2, rtol=0.15, atol=0)  # five positions


class Attention(nn.Module):
    """Two heads whose queries and keys share dims that no layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def parts(self, x: Tensor) -> list[Tensor]:
        return [layer(x).view(*x.shape[:2], 2, 3).transpose(1, 2) for layer in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.parts(x))
        return self.out(y.transpose(1, 2).flatten(2))


def test_dims_of_queries_and_keys_cost_what_refitting_the_scores_leaves() -> None:
    torch.manual_seed(4)
    model = Attention().double().eval()
    x = torch.randn(8, 5, 6, dtype=D)
    found = layer_obs(inputs_of(model, x, 2), damping=1e-10)["q.weight#2"]
    q, k, _ = (t.detach() for t in model.parts(x))
    terms = (q[:, :, :, None] * k[:, :, None]).transpose(0, 1).reshape(2, -1, 3)
    for unit in range(3):
        expected = sum(left_over(head, head.sum(1, keepdim=True), [unit], False) for head in terms)
        assert float(found[unit]) == pytest.approx(expected, rel=1e-4)


def with_a_copy() -> tuple[nn.Sequential, Tensor]:
    """Channels 0 and 1 are equal and large."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).double().eval()
    with torch.no_grad():
        model[0].weight[0] *= 5
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[0].bias += 0.5
    return model, torch.randn(80, 3, 8, dtype=D)


def test_a_copied_channel_costs_nearly_nothing_and_only_the_order_knows_that_one_must_stay() -> None:
    model, x = with_a_copy()
    inputs = inputs_of(model, x, 4)
    magnitude = CRITERIA["magnitude"](inputs)["0.weight"]
    assert set(magnitude.topk(2).indices.tolist()) == {0, 1}
    single = obs(inputs, damping=1e-4)["0.weight"]
    assert float(single[:2].max()) < 0.1 * float(single[2:].min())
    greedy = obs_greedy(inputs, damping=1e-4)["0.weight"]
    first, second = sorted(greedy[:2].tolist())
    assert first < float(greedy[2:].min()) and second > 50 * first and second > float(greedy[2:].median())


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(3, 6), st.integers(1, 3))
def test_elimination_sums_to_the_cost_of_going_together(seed: int, units: int, width: int) -> None:
    torch.manual_seed(seed)
    size = units * width
    x = torch.randn(300, size, dtype=D) @ torch.randn(size, size, dtype=D)
    w, fixed = torch.randn(3, size, dtype=D), torch.rand(units, dtype=D)
    second = x.T @ x / 300
    inverse, weights = inverse_and_weights(w, second, 1e-12)
    scores = eliminate([Piece(torch.arange(units), inverse, weights.T @ weights, width)], fixed)
    order, gone, before, level = scores.argsort(stable=True).tolist(), [], 0.0, 0.0
    assume(len(set(scores.tolist())) == units)  # costs that fell on the way share a score: the order cannot be read from it
    for unit in order:
        gone += range(unit * width, unit * width + width)
        together = (
            float(removal_costs(w, second, torch.tensor([gone]), 1e-12)[0]) if len(gone) < size else float((x @ w.T).square().sum(1).mean())
        )
        level = max(level, together - before + float(fixed[unit]))
        assert float(scores[unit]) == pytest.approx(level, rel=1e-4, abs=1e-9)
        before = together


def test_large_groups_are_eliminated_in_rounds_nearly_as_one_by_one() -> None:
    torch.manual_seed(6)
    x = torch.randn(500, 10, dtype=D) @ torch.randn(10, 40, dtype=D) + 0.3 * torch.randn(500, 40, dtype=D)
    inverse, weights = inverse_and_weights(torch.randn(8, 40, dtype=D), x.T @ x / 500, 1e-2)
    piece = Piece(torch.arange(40), inverse, weights.T @ weights, 1)
    exact, fast = eliminate([piece], torch.zeros(40, dtype=D)), eliminate([piece], torch.zeros(40, dtype=D), rounds=8)
    assert spearmanr(exact.numpy(), fast.numpy()).statistic > 0.9
    assert float(fast.sort().values[:20].sum()) < 1.3 * float(exact.sort().values[:20].sum())


def test_passes_stay_below_the_memory_that_is_allowed() -> None:
    model, x = with_a_copy()
    inputs = inputs_of(model, x, 2)
    listed = readings(inputs.graph)
    need = [8 * one.groups * one.features**2 for one in listed]
    assert len(rounds(listed, sum(need))) == 1
    small = rounds(listed, max(need))
    assert len(small) > 1 and all(sum(8 * r.groups * r.features**2 for r in part) <= max(need) for part in small)
    for (_, a), (_, b) in zip(second_moments(inputs, listed), second_moments(inputs, listed, 1), strict=True):
        assert torch.equal(a, b)


def test_scores_rank_units_as_removing_them_and_refitting_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 3, 16)
    y = (x.mean(-1) @ torch.randn(3, 5)).argmax(1)
    model = nn.Sequential(
        nn.Conv1d(3, 12, 3), nn.ReLU(), nn.Conv1d(12, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(10, 5)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    inputs = inputs_of(model.eval(), x, 8)
    measure = Divergence(model, inputs.calls)
    scores = obs(inputs)
    for group in inputs.graph.groups:
        real = []
        for unit in range(group.size):
            plan = Plan(inputs.graph.program.fingerprint, {group.name: tuple(i for i in range(group.size) if i != unit)})
            rewritten = rewrite(inputs.graph, plan)
            module = view_of(inputs.graph, rewritten)
            module.load_state_dict(refit(inputs.graph, plan, rewritten, dict(module.state_dict()), inputs.calls), strict=False)
            real.append(measure(module))
        assert spearmanr(scores[group.name].numpy(), real).statistic > 0.7, group.name
