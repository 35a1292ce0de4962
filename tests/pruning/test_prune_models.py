"""Pruning of models as people write them: fixed batches, constant inputs, layers that no sample reaches, models that were pruned before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import l1_unstructured

import shohin
from shohin.data import Call, Data
from shohin.errors import DataError, ModelError, PlanError
from shohin.evidence.hessian import factored
from shohin.program import call_inputs, capture, joined_inputs
from shohin.pruning import schedules, sparse
from shohin.pruning.compensation import ridge_solve
from shohin.training import TrainConfig

torch.set_num_threads(1)


def images(count: int, seed: int = 0) -> list[Tensor]:
    return [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]


class Net(nn.Module):
    """Two convolutions, then what a batch is folded by."""

    def __init__(self, folded: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.head, self.folded = nn.Linear(64, 10), folded

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.folded(F.relu(self.b(F.relu(self.a(x)))), x))  # type: ignore[no-any-return]


FIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda y, x: y.reshape(len(x), -1),
    "mixed": lambda y, x: y.reshape(len(x), 16, -1).flatten(1),
}


@pytest.mark.parametrize("folded", FIXED.values(), ids=FIXED)
@pytest.mark.parametrize("how", [{}, {"granularity": "unstructured"}])
def test_a_fixed_batch_is_looked_at_as_it_is(folded: Callable[[Tensor, Tensor], Tensor], how: dict[str, Any]) -> None:
    """The samples of two batches in one would go through sizes that were written for one."""
    model, batches = Net(folded).eval(), images(3)
    with pytest.warns(UserWarning, match="the batch of input 'x' is fixed to 8 by the model's own code.*only the first batch"):
        found = shohin.prune(model, Data(batches), 0.6, align=2, **how)
    with torch.no_grad():
        assert found.model is not None and bool(found.model(batches[0]).isfinite().all())
    program = capture(model, batches[0])
    with pytest.warns(UserWarning, match="only the first batch"):
        (x,) = joined_inputs(program, [Call((b,), {}, None, None) for b in batches], 64)
    assert torch.equal(x, batches[0])
    with pytest.raises(DataError, match=r"fixed to 8.*a batch has 5 samples: write x.shape\[0\] in place of len\(x\).*batches of 8"):
        call_inputs(program, Call((batches[0][:5],), {}, None, None))
    with pytest.raises(DataError, match="batches of 8"):
        shohin.prune(model, Data([batches[0], batches[1][:5]]), 0.6, align=2)


class Pooled(nn.Module):
    """Attention of one learned query: what it is projected from is the same for every sample."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.t, self.q = nn.Linear(6, 32), nn.Parameter(torch.randn(1, 1, 32))
        self.wq, self.wk, self.wv, self.f = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        t, q = self.t(x), self.wq(self.q.expand(x.shape[0], -1, -1))
        a = (q @ self.wk(t).mT).softmax(-1)
        return self.f((a @ self.wv(t))[:, 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", [{}, {"criterion": "obs"}, {"granularity": "unstructured"}])
def test_inputs_that_never_change_are_no_error(seed: int, how: dict[str, Any]) -> None:
    model = Pooled(seed).eval()
    x = torch.randn(64, 7, 6, generator=torch.Generator().manual_seed(seed))
    found = shohin.prune(model, Data(list(x.split(16))), 0.6, align=4, **how)
    with torch.no_grad():
        assert found.model is not None
        moved = float((found.model(x) - model(x)).square().mean() / model(x).var())
    assert moved < 0.5


def test_rounding_is_not_regressed_on() -> None:
    noise = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-17
    right = torch.ones(6, 2, dtype=torch.float64) * 1e-17
    for matrix in (noise - noise.T - 1e-18 * torch.eye(6), noise + noise.T, torch.zeros(6, 6, dtype=torch.float64)):
        assert float(ridge_solve(matrix.double(), right, 1e-3, floor=1e-9).abs().max()) == 0.0
    negative = -torch.eye(6, dtype=torch.float64)
    negative[0, 0] = 30.0  # a positive mean, so that only the factorization sees it
    assert bool(ridge_solve(negative, right, 1e-3).isfinite().all())
    both = torch.stack([torch.eye(6, dtype=torch.float64) * 4, negative * 1e6])
    factor = factored(both, 1e-9)
    torch.testing.assert_close(factor[0], torch.eye(6, dtype=torch.float64) * 2, rtol=1e-6, atol=1e-6)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="NaN or Inf"):
            ridge_solve(torch.full((2, 2), bad, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64), 1e-3)


class Beside(nn.Module):
    """What a learned vector gives is added: no sample passes its layers. Another layer's answers count nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o, self.aux = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.e, self.m = nn.Parameter(torch.randn(1, 8)), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.m(self.e)
        return self.o(F.relu(h)) + 0.0 * self.aux(h).sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("granularity", ["unstructured", "2:4", "channel"])
def test_layers_that_no_answer_depends_on(granularity: str) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    model = Beside().eval()
    found = shohin.prune(model, Data(list(x.split(16))), 0.5, granularity=granularity, align=2)
    assert found.model is not None
    if granularity != "channel":
        weights = dict(found.model.named_parameters())
        assert found.plan.sparsity and all(sparse.Pattern.parse(p).holds(weights[n].detach()) for n, p in found.plan.sparsity.items())


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.5])
def test_wanda_keeps_the_share_and_its_plan(keep: float) -> None:
    """Rows of nine columns cannot keep a twentieth each: some keep nothing."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    found = shohin.prune(model, Data(images(2)), keep, granularity="unstructured", criterion="wanda")
    assert found.model is not None
    for name, pattern in found.plan.sparsity.items():
        weight = dict(found.model.named_parameters())[name].detach()
        assert sparse.Pattern.parse(pattern).holds(weight), name
        assert int(weight.count_nonzero()) == weight.numel() - round((1 - keep) * weight.numel())
    with sparse.masked(found.model, found.plan):
        pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(x)))  # type: ignore[no-any-return]


