"""RigL: constant density, small weights go, steep ones come from zero."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedule_cases import ResidualNet, images, mlp, short, task, vectors, watched
from torch import nn

from shohin.errors import DataError, PlanError
from shohin.pruning.schedules import random_masks, rigl, weights_of
from shohin.pruning.schedules.rigl import dropped_share, rewired
from shohin.training import TrainConfig


@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(0, 0.9))
def test_a_change_keeps_the_count_and_the_largest_and_grows_the_steepest(seed: int, density: float, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 11, generator=g) < density
    weight, slope = torch.randn(9, 11, generator=g) * mask, torch.rand(9, 11, generator=g)
    new = rewired(weight, slope, mask, share)
    assert int(new.sum()) == int(mask.sum())
    count = min(int(share * int(mask.sum())), int((~mask).sum()))
    order = weight.abs()[mask].sort().values
    sure = mask & (weight.abs() > order[count - 1]) if count else mask
    assert bool((new | ~sure).all())
    grown = new & ~sure
    assert int(grown.sum()) == count
    if count:
        assert float(slope[grown].min()) >= float(slope[~new].max() if bool((~new).any()) else 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_density_is_constant_and_masks_move(optimizer: str, kind: str) -> None:
    model, data = (mlp(), vectors()) if kind == "mlp" else (ResidualNet(), images())
    masks = random_masks(weights_of(model), 0.3, seed=3)
    seen: list[dict[str, int]] = []

    def look(step: int, m: nn.Module) -> None:
        seen.append({n: int((p != 0).sum()) for n, p in m.named_parameters() if n in masks})

    done = rigl(model, data, watched(look), short(optimizer), masks=masks, every=4, fraction=0.3)
    on = {n: int(m.sum()) for n, m in masks.items()}
    assert all(counts[n] <= on[n] for counts in seen for n in on)  # a grown weight is zero until its first step
    assert {n: int(m.sum()) for n, m in done.masks.items()} == on
    assert sum(int((done.masks[n] & ~masks[n]).sum()) for n in masks) >= 5
    assert not any(bool(dict(model.named_parameters())[n][~m].any()) for n, m in done.masks.items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_new_weights_start_at_zero_with_no_momentum(optimizer: str) -> None:
    """Also those that were on before: what the optimizer remembers of them is forgotten."""
    model, data = mlp(), vectors()
    masks = {"2.weight": random_masks({"w": model[2].weight}, 0.4)["w"]}
    made: list[torch.optim.Optimizer] = []

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        kinds = {"adamw": torch.optim.AdamW, "sgd": lambda n, lr: torch.optim.SGD(n, lr, momentum=0.9)}
        made.append(kinds[optimizer](named, lr=0.02))
        return made[0]

    states: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def look(step: int, m: nn.Module) -> None:
        if step:
            state = made[0].state[model[2].weight]
            moments = [v.clone() for k, v in state.items() if v.shape == (16, 16) and not k.startswith("pruning")]
            states.append((state["pruning_mask"].clone(), [model[2].weight.detach().clone(), *moments]))

    rigl(model, data, watched(look), short(), masks=masks, every=2, end=24, fraction=0.5, optimizer=make)
    remembered = 0
    for (before, old), (after, new) in itertools.pairwise(states):
        grown = after & ~before
        assert len(new) == (3 if optimizer == "adamw" else 2)
        assert not any(bool(one[grown].any()) for one in new)
        assert not bool(new[0][~after].any())
        remembered += int((old[1][grown] != 0).sum())
    assert remembered >= 3


def test_masks_stay_after_the_end_and_before_the_first_change() -> None:
    model = mlp()
    masks, live = random_masks(weights_of(model), 0.4), []
    done = rigl(model, vectors(), task, short(epochs=1), masks=masks, every=7)
    assert all(torch.equal(done.masks[n], masks[n]) for n in masks)
    rigl(mlp(), vectors(), watched(lambda s, m: live.append(m[2].weight != 0)), short(), masks=masks, every=5, end=11)  # type: ignore[index]
    assert not torch.equal(live[4], live[11] & live[4])
    assert all(torch.equal(live[12], later) for later in live[12:])


def test_it_finds_the_inputs_that_matter() -> None:
    """Of 12 inputs 4 count. A third of the weights is on, all at inputs that do not: growth moves them over."""
    data = vectors(batches=12, size=32, useful=4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 3))
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[:, 8:] = True
    fixed = nn.Sequential(nn.Linear(12, 3))
    fixed.load_state_dict(model.state_dict())
    config = TrainConfig(epochs=10, lr=0.05)
    done = rigl(model, data, task, config, masks={"0.weight": mask}, every=5, fraction=0.5)
    rigl(fixed, data, task, config, masks={"0.weight": mask}, every=5, fraction=0.0)
    assert int(done.masks["0.weight"][:, :4].sum()) >= 7
    assert data.quality(model.eval()) > 0.85 > 0.6 > data.quality(fixed.eval())


def test_the_dropped_share_is_a_cosine() -> None:
    assert dropped_share(0, 100, 0.3) == pytest.approx(0.3)
    assert dropped_share(50, 100, 0.3) == pytest.approx(0.15)
    assert dropped_share(25, 100, 0.3) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert dropped_share(100, 100, 0.3) == pytest.approx(0)


@given(st.floats(0.02, 1.0), st.integers(0, 1000))
def test_random_masks_have_the_density(density: float, seed: int) -> None:
    model = ResidualNet()
    weights = weights_of(model)
    total = sum(w.numel() for w in weights.values())
    for sizes in ("erk", "uniform"):
        masks = random_masks(weights, density, sizes=sizes, seed=seed)  # type: ignore[arg-type]
        assert sum(int(m.sum()) for m in masks.values()) == max(round(density * total), len(weights))
        assert {n: m.shape for n, m in masks.items()} == {n: w.shape for n, w in weights.items()}
    other = random_masks(weights, density, seed=seed + 1)
    again = random_masks(weights, density, seed=seed)
    assert all(torch.equal(again[n], random_masks(weights, density, seed=seed)[n]) for n in weights)
    assert density > 0.9 or any(not torch.equal(again[n], other[n]) for n in weights)


def test_wrong_masks_and_values_are_refused() -> None:
    model, data = mlp(), vectors()
    with pytest.raises(PlanError, match=r"'1\.weight'"):
        rigl(model, data, task, short(), masks={"1.weight": torch.ones(16, 16)})
    with pytest.raises(PlanError, match=r"the mask of '0\.weight' has shape \(3, 3\)"):
        rigl(model, data, task, short(), masks={"0.weight": torch.ones(3, 3)})
    with pytest.raises(DataError, match="every >= 1"):
        rigl(model, data, task, short(), masks=random_masks(weights_of(model), 0.5), every=0)
    with pytest.raises(PlanError, match="share in"):
        random_masks(weights_of(model), 1.5)
