"""Cut a little, train a little: one plan of the original describes the result of all rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from schedule_cases import Killed, ResidualNet, accuracy, images, killed_at, mlp, same, short, shuffled, task, vectors
from torch import nn

import small_models
from shohin.data import Data
from shohin.errors import DataError, RunError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.pruning.schedules import Iterated, geometric, iterative
from shohin.surgery import cut, understand
from shohin.training import TrainConfig

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {"cnn": (ResidualNet, images), "mlp": (mlp, vectors)}


@pytest.mark.parametrize(("name", "of"), [("cnn", "macs"), ("mlp", "params"), ("mlp", "macs")])
def test_the_composed_plan_leads_to_the_result_and_keeps_the_shares(name: str, of: str) -> None:
    make, source = CASES[name]
    model, data = make(), source()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    done = iterative(model, data, task, short(epochs=1), shares=(0.2, 0.4, 0.6), of=of)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert len(done.plans) == 3
    graph = understand(model, data.example())
    assert done.plan.fingerprint == graph.program.fingerprint
    composed = done.plans[0].then(done.plans[1]).then(done.plans[2])
    assert composed == done.plan
    expected = cut(model, graph, done.plan).model
    shapes = {n: t.shape for n, t in expected.state_dict().items()}
    assert {n: t.shape for n, t in done.model.state_dict().items()} == shapes
    expected.load_state_dict(done.model.state_dict())
    x = data.example().args[0]
    assert torch.equal(expected.eval()(x), done.model.eval()(x))
    plan, last = done.plans[0], 1.0
    for later, share in zip([None, *done.plans[1:]], (0.2, 0.4, 0.6), strict=True):
        plan = plan if later is None else plan.then(later)
        left = _left(model, graph, plan, of)
        assert left <= 1 - share
        assert left < last
        last = left


def _left(model: nn.Module, graph: Graph, plan: Plan, of: str) -> float:
    if of == "macs":
        return graph.macs(plan) / graph.macs()
    small = cut(model, graph, plan).model
    return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())


def test_scores_decide_and_see_the_model_of_their_round() -> None:
    model, seen = mlp(), []

    def score(graph: Graph, now: nn.Module) -> Mapping[str, Sequence[float]]:
        seen.append(sum(p.numel() for p in now.parameters()))
        return {g.name: list(range(g.size)) for g in graph.groups}

    done = iterative(model, vectors(), task, short(epochs=1), shares=(0.3, 0.5), score=score)
    assert seen[0] == sum(p.numel() for p in model.parameters()) > seen[1]
    for kept in done.plan.widths.values():
        assert kept == tuple(range(16 - len(kept), 16))  # the highest scores are the last units


def test_useless_units_go_and_accuracy_stays() -> None:
    data = vectors(batches=12, size=32, useful=4)
    model = mlp(hidden=32)
    done = iterative(model, data, task, TrainConfig(epochs=6, lr=0.02), shares=geometric(0.8, 3))
    assert sum(p.numel() for p in done.model.parameters()) < 0.25 * sum(p.numel() for p in model.parameters())
    assert accuracy(done.model, data) > 0.9


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    make, source = CASES[name][0], lambda: shuffled(CASES[name][1]())

    def run(objective: Any, folder: Path | None, **changes: Any) -> Iterated:
        return iterative(
            make(),
            source(),
            objective,
            short(epochs=2),
            shares=(0.3, 0.5, 0.6),
            samples=24,
            folder=folder,
            **{"evaluate": source().quality, **changes},
        )

    steps = 2 * len(source().train or ())  # type: ignore[arg-type]  # of a round
    for step in (steps - 1, steps // 2 + steps + 2):  # in the first round's last epoch; then in the third round
        with pytest.raises(Killed):
            run(killed_at(step), tmp_path / "r")
    resumed, whole = run(task, tmp_path / "r"), run(task, None)
    assert resumed.plan == whole.plan
    assert resumed.plans == whole.plans
    assert same(resumed.model, whole.model)
    again = run(killed_at(0), tmp_path / "r")
    assert same(again.model, whole.model)
    assert again.training is None
    with pytest.raises(RunError, match="another job: align is"):
        run(task, tmp_path / "r", align=4)


@pytest.mark.parametrize("style", ["fused", "sdpa"])
def test_attention_goes_on_from_disk(style: str, tmp_path: Path) -> None:
    """Head dims are cut, which changes the scale of the scores: the plan of all rounds restores what the rounds left."""
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(8, 3, 8, 8, generator=g) for _ in range(3)]
    data = Data([(x, (x[:, 0].mean((1, 2)) > 0).long()) for x in xs])

    def run() -> Iterated:
        torch.manual_seed(0)
        return iterative(small_models.ViT(style=style), data, task, short(epochs=1), shares=(0.2, 0.4), folder=tmp_path / "r")

    first, second = run(), run()
    assert any("attn" in name for name in first.plan.widths)
    assert second.training is None
    assert same(first.model, second.model)
    assert torch.equal(first.model.eval()(xs[0]), second.model.eval()(xs[0]))


def test_half_a_round_does_not_count(tmp_path: Path) -> None:
    """Weights without the record that is written last are those of a kill between the two."""
    folder = tmp_path / "r"
    first = iterative(mlp(), vectors(), task, short(epochs=1), shares=(0.3, 0.5), folder=folder)
    (folder / "1" / "round.json").unlink()
    (folder / "1" / "weights.safetensors").write_bytes(b"half")
    second = iterative(mlp(), vectors(), task, short(epochs=1), shares=(0.3, 0.5), folder=folder)
    assert same(first.model, second.model)
    assert second.training is not None


def test_a_deadline_leaves_the_last_whole_round(tmp_path: Path) -> None:
    folder, model = tmp_path / "r", mlp()
    late = iterative(model, vectors(), task, short(), shares=(0.3, 0.5), deadline=time.monotonic() - 1, folder=folder)
    assert not late.finished
    assert late.model is model
    assert late.plan.is_identity
    assert iterative(model, vectors(), task, short(epochs=1), shares=(0.3,)).finished


def test_shares_that_do_not_ascend_are_refused() -> None:
    for shares in ((), (0.5, 0.3), (0.5, 1.0)):
        with pytest.raises(DataError, match="ascending shares"):
            iterative(mlp(), vectors(), task, short(), shares=shares)