def test_depth_after_depth_is_one_plan_of_the_original(blocks: int = 2) -> None:
    """A list that is left with one block is that block."""
    torch.manual_seed(0)
    stages = [nn.Sequential(*(Block() for _ in range(blocks))) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    x = images(1)[0]
    now, plan = model, shohin.Plan(shohin.understand(model, x).program.fingerprint)
    for _ in range(2 * blocks):
        graph = shohin.understand(now, x)
        step = shohin.Plan(graph.program.fingerprint, {}, (graph.regions[-1].name,))
        now, plan = shohin.cut(now, step), plan.then(step)
        with torch.no_grad():
            torch.testing.assert_close(shohin.cut(model, plan)(x), now(x))
    assert len(plan.skips) == 2 * blocks


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", [{}, {"recover": "distill", "epochs": 1}, {"granularity": "2:4", "recover": "distill", "epochs": 1}])
def test_pruning_where_gradients_are_off(context: Any, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    data = Data(list(torch.randn(64, 8).split(16)))
    wanted = shohin.prune(model, data, 0.5, **how).model
    with context():
        found = shohin.prune(model, data, 0.5, **how).model
    assert wanted is not None and found is not None
    assert all(torch.equal(a, b) for a, b in zip(wanted.state_dict().values(), found.state_dict().values(), strict=True))


def test_numbers_of_numpy_are_numbers() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), Data(list(torch.randn(64, 8).split(16)))
    found = shohin.prune(model, data, np.float32(0.5), align=np.int64(4), seed=np.int64(1))  # type: ignore[arg-type]
    assert found.plan == shohin.prune(model, data, 0.5, align=4, seed=1).plan


def test_what_cannot_be_is_said_before_the_work() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(64, 8)
    data = Data(list(x.split(16)))
    with pytest.raises(PlanError, match=r"uniform=True.*Sequential has none"):
        shohin.prune(model, data, 0.5, uniform=True)
    for seed in ("a", None, 1.5, True, -1, 2**70):
        with pytest.raises(PlanError, match="seed must be a whole number"):
            shohin.prune(model, data, 0.5, seed=seed)  # type: ignore[arg-type]
    x[0, 0] = torch.nan
    with pytest.raises(DataError, match="calibration batches hold NaN"):
        shohin.prune(model, Data([x]), 0.5, granularity="unstructured", criterion="fisher")
    l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ModelError, match=r"cannot be copied.*prune.remove\(module, name\) first"):
        shohin.prune(model, Data([x[1:]]), 0.5, granularity="unstructured")


def never(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    raise AssertionError("a step was taken")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"keep": 70}, PlanError, r"keep must be a share in \(0, 1\]; got 70"),
        ({"keep": -1}, PlanError, "keep must be a share"),
        ({"of": "flops"}, PlanError, "of='flops' is not known"),
        ({"align": 0}, PlanError, "align must be a whole number"),
        ({"model": nn.Linear(8, 4)}, ModelError, "the graph was made from another model: it has a parameter '0.bias'"),
    ],
)
def test_schedules_check_before_they_train(options: dict[str, Any], error: type[Exception], said: str) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    data = Data(list(torch.randn(64, 8).split(16)))
    graph, settings = shohin.understand(model, data), {"keep": 0.5, **options}
    with pytest.raises(error, match=said):
        schedules.forget(settings.pop("model", model), graph, data, never, TrainConfig(epochs=1), **settings)
    if "of" in options or "align" in options:
        with pytest.raises(error, match=said):
            schedules.iterative(model, data, never, TrainConfig(epochs=1), shares=[0.5], **options)
