"""Units that training takes to exact zero are cut without a change of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import pytest
import torch
from schedule_cases import ResidualNet, accuracy, images, mlp, short, task, vectors, watched
from torch import Tensor, nn

import small_models
from shohin.data import Data
from shohin.errors import DataError, PlanError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.pruning.schedules import forget, group_lasso, producing, zero_plan
from shohin.pruning.schedules.forget import fading
from shohin.pruning.schedules.zeros import shrinkage
from shohin.surgery import cut, understand
from shohin.training import TrainConfig

Case = tuple[Callable[[], nn.Module], Callable[[], Data]]
CASES: dict[str, Case] = {"cnn": (ResidualNet, images), "mlp": (mlp, vectors)}


def _difference(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    model.eval(), small.eval()
    with torch.no_grad():
        return float((model(x) - small(x)).abs().max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_forgotten_units_are_zero_and_cost_nothing_to_cut(name: str, ema: float | None) -> None:
    make, source = CASES[name]
    model, data = make(), source()
    graph = understand(model, data.example())
    done = forget(model, graph, data, task, short(ema=ema, epochs=6), keep=0.5, of="params", periods=3)
    removed = {n: graph.sizes[n] - len(k) for n, k in done.plan.widths.items()}
    assert sum(removed.values()) >= 3
    assert not done.excluded
    made = cut(model, graph, done.plan)
    assert sum(p.numel() for p in made.model.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
    assert all(torch.equal(done.training.state[n], p) for n, p in model.named_parameters())
    x = data.example().args[0]
    assert _difference(model, made.model, x) < 1e-6
    assert float(made.model(x).detach().abs().max()) > 1e-2
    whole = make()  # without the zeros the cut does change the outputs
    assert (
        _difference(whole, cut(whole, understand(whole, data.example()), Plan(graph.program.fingerprint, done.plan.widths)).model, x) > 1e-3
    )


@pytest.mark.parametrize("style", ["fused", "sdpa"])
def test_heads_and_neurons_are_forgotten_too(style: str) -> None:
    torch.manual_seed(0)
    model, xs = small_models.ViT(style=style).double(), torch.randn(4, 8, 3, 8, 8, dtype=torch.float64)
    data = Data([(x, (x[:, 0].mean((1, 2)) > 0).long()) for x in xs])
    graph = understand(model, data.example())
    done = forget(model, graph, data, task, short(epochs=6), keep=0.6)
    assert list(done.excluded) == ["patch.weight"]
    assert "normalization" in done.excluded["patch.weight"]
    assert any("attn" in name for name in done.plan.widths)
    assert graph.macs(done.plan) <= 0.6 * graph.macs()
    assert _difference(model, cut(model, graph, done.plan).model, xs[0]) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_units_fade_in_turn_and_stay_zero(name: str) -> None:
    make, source = CASES[name]
    model, data = make(), source()
    graph = understand(model, data.example())
    slices, _ = producing(graph)
    counts = []

    def look(step: int, live: nn.Module) -> None:
        own = dict(live.named_parameters())
        counts.append(sum(int((s.sums({n: own[n].detach().square() for n, _, _ in s.places}) == 0).sum()) for s in slices.values()))

    done = forget(model, graph, data, watched(look), short(epochs=5), keep=0.6, warmup=4, periods=3, length=5)
    gone = sum(graph.sizes[n] - len(k) for n, k in done.plan.widths.items())
    assert counts[:9] == [0] * 9  # the state before step t has t steps behind it
    assert counts[19:] == [gone] * len(counts[19:])
    assert counts == sorted(counts)
    assert 0 < counts[9] < counts[14] < counts[19]


def test_the_least_salient_units_go_first() -> None:
    model, data, order = mlp(), vectors(), []
    scores: dict[str, Tensor] = {}

    def choose(graph: Graph, found: Mapping[str, Tensor]) -> Plan:
        scores.update(found)
        return Plan(graph.program.fingerprint, {n: tuple(sorted(s.argsort()[8:].tolist())) for n, s in found.items()})

    def look(step: int, m: nn.Module) -> None:
        for unit in range(16):
            if not m[0].weight[unit].any() and unit not in order:  # type: ignore[index]
                order.append(unit)

    graph = understand(model, data.example())
    forget(model, graph, data, watched(look), short(epochs=5), keep=choose, warmup=4, periods=8, length=3)
    assert order == scores["0.weight"].argsort()[:8].tolist()
    assert float(scores["0.weight"].min()) > 0


def test_fading_ends_in_exact_zero() -> None:
    turn = torch.tensor([-1, 0, 1, 2])
    value = torch.ones(4, dtype=torch.float64)
    seen = []
    for step in range(1, 16):
        value = value * fading(turn, step, 5)
        seen.append(value.tolist())
    assert seen[1] == pytest.approx([1, 0.6, 1, 1])
    assert [row[1] == 0 for row in seen].index(True) == 4
    assert [row[2] == 0 for row in seen].index(True) == 9
    assert seen[-1] == [1, 0, 0, 0]


class Branches(nn.Module):
    """The answer is in the first four inputs; units of the second branch see noise alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.signal, self.noise, self.read = nn.Linear(4, 6), nn.Linear(8, 12), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.relu(torch.cat([self.signal(x[:, :4]), self.noise(x[:, 4:])], 1)))


