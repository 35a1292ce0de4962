"""What a job may choose, budgets that cannot be met, and tasks that are not classification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline_task as task
import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.data import Data
from shohin.errors import BudgetError
from shohin.pipeline import parse_time
from shohin.result import Result


@pytest.fixture(scope="module")
def searched(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Architecture search alone, under a budget that nothing can keep, with no time."""
    out = tmp_path_factory.mktemp("runs") / "search"
    return shohin.search(task.trained(48, 1, 1), task.data(128), budget="size <= 1 kb, drop <= 0.5", out=out, time_limit=1)


def test_an_impossible_budget_gives_what_comes_nearest(searched: Result) -> None:
    assert not searched.met and searched.notes["finished"]
    smallest = min(c.metrics.values()["size_bytes"] for c in searched.candidates.values())
    assert searched.best.metrics.values()["size_bytes"] == smallest < searched.baseline.metrics.values()["size_bytes"]
    assert any(u.startswith("size <= 1024 cannot be met: the nearest candidate") for u in searched.notes["unmet"])
    assert searched.best.artifact is not None
    assert torch.isfinite(shohin.Target("onnxruntime").runner(searched.best.artifact)(torch.randn(2, task.CHANNELS, task.LENGTH))).all()
    assert not shohin.load(searched.folder).met
    assert "size" in (searched.folder / "report.html").read_text()


def test_search_uses_no_integers(searched: Result) -> None:
    assert all(not c.plan.formats for c in searched.candidates.values())


class Regressor(nn.Module):
    """Two inputs by keyword; the answer is a number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv1d(4, 32, 5, padding=2), nn.Conv1d(32, 32, 5, padding=2), nn.Linear(33, 1)

    def forward(self, signal: Tensor, gain: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(signal)))).mean(-1)
        return self.head(torch.cat([x, gain], 1))


@pytest.fixture(scope="module")
def regression(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Quantization alone; batches are dictionaries, the metric is an error."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Regressor()
        signal, gain = torch.randn(128, 4, 64), torch.rand(128, 1)
        labels = signal[:, :1].abs().mean(-1) * gain
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            (model(signal, gain) - labels).square().mean().backward()
            optimizer.step()
    batches = [{"signal": s, "gain": g, "labels": y} for s, g, y in zip(signal.split(32), gain.split(32), labels.split(32), strict=True)]

    def error(run: Callable[..., Tensor]) -> float:
        return float((run(signal=signal, gain=gain) - labels).abs().mean())

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch["labels"]).square().mean()

    data = Data(batches, batches[:2], test=batches[2:], metric=error, loss=loss, lower_is_better=True)
    out = tmp_path_factory.mktemp("runs") / "numbers"
    return shohin.optimize(model, data, budget="drop <= 20 %", out=out, methods=("quantize",), finalists=1, progress=False)


def test_quantize_alone_changes_formats_alone(regression: Result) -> None:
    others = [c for c in regression.candidates.values() if c.name != "baseline"]
    assert others and all(c.plan.formats and not c.plan.widths and not c.plan.skips and not c.removed for c in others)
    for c in others:
        assert set(c.plan.formats.values()) == {"int8"} and c.metrics.macs == regression.baseline.metrics.macs
        assert c.metrics.values()["size_bytes"] < 0.7 * regression.baseline.metrics.values()["size_bytes"]


def test_dictionaries_and_errors_that_should_be_small(regression: Result) -> None:
    best, base = regression.best.metrics.values(), regression.baseline.metrics.values()
    assert regression.met and best["quality"] <= 1.2 * base["quality"] and best["latency_ms"] <= base["latency_ms"]
    assert "test" not in regression.best.notes  # a user's metric is about validation
    for c in regression.candidates.values():
        assert c.notes["parity"]["boundaries"]["view_runtime"]["snr_db"] > 30
    assert shohin.verify(regression.folder)["passes"]


def test_time_limits() -> None:
    found = [parse_time(t) for t in (None, 5, 2.5, "90", "90 s", "20 min", "1.5 h", ".5 m")]
    assert found == [None, 5.0, 2.5, 90.0, 90.0, 1200.0, 5400.0, 30.0]
    for wrong in (0, -1, float("nan"), float("inf"), "..s", "", "1 day", "-3 s", "1e3 s"):
        with pytest.raises(BudgetError, match="cannot read the time limit"):
            parse_time(wrong)


def test_a_warning_when_nothing_is_held_back(searched: Result) -> None:
    from shohin.pipeline.job import Job
    from shohin.pipeline.main import _captured
    from shohin.run import Run

    data = Data([(torch.randn(4, task.CHANNELS, task.LENGTH), torch.arange(4))])
    graph = shohin.understand(task.Watch(8, 1), data)
    job = Job(
        Run(searched.folder), task.Watch(8, 1), data, shohin.Target("onnxruntime"), shohin.Budget(), 0, graph, None, frozenset(), False
    )
    assert any("no validation batches: train is used" in r for r in _captured(job)["remarks"])
