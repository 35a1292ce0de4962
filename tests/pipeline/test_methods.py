"""What a job may choose, and budgets that cannot be met."""

from __future__ import annotations

from pathlib import Path

import pipeline_task as task
import pytest
import torch

import shohin
from shohin.data import Data
from shohin.pipeline import parse_time
from shohin.result import Result


@pytest.fixture(scope="module")
def floats(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Pruning and distillation alone, under a budget that nothing can keep."""
    return shohin.optimize(
        task.trained(48, 1, 1),
        task.data(128),
        budget="size <= 1 kb, drop <= 0.5",
        out=tmp_path_factory.mktemp("runs") / "floats",
        methods=("prune", "distill"),
        finalists=1,
        time_limit=1,
        progress=False,
    )


def test_an_impossible_budget_gives_what_comes_nearest(floats: Result) -> None:
    assert not floats.met and any(u.startswith("size <= 1024 cannot be met: the nearest candidate") for u in floats.notes["unmet"])
    assert floats.notes["finished"] and floats.best.artifact is not None
    assert torch.isfinite(shohin.Target("onnxruntime").runner(floats.best.artifact)(torch.randn(2, task.CHANNELS, task.LENGTH))).all()
    assert not shohin.load(floats.folder).met
    assert "size" in (floats.folder / "report.html").read_text()


def test_without_quantize_nothing_has_integers(floats: Result) -> None:
    assert all(not c.plan.formats and not c.plan.skips for c in floats.candidates.values())


def test_quantize_alone_changes_formats_alone(cache: Path, tmp_path: Path) -> None:
    result = shohin.optimize(
        task.trained(48, 1, 1), task.data(128), budget="drop <= 0.1", out=tmp_path / "q", methods=("quantize",), finalists=1, progress=False
    )
    others = [c for c in result.candidates.values() if c.name != "baseline"]
    assert others and all(c.plan.formats and not c.plan.widths and not c.plan.skips and not c.removed for c in others)
    for c in others:
        assert set(c.plan.formats.values()) == {"int8"} and c.metrics.macs == result.baseline.metrics.macs
        assert c.metrics.values()["size_bytes"] < 0.5 * result.baseline.metrics.values()["size_bytes"]


def test_time_limits() -> None:
    found = [parse_time(t) for t in (None, 5, 2.5, "90", "90 s", "20 min", "1.5 h")]
    assert found == [None, 5.0, 2.5, 90.0, 90.0, 1200.0, 5400.0]


def test_a_warning_when_nothing_is_held_back(floats: Result) -> None:
    from shohin.pipeline.job import Job
    from shohin.pipeline.main import _captured
    from shohin.run import Run

    data = Data([(torch.randn(4, task.CHANNELS, task.LENGTH), torch.arange(4))])
    graph = shohin.understand(task.Watch(8, 1), data)
    job = Job(Run(floats.folder), task.Watch(8, 1), data, shohin.Target("onnxruntime"), shohin.Budget(), 0, graph, None, frozenset(), False)
    assert any("no validation batches: train is used" in r for r in _captured(job)["remarks"])
