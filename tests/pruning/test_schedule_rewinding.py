"""Lottery tickets: the kept weights go back to an early step, the others stay zero."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from schedule_cases import Killed, ResidualNet, accuracy, images, killed_at, mlp, same, short, task, vectors, watched
from torch import nn

from shohin.errors import DataError, RunError
from shohin.pruning.schedules import geometric, rewinding
from shohin.training import TrainConfig

State = dict[str, torch.Tensor]


def _copy(model: nn.Module) -> State:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("early", [0, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_each_round_begins_from_the_early_weights_under_its_mask(early: int, optimizer: str) -> None:
    model, data, seen = ResidualNet(), images(), []
    done = rewinding(
        model,
        data,
        watched(lambda t, m: seen.append(_copy(m))),
        short(optimizer, epochs=2),
        pattern="unstructured 0.75",
        shares=(0.5, 0.75),
        early=early,
    )
    steps = 10
    assert len(seen) == 3 * steps
    assert done.shares == pytest.approx((0.0, 0.5, 0.75), abs=0.01)
    assert all(torch.equal(done.early[n], t) for n, t in seen[early].items())
    for number in (1, 2):
        first, last = seen[number * steps], seen[number * steps + steps - 1]
        for name, tensor in first.items():
            if name in done.masks:
                kept = tensor != 0
                assert torch.equal(tensor, torch.where(kept, seen[early][name], torch.zeros(())))
                assert not bool(last[name][~kept].any())
            else:
                assert torch.equal(tensor, seen[early][name]), name  # statistics of normalizations, too
    for name, mask in done.masks.items():
        assert torch.equal(model.state_dict()[name] != 0, mask)
        before = seen[steps][name] != 0
        assert bool((before | ~mask).all())  # what is gone stays gone


def test_the_smallest_trained_weights_go() -> None:
    ends: list[State] = []
    config = short(epochs=1)
    model = mlp()
    rewinding(model, vectors(), watched(lambda t, m: ends.append(_copy(m))), config, pattern="unstructured 0.5", shares=(0.5,))
    trained = mlp()
    from_scratch = rewinding(trained, vectors(), task, config, pattern="unstructured 0.5", shares=())
    assert from_scratch.shares == (0.0,)
    sizes, mask = trained[0].weight.detach().abs(), ends[6]["0.weight"] != 0
    assert float(sizes[mask].min()) >= float(sizes[~mask].max())


def test_rounds_reach_a_sparse_network_that_works() -> None:
    data = vectors(batches=12, size=32, useful=4)
    model = mlp(hidden=24)
    done = rewinding(model, data, task, TrainConfig(epochs=10, lr=0.02), pattern="unstructured 0.9", shares=geometric(0.9, 3), early=12)
    assert done.finished
    assert done.shares[-1] == pytest.approx(0.9, abs=0.01)
    assert accuracy(model, data) > 0.9


@pytest.mark.parametrize("early", [0, 8])
def test_killed_and_resumed_equals_uninterrupted(early: int, tmp_path: Path) -> None:
    """Kills fall after the early step of the dense training, and into the second round."""

    def run(model: nn.Module, objective: object, folder: Path | None) -> object:
        return rewinding(model, vectors(), objective, short(), pattern="unstructured 0.8", shares=(0.5, 0.8), early=early, folder=folder)  # type: ignore[arg-type]

    for step in (15, 12 + 24 + 9):  # the second call begins at step 12 of the dense training
        with pytest.raises(Killed):
            run(mlp(), killed_at(step), tmp_path / "rounds")
    assert (tmp_path / "rounds" / "1" / "round.json").exists()
    assert not (tmp_path / "rounds" / "2" / "round.json").exists()
    resumed, whole, again = mlp(), mlp(), mlp()
    run(resumed, task, tmp_path / "rounds")
    run(whole, task, None)
    assert same(resumed, whole)
    run(again, killed_at(0), tmp_path / "rounds")  # nothing is left to train
    assert same(again, whole)
    with pytest.raises(RunError, match="another job: early is"):
        rewinding(
            mlp(), vectors(), task, short(), pattern="unstructured 0.8", shares=(0.5, 0.8), early=early + 1, folder=tmp_path / "rounds"
        )
    with pytest.raises(RunError, match="another job: start is"):
        run(mlp(seed=5), task, tmp_path / "rounds")


def test_a_deadline_leaves_the_last_whole_round(tmp_path: Path) -> None:
    folder, model = tmp_path / "rounds", mlp()
    rewinding(mlp(), vectors(), task, short(), pattern="unstructured 0.8", shares=(0.5, 0.8), folder=folder)
    for part in (folder / "2").iterdir():
        part.unlink()
    done = rewinding(
        model, vectors(), task, short(), pattern="unstructured 0.8", shares=(0.5, 0.8), folder=folder, deadline=time.monotonic() - 1
    )
    assert not done.finished
    assert done.shares == pytest.approx((0, 0.5), abs=0.01)
    assert all(torch.equal(model.state_dict()[n] != 0, mask) for n, mask in done.masks.items())


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="before step 100"):
        rewinding(mlp(), vectors(), task, short(), pattern="unstructured 0.5", shares=(0.5,), early=100)
    with pytest.raises(DataError, match="ascending"):
        rewinding(mlp(), vectors(), task, short(), pattern="unstructured 0.5", shares=(0.5, 0.2))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no rounds"):
        rewinding(mlp(), vectors(), task, short(), pattern="unstructured 0.5", shares=(0.5,), folder=tmp_path)
