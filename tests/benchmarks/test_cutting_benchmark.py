"""The benchmark of pruning on a network that takes seconds: one run of each kind, its budget, its counter, its figures."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import pruning
import shohin
from cutting import depgraph
from cutting.common import Unreachable, Work, macs, quick_macs, work
from cutting.fastnas import reshaped
from cutting.methods import CHANNELS, DISTILLED, OURS
from cutting.originals import Original
from cutting.sparse import keeping_zeros, share, weights
from cutting.summary import before, best_peer, fastest, figures, losses, table
from cutting.trial import trial
from distilling.tasks import task_loss
from fashion_mnist import Batches
from models import MobileNetV2, ResNet
from records import Book, interpreter, process, run_all
from shohin.training import TrainConfig, train


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes: where a bright square stands."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 10
    x = torch.randint(0, 60, (count, 1, 28, 28), generator=g, dtype=torch.uint8)
    for i, k in enumerate(y.tolist()):
        x[i, 0, 2 + 12 * (k // 5) : 12 + 12 * (k // 5), 5 * (k % 5) : 5 * (k % 5) + 5] += 60
    return x, y


@pytest.fixture(scope="module")
def original() -> Original:
    (x, y), (vx, vy), (tx, ty) = (images(n, i) for i, n in enumerate((320, 100, 100)))
    data = shohin.Data(train=Batches(x[None], y, 64, shuffle=True), validation=Batches(vx[None], vy, 50), test=Batches(tx[None], ty, 50))
    torch.manual_seed(0)
    model = ResNet((16, 24, 32), 1)
    train(model, data, task_loss, TrainConfig(epochs=4, lr=1e-2))
    return Original("squares", lambda: copy.deepcopy(model).eval(), lambda: data, TrainConfig(epochs=2, lr=2e-3))


@pytest.mark.parametrize(
    "make", [lambda: ResNet((8, 12, 16), 1), MobileNetV2, lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 1))]
)
def test_the_quick_counter_is_the_one_counter(make: object) -> None:
    model = make().eval()  # type: ignore[operator]
    example = torch.randn(2, 3, 20) if isinstance(model, nn.Sequential) else torch.randn(2, 1, 28, 28)
    assert quick_macs(model, example) == macs(model, example) > 0


def test_a_run_of_ours(original: Original) -> None:
    record = trial(original, "0.5", OURS, 0, timing=False)
    assert record["macs"] <= 0.5 and record["steps"] == 10
    assert all(0 <= record[stage][split] <= 1 for stage in ("raw", "recalibrated", "trained") for split in ("validation", "test"))
    assert record["trained"]["validation"] >= record["raw"]["validation"]  # the start counts
    assert pruning.key(record) == ("squares", "0.5", OURS, 0) and pruning.whole(record, untrained=False)


def test_torch_pruning_meets_the_budget_closely(original: Original) -> None:
    pytest.importorskip("torch_pruning")
    for method in ("torch-pruning:magnitude", "torch-pruning:isomorphic"):
        given = work(original, 0.5, 0)
        found = CHANNELS[method](given)
        left = macs(found.model, given.example) / macs(given.model, given.example)
        assert 0.4 < left <= 0.5, method
        assert found.model(given.example).shape == (2, 10)
    stepwise = depgraph.iterative(work(original, 0.5, 0))
    assert stepwise.notes["steps"] > 3
    record = trial(original, "0.5", "torch-pruning:groupnorm", 0, timing=False)
    assert record["steps"] == 10 and record["notes"]["steps_before"] == 5  # no more than the others


def test_taylor_gradients_are_those_of_the_samples(original: Original) -> None:
    given = work(original, 0.5, 3)
    model = copy.deepcopy(given.model)
    depgraph.accumulate(model, given)
    x, y = (torch.cat([call.batch[i] for call in given.calls]) for i in (0, 1))
    other = copy.deepcopy(given.model)
    nn.functional.cross_entropy(other(x), y, reduction="sum").backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    assert [c.size for c in given.calls] == [c.size for c in work(original, 0.5, 3).calls]
    assert torch.equal(given.calls[0].args[0], work(original, 0.5, 3).calls[0].args[0])  # every method sees the same


def test_sparse_weights_stay_sparse(original: Original) -> None:
    for method in ("torch:l1_unstructured", "torch:global_l1"):
        record = trial(original, "sparse 0.5", method, 0, timing=False)
        assert abs(record["nonzero"] - 0.5) < 0.01
    given = work(original, 0.5, 0)
    model = copy.deepcopy(given.model)
    with torch.no_grad():
        for layer in weights(model):
            layer.weight[layer.weight < 0] = 0  # type: ignore[operator, index]
    left = share(model)
    train(model, given.data, task_loss, TrainConfig(epochs=1), optimizer=keeping_zeros(model, TrainConfig(epochs=1)))
    assert share(model) <= left < 0.7


def test_a_cut_model_comes_back_from_its_tensors() -> None:
    torch.manual_seed(1)
    model = MobileNetV2().eval()
    cut = shohin.prune(model, shohin.Data(example=(torch.randn(2, 1, 28, 28),)), 0.4, criterion="magnitude").model
    x = torch.randn(3, 1, 28, 28)
    assert cut is not None and quick_macs(cut, x) < 0.5 * quick_macs(model, x)
    with torch.no_grad():
        torch.testing.assert_close(reshaped(model, cut.state_dict())(x), cut(x))


def test_what_cannot_be_done_is_said(original: Original) -> None:
    def refuse(given: Work) -> None:
        raise Unreachable("not in this world")

    CHANNELS["refusing"] = refuse  # type: ignore[assignment]
    try:
        record = trial(original, "0.5", "refusing", 0)
    finally:
        del CHANNELS["refusing"]
    assert record["unreachable"] == "not in this world" and not pruning.whole(record, untrained=True)
    assert "not in this world" in table([record], {"squares": {"test": 0.9}})
    with pytest.raises(Unreachable, match="no pruning ratio"):
        depgraph.searched(lambda ratio: original.model(), work(original, 0.01, 0))


def run(method: str, seed: int, raw: float, recalibrated: float, trained: float, ratio: float, **notes: int) -> dict[str, object]:
    stages = {name: {"test": v, "validation": v} for name, v in (("raw", raw), ("recalibrated", recalibrated), ("trained", trained))}
    fixed = {"model": "m", "budget": "0.5", "macs": 0.5, "params": 0.4, "seconds": {"score": 1.0, "cut": 1.0, "compensate": 0.0}}
    return {"method": method, "seed": seed, **stages, **fixed, "latency": {"ratio": ratio}, "notes": notes, "whole_seconds": 3}


def test_figures() -> None:
    runs = [run(OURS, s, 0.86 + 0.02 * s, 0.99, 0.895, 0.4) for s in range(2)]  # loses 3 points; recalibration by hand isn't ours
    runs += [run("peer", s, 0.2, 0.82 + 0.02 * s, 0.8951, 0.6) for s in range(2)]  # loses 7
    runs += [run("early", 0, 0.9, 0.9, 0.3, 0.1, steps_before=5), run(DISTILLED, 0, 0.87, 0.87, 0.8952, 0.4)]
    found = figures(runs, {"m": {"test": 0.9}})
    assert math.isclose(before(runs, OURS, 0.9), 0.03) and math.isclose(before(runs, "peer", 0.9), 0.07)
    assert math.isnan(before(runs, "early", 0.9)) and best_peer({OURS: 0.0, "early": math.nan}) is None
    entry = found["m 0.5"]
    assert entry["before"]["best_peer"] == "peer" and entry["before"]["met"] and entry["before"]["goal_met"]
    assert math.isclose(entry["before"]["demanded"], 3.5)
    assert not entry["trained"]["met"] and entry["distilled"]["met"]
    assert found["m latency"]["met"] and math.isclose(found["m latency"]["ratio"], 0.4 / 0.6)
    assert fastest([r for r in runs if r["method"] == OURS], 0.9)["shohin"][0] == 0.4
    assert losses(runs, OURS, "raw", 0.9) == pytest.approx([0.04, 0.02])
    text = table(runs, {"m": {"test": 0.9}})
    assert text.index("| shohin |") < text.index("| peer |") and "before training: 3.00 points lost; best peer peer 7.00" in text


def test_records_are_merged_and_failures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kept() -> Book:
        return Book(tmp_path / "r.json", tmp_path / "r.md", pruning.key, "originals", figures, table)

    kept().add(whole={"m": {"test": 0.9}})
    first, second = run("b", 0, 0.5, 0.5, 0.5, 1.0), run("a", 1, 0.5, 0.5, 0.5, 1.0)
    made = {("m", "0.5", "b", 0): first, ("m", "0.5", "a", 1): second, ("m", "0.5", "c", 0): "it broke"}
    assert run_all(list(made), made.__getitem__, kept(), 2, pruning.told) == [("m", "0.5", "c", 0)]
    assert "failed: it broke" in capsys.readouterr().out
    kept().add({**first, "raw": {"test": 0.7, "validation": 0.7}})
    values, records = kept().read()
    assert values == {"m": {"test": 0.9}} and list(records) == [("m", "0.5", "a", 1), ("m", "0.5", "b", 0)]
    assert records["m", "0.5", "b", 0]["raw"]["test"] == 0.7 and "## m, 0.5" in (tmp_path / "r.md").read_text()
    assert "no_such_module" in process("no_such_module", [], None, "x")
    assert "make x" in process("cutting", [], "nowhere", "x") and ".venv-nowhere" in interpreter("nowhere")
