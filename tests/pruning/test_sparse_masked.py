"""Zeros stay exactly zero under any optimizer, loop, copy and load."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shohin.data import Data
from shohin.errors import PlanError
from shohin.plan import Plan
from shohin.pruning.sparse import Pattern, masked, masks_of
from shohin.training import TrainConfig, train

PLAN = {"0.weight": "2:4", "2.weight": "unstructured 0.6"}


def net(seed: int = 0) -> nn.Sequential:
    """A small network that holds the plan, and has learned nothing."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    with torch.no_grad():
        for name, text in PLAN.items():
            weight = model.get_parameter(name)
            weight.masked_fill_(~Pattern.parse(text).select(weight.abs()), 0.0)
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 8, generator=g)
    return x, (x[:, :4] + x[:, 4:]).argmax(1)


def zeros_hold(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    """Exact zeros where they belong, and the pattern's count of weights elsewhere."""
    return all(
        not bool(model.get_parameter(n)[~m].any()) and int(m.sum()) == int((model.get_parameter(n) != 0).sum()) for n, m in masks.items()
    )


OPTIMIZERS: dict[str, Callable[[object], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=5, line_search_fn="strong_wolfe"),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_under_every_optimizer(kind: str, used_before: bool) -> None:
    model = net()
    masks = masks_of(model, PLAN)
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[kind](model.parameters())
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    if used_before:  # momentum of the zeros from before
        optimizer.step(closure)
        assert not zeros_hold(model, masks)
    start = float(F.cross_entropy(model(x), y).detach())
    with masked(model, masks):
        assert zeros_hold(model, masks)
        for _ in range(8):
            optimizer.step(closure)
            assert zeros_hold(model, masks)
    assert float(F.cross_entropy(model(x), y).detach()) < start
    assert not torch.equal(model[0].weight, before["0.weight"])
    if not used_before and kind != "lbfgs":
        states = [
            t[~masks["0.weight"]]
            for t in optimizer.state[model[0].weight].values()
            if torch.is_tensor(t) and t.shape == masks["0.weight"].shape
        ]
        assert states and not any(bool(t.any()) for t in states)
    optimizer.step(closure)
    optimizer.step(closure)
    assert not zeros_hold(model, masks)  # nothing is left behind


def test_optimizers_of_others_and_writes_by_hand() -> None:
    model, (x, y) = net(), batch()
    masks = masks_of(model, PLAN)
    with masked(model, PLAN):
        for _ in range(3):
            loss = F.cross_entropy(model(x), y)
            first = model(x).sum()
            model.zero_grad()
            (loss + 0 * first).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad + 0.01  # decays zeros away from zero
            assert not zeros_hold(model, masks)
            model(x)
            assert zeros_hold(model, masks)
        with torch.no_grad():
            model[0].weight += 1
    assert zeros_hold(model, masks)


def test_the_training_loop_with_average_and_decay() -> None:
    model = net()
    plan = Plan("f", sparsity=PLAN)
    masks = masks_of(model, plan)
    data = Data(train=[batch(i) for i in range(6)])

    def objective(module: nn.Module, call: object, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return F.cross_entropy(module(*call.args), call.target), {}  # type: ignore[attr-defined]

    def loss(module: nn.Module) -> float:
        x, y = batch(50)
        assert zeros_hold(module, masks)
        return float(F.cross_entropy(module(x), y))

    for kind in ("adamw", "sgd"):
        with masked(model, plan):
            result = train(
                model,
                data,
                objective,
                TrainConfig(epochs=3, lr=0.02, ema=0.9, weight_decay=0.1, optimizer=kind),
                evaluate=loss,
                lower_is_better=True,
            )
        assert zeros_hold(model, masks)
        assert all(not bool(result.state[n][~m].any()) for n, m in masks.items())
        assert result.best_epoch >= 0


def test_load_state_dict_inside() -> None:
    full = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).state_dict()
    for assign in (False, True):
        model, (x, y) = net(), batch()
        masks = masks_of(model, PLAN)
        with masked(model, PLAN):
            model.load_state_dict(copy.deepcopy(full), assign=assign)
            assert zeros_hold(model, masks)
            optimizer = torch.optim.AdamW(model.parameters(), 0.1)
            F.cross_entropy(model(x), y).backward()
            assert not bool(model[0].weight.grad[~masks["0.weight"]].any())
            optimizer.step()
            assert zeros_hold(model, masks)


def test_moving_to_another_type_inside() -> None:
    model, (x, y) = net(), batch()
    masks = masks_of(model, PLAN)
    with masked(model, PLAN):
        model.to(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
        assert model[0].weight.dtype == torch.float64 and zeros_hold(model, masks)


def test_a_copy_made_inside_is_guarded_until_the_end() -> None:
    model, (x, y) = net(), batch()
    masks = masks_of(model, PLAN)

    def steps(module: nn.Module) -> None:
        optimizer = torch.optim.AdamW(module.parameters(), 0.05)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()

    with masked(model, PLAN):
        twin = copy.deepcopy(model)
        steps(twin)
        assert zeros_hold(twin, masks)
        assert not torch.equal(twin[0].weight, model[0].weight)
        steps(model)
        assert zeros_hold(model, masks)
    steps(twin)
    assert not zeros_hold(twin, masks)


def test_a_model_saved_whole_inside_is_a_plain_one() -> None:
    model, (x, _) = net(), batch()
    with masked(model, PLAN):
        stream = io.BytesIO()
        torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert torch.equal(again(x), model(x))


def test_tied_and_frozen_weights() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    masks = masks_of(model, PLAN)
    with masked(model, PLAN):
        model[0].weight.requires_grad_(True)
        x, y = batch()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert zeros_hold(model, masks)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with masked(tied, {"1.weight": torch.eye(4, dtype=torch.bool)}):
        assert int((tied[0].weight != 0).sum()) == 4


def test_an_error_inside_leaves_nothing_behind() -> None:
    model, (x, y) = net(), batch()
    masks = masks_of(model, PLAN)
    with pytest.raises(ZeroDivisionError), masked(model, PLAN):
        raise ZeroDivisionError
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not zeros_hold(model, masks)
    assert not model._forward_pre_hooks


def test_bad_plans() -> None:
    model = net()
    with pytest.raises(PlanError, match="did you mean"), masked(model, {"0.weigth": "2:4"}):
        pass
    with pytest.raises(PlanError, match="boolean"), masked(model, {"0.weight": torch.ones(12, 8)}):
        pass
    with pytest.raises(PlanError, match="do not have the pattern"), masked(nn.Sequential(nn.Linear(8, 8)), {"0.weight": "2:4"}):
        pass
