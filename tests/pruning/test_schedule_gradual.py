"""Zeros that grow during training: exact after every step, on the pattern at the end."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedule_cases import ResidualNet, accuracy, images, mlp, short, task, vectors, watched
from torch import nn

from shohin.data import Data
from shohin.errors import DataError, ModelError, PlanError
from shohin.pruning.schedules import cubic, gradual, hard_movement, one_shot
from shohin.pruning.schedules.masks import grown, lowest
from shohin.pruning.sparse.patterns import Pattern
from shohin.training import TrainConfig


def _zeros(model: nn.Module) -> dict[str, float]:
    return {n: float((p == 0).double().mean()) for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeros_follow_the_schedule_after_every_step(optimizer: str) -> None:
    shares, seen = cubic(0.8, 2, 14, every=2), []
    model = mlp()
    done = gradual(
        model, vectors(), watched(lambda step, m: seen.append(_zeros(m))), short(optimizer), pattern="unstructured 0.8", shares=shares
    )
    seen.append(_zeros(model))
    assert len(seen) == 25
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    for step, zeros in enumerate(seen):
        for name, share in zeros.items():
            assert share == pytest.approx(shares(step) if step else 0.0, abs=0.51 / sizes[name]), (step, name)
    assert done.share == pytest.approx(0.8, abs=0.01)
    assert all(torch.equal(done.masks[n], dict(model.named_parameters())[n] != 0) for n in done.masks)


@pytest.mark.parametrize("schedule", [gradual, hard_movement])
def test_a_ramp_that_is_longer_than_the_training_is_no_silent_end(schedule: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match=r"ends after 24 steps with .* gone; the ramp goes on to 80.0% at step 60"):
        done = schedule(mlp(), vectors(), task, short("adamw"), pattern="unstructured 0.8", shares=cubic(0.8, 0, 60))
    assert done.share < 0.75


def test_what_is_gone_stays_gone_and_what_stays_is_the_largest() -> None:
    model, gone = mlp(), []

    def look(step: int, m: nn.Module) -> None:
        gone.append(m[2].weight.detach() == 0)  # type: ignore[index]

    gradual(model, vectors(), watched(look), short(), pattern="unstructured 0.9", shares=cubic(0.9, 0, 20))
    assert all(bool((b | ~a).all()) for a, b in itertools.pairwise(gone))
    once = mlp()
    before = once[0].weight.detach().clone()
    gradual(once, vectors(), task, short(epochs=1, lr=1e-9), pattern="unstructured 0.5", shares=one_shot(0.5))
    kept = once[0].weight.detach() != 0
    assert float(before.abs()[kept].min()) >= float(before.abs()[~kept].max())


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("1:4", 4), ("4:8", 8)])
def test_patterns_of_groups_hold_at_the_end(pattern: str, group: int) -> None:
    model = mlp(inputs=16)
    stays = int(pattern[0])
    gradual(model, vectors(inputs=16), task, short(), pattern={"0.weight": pattern, "2.weight": pattern})
    for layer in (model[0], model[2]):
        counts = (layer.weight.detach() != 0).reshape(-1, group).sum(1)
        assert counts.tolist() == [stays] * len(counts)
    assert bool((model[4].weight != 0).all())


def test_convolutions_and_averages_are_masked_too() -> None:
    model = ResidualNet()
    done = gradual(model, images(), task, short(ema=0.95), pattern="unstructured 0.6")
    assert set(done.masks) == {"stem.weight", "a.weight", "dw.weight", "b.weight", "fc.weight"}
    for name, mask in done.masks.items():
        weight = dict(model.named_parameters())[name]
        assert not bool(weight[~mask].any())
        assert torch.equal(done.training.state[name], weight)
    assert done.share == pytest.approx(0.6, abs=0.01)


def test_training_makes_up_for_what_is_pruned() -> None:
    """Nine of ten weights go, slowly: better by far than at once after the training."""
    data, config = vectors(batches=12, size=32, useful=4), TrainConfig(epochs=20, lr=0.02)
    slow, fast = mlp(hidden=32), mlp(hidden=32)
    gradual(slow, data, task, config, pattern="unstructured 0.9")
    gradual(fast, data, task, config, pattern="unstructured 0.9", shares=one_shot(0.9, 240))
    assert accuracy(slow, data) > 0.9
    assert accuracy(slow, data) > accuracy(fast, data) + 0.05


def test_other_scores_decide() -> None:
    model = mlp()

    def first_columns(name: str, p: nn.Parameter) -> torch.Tensor:
        return -torch.arange(p.shape[1], dtype=p.dtype).expand_as(p)

    gradual(model, vectors(), task, short(), pattern={"0.weight": "unstructured 0.5"}, score=first_columns)
    assert bool((model[0].weight[:, :6] != 0).all())
    assert not model[0].weight[:, 6:].any()


@pytest.mark.parametrize("pattern", ["unstructured 0.75", "2:4", "1:4", "block 1x4 0.5", "block 4x2 0.75"])
def test_growing_masks_reach_the_pattern_without_detours(pattern: str) -> None:
    scores = torch.rand(12, 16, generator=torch.Generator().manual_seed(0))
    kind = Pattern.parse(pattern)
    final, mask = kind.select(scores), None
    for share in (0.0, 0.1, 0.3, 0.45, kind.zeros):
        new = grown(kind, scores, share, mask)
        unit = kind.height * kind.width
        assert int((~new).sum()) == unit * round(share * scores.numel() / unit)
        assert bool((new | ~final).all())  # nothing goes that the pattern would keep
        assert mask is None or bool((mask | ~new).all())
        mask = new
    assert mask is not None
    assert torch.equal(mask, final)
    assert torch.equal(grown(kind, scores.flip(0), 0.1, mask), final)  # a share that falls brings nothing back


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=60), st.floats(0, 0.99))
def test_the_lowest_are_what_the_pattern_chooses(values: list[int], share: float) -> None:
    """Without sorting, also where many are equal."""
    scores = torch.tensor([values], dtype=torch.float32)
    pattern = Pattern.unstructured(share)
    assert torch.equal(~lowest(scores, pattern.dropped(len(values))), pattern.select(scores))
    assert torch.equal(grown(pattern, scores, share), pattern.select(scores))


def test_blocks_go_as_a_whole() -> None:
    model, seen = mlp(inputs=16), []

    def look(step: int, m: nn.Module) -> None:
        blocks = (m[2].weight.detach() != 0).reshape(8, 2, 4, 4).sum((1, 3))  # type: ignore[index]
        seen.append(set(blocks.flatten().tolist()))

    done = gradual(model, vectors(inputs=16), watched(look), short(), pattern={"2.weight": "block 2x4 0.5"}, shares=cubic(0.5, 0, 20))
    look(0, model)
    assert {0, 8} == set().union(*seen) == seen[-1]
    assert done.share == 0.5


def test_a_pattern_is_given_to_the_layers_that_it_fits() -> None:
    done = gradual(ResidualNet(), images(), task, short(epochs=1), pattern="2:4", shares=one_shot(0.5))
    assert set(done.masks) == {"a.weight", "b.weight", "fc.weight"}  # not the stem's two inputs, not the depthwise layer
    assert done.share == 0.5
    blocks = gradual(ResidualNet(), images(), task, short(epochs=1), pattern="block 2x1 0.5")
    assert set(blocks.masks) == {"stem.weight", "a.weight", "b.weight"}  # not the three classes, not the depthwise layer
    with pytest.raises(PlanError, match=r"stem\.weight \(8, 2, 3, 3\) cannot be '2:4'"):
        gradual(ResidualNet(), images(), task, short(), pattern={"stem.weight": "2:4"})
    with pytest.raises(PlanError, match="no weight of the model can be '1:32'"):
        gradual(ResidualNet(), images(), task, short(), pattern="1:32")


def test_what_is_gone_has_no_gradient() -> None:
    """The momentum of what went at the first step fades by 0.9 a step; that of the rest does not."""
    made: list[torch.optim.Optimizer] = []

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(named, lr=0.05, momentum=0.9))
        return made[0]

    model = mlp()
    done = gradual(model, vectors(), task, short(epochs=6), pattern="unstructured 0.5", shares=one_shot(0.5), optimizer=make)
    momentum, mask = made[0].state[model[2].weight]["momentum_buffer"].abs(), done.masks["2.weight"]
    assert float(momentum[~mask].max()) < 0.03 * float(momentum[mask].max())


def test_a_deadline_leaves_what_was_reached() -> None:
    model = mlp()
    done = gradual(model, vectors(), task, short(), pattern="unstructured 0.8", deadline=time.monotonic() - 1)
    assert done.training.stopped == "deadline"
    assert done.share == 0.0


def test_what_cannot_be_pruned_is_refused() -> None:
    data = vectors()
    with pytest.raises(PlanError, match=r"'0\.wait'; did you mean"):
        gradual(mlp(), data, task, short(), pattern={"0.wait": "unstructured 0.5"})
    with pytest.raises(ModelError, match="no linear layer"):
        gradual(nn.Sequential(nn.LayerNorm(12)), data, task, short(), pattern="unstructured 0.5")

    class Endless:
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(data.train or ())

    with pytest.raises(DataError, match="does not tell its length"):
        gradual(mlp(), Data(Endless()), task, short(), pattern="unstructured 0.5")