@pytest.mark.parametrize(("optimizer", "lr", "strength"), [("sgd", 0.1, 0.1), ("adamw", 0.02, 0.6)])
def test_group_lasso_zeros_the_units_that_are_noise(optimizer: Literal["sgd", "adamw"], lr: float, strength: float) -> None:
    data = vectors(batches=12, size=32, useful=4)
    model = Branches()
    graph = understand(model, data.example())
    config = TrainConfig(epochs=20, lr=lr, weight_decay=0.0, optimizer=optimizer)
    done = group_lasso(model, graph, data, task, config, strength=strength)
    assert not model.noise.weight.any() and not model.noise.bias.any()
    assert bool(model.signal.weight.any(1).sum() >= 2)
    assert done.plan.widths["noise.weight"] == (0,)  # a group keeps one unit
    assert accuracy(model, data) > 0.9
    made = cut(model, graph, done.plan)
    assert _difference(model, made.model, data.example().args[0]) < 1e-6
    free = Branches()
    group_lasso(free, understand(free, data.example()), data, task, config, strength=0.0)
    assert bool(free.noise.weight.all(1).all())  # it is the penalty that does it


def test_an_average_of_weights_gets_the_zeros_too() -> None:
    data, model = vectors(useful=4), Branches()
    graph = understand(model, data.example())
    done = group_lasso(model, graph, data, task, short(ema=0.99), strength={"noise.weight": 3.0})
    assert not model.noise.weight.any()
    assert not done.training.state["noise.weight"].any()
    assert done.plan.widths == {"noise.weight": (0,)}


def test_strengths_by_group_leave_the_others_alone() -> None:
    data, model = vectors(useful=4), Branches()
    graph = understand(model, data.example())
    group_lasso(model, graph, data, task, short(), strength={"noise.weight": 3.0})
    assert not model.noise.weight.any()
    assert bool(model.signal.weight.any(1).all())
    with pytest.raises(PlanError, match="'signal'"):
        group_lasso(model, graph, data, task, short(), strength={"signal": 0.5})


def test_the_proximal_step_is_the_minimum_of_its_problem() -> None:
    """``argmin 1/2 |v - w|^2 + t |v|`` over the ray of w, which holds the minimum."""
    w = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    factors = shrinkage(w, 0.5)
    ray = torch.linspace(0, 3, 30001, dtype=torch.float64)
    for norm, factor in zip(w.tolist(), factors.tolist(), strict=True):
        best = float(ray[(0.5 * (ray - norm) ** 2 + 0.5 * ray).argmin()])
        assert factor * norm == pytest.approx(best, abs=1e-4)
    assert factors[0] == 0


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 2)), (2, 5), "does not see zero"),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (2, 5), "normalization"),
        (
            lambda: nn.Sequential(nn.Conv1d(5, 6, 1), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Conv1d(6, 2, 1)).eval(),
            (2, 5, 3),
            "does not see zero",  # once its running mean is not zero
        ),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.Softmax(-1), nn.Linear(6, 2)), (2, 5), "does not see zero|normalization"),
    ],
)
def test_units_that_cannot_be_zero_are_named(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    model = make()
    graph = understand(model, (torch.randn(shape),))
    found, excluded = producing(graph)
    assert not found
    assert list(excluded) == ["0.weight"]
    assert zero_plan(model, graph).is_identity
    with pytest.raises(DataError, match=reason):
        group_lasso(model, graph, vectors(), task, short(), strength=1.0)


MODELS = {
    "resnet": (small_models.ResNet, (2, 3, 32, 32)),
    "mobilenet": (small_models.MobileNet, (2, 3, 32, 32)),
    "densenet": (small_models.DenseNet, (2, 3, 8, 8)),
    "unet": (small_models.UNet, (2, 3, 16, 16)),
    "grouped": (small_models.Grouped, (2, 3, 8, 8)),
    "vit": (small_models.ViT, (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_zeroed_units_are_found_and_cut_exactly(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = small_models.lively(make()), torch.randn(shape, dtype=torch.float64)
    graph = understand(model, (x,))
    found, _ = producing(graph)
    assert found
    for slices in found.values():
        dead = torch.zeros(slices.size, dtype=torch.bool)
        dead[::3] = True
        with torch.no_grad():
            slices.scale(dict(model.named_parameters()), (~dead).double())
    plan = zero_plan(model, graph)
    for name_, slices in found.items():
        assert not set(range(0, slices.size, 3)) & set(plan.widths[name_]) or len(plan.widths[name_]) == graph.group(name_).multiple
    assert _difference(model, cut(model, graph, plan).model, x) < 1e-9


def test_a_plan_of_excluded_units_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    data = vectors()
    graph = understand(model, data.example())
    with pytest.raises(PlanError, match=r"'0\.weight', whose units cannot be made zero: .*does not see zero"):
        forget(model, graph, data, task, short(), keep=lambda g, s: Plan(g.program.fingerprint, {"0.weight": (0, 1)}))
    done = forget(model, graph, data, task, short(), keep=0.8)
    assert list(done.excluded) == ["0.weight"]
    assert list(done.plan.widths) == ["2.weight"]


def test_what_is_not_trained_is_not_made_zero() -> None:
    data, model = vectors(), mlp()
    model[0].bias.requires_grad_(False)
    done = forget(model, understand(model, data.example()), data, task, short(), keep=0.8)
    assert done.excluded == {"0.weight": "0.bias requires no gradient"}
    assert list(done.plan.widths) == ["2.weight"]


def test_times_that_do_not_fit_are_refused() -> None:
    data, model = vectors(), mlp()
    with pytest.raises(DataError, match=r"20 \+ 4 \* 5 in a training of 24 steps"):
        forget(model, understand(model, data.example()), data, task, short(), keep=0.5, warmup=20, length=5)
