"""Kill and resume: SIGKILL at any moment leaves the best so far loadable, and the same command ends with the same result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pipeline_task as task
import pytest

import shohin
from shohin.errors import RunError
from shohin.result import Result
from shohin.run import Run


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    result: Result = task.job(tmp_path_factory.mktemp("runs") / "whole")
    return result


def start(out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The job in a process of its own; it inherits the cache of timings."""
    return subprocess.Popen(
        [sys.executable, task.__file__, str(out), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def kill_when(out: Path, moment: Callable[[], bool]) -> None:
    """Starts the job and kills it as soon as ``moment`` holds."""
    process = start(out)
    while process.poll() is None and not moment():
        time.sleep(0.002)
    assert process.poll() is None, process.stderr and process.stderr.read().decode()[-2000:]
    process.kill()
    assert process.wait() == -signal.SIGKILL


def journaled(out: Path) -> set[str]:
    path = out / "journal.jsonl"
    return {json.loads(line)["stage"] for line in path.read_bytes().split(b"\n")[:-1] if line} if path.exists() else set()


def best_so_far(out: Path) -> Result:
    result = shohin.load(out)
    assert not result.notes["finished"] and not result.met and "interrupted" in result.notes["reasons"][0]
    assert result.best.artifact is not None and shohin.verify(out)["passes"]
    return result


def test_a_job_that_is_killed_again_and_again_ends_as_if_it_had_not_been(uninterrupted: Result, tmp_path: Path) -> None:
    out = tmp_path / "killed"

    process = start(out, "4")  # while the baseline is written
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(RunError, match="no finished candidate yet; run the same command again"):
        shohin.load(out)

    kill_when(out, lambda: "tables" in journaled(out))
    assert not {"plan", "distill"} & journaled(out)
    assert best_so_far(out).best.name == "baseline"

    kill_when(out, lambda: any((out / "work").glob("c1-*-training.safetensors")))
    assert "plan" in journaled(out) and "distill" not in journaled(out)
    assert best_so_far(out).best.name == "baseline"

    process = start(out, "12")  # somewhere between the end of the training and the last candidate
    assert process.wait() == -signal.SIGKILL
    best_so_far(out)

    resumed = task.job(out)
    assert resumed.notes["finished"] and list(resumed.candidates) == list(uninterrupted.candidates)
    for name, whole in uninterrupted.candidates.items():
        again = resumed.candidates[name]
        assert again.plan == whole.plan and again.plan.digest == whole.plan.digest
        assert again.metrics.values()["quality"] == whole.metrics.values()["quality"]
        for file in ("model.safetensors", "model.onnx"):
            mine, theirs = (r.folder / "candidates" / name / file for r in (resumed, uninterrupted))
            assert mine.read_bytes() == theirs.read_bytes(), (name, file)
    assert "distill" in journaled(out) and resumed.candidates["c1-int8"].plan.widths
    assert not any(c.plan.skips for c in resumed.candidates.values())  # "skip" was not asked for
    for stage in ("saliency", "tables", "plan", "compensate", "distill"):
        mine, theirs = ([e["data"] for e in Run(r.folder).entries if e["stage"] == stage] for r in (resumed, uninterrupted))
        if stage == "distill":
            assert [history(d) for d in mine] == [history(d) for d in theirs]
        else:
            assert mine == theirs, stage
    assert shohin.verify(out)["passes"] and (out / "report.html").exists()
    assert not list(out.rglob("*.tmp"))  # what the kills left half-written


def history(training: dict[str, object]) -> list[tuple[object, ...]]:
    """What an epoch computed, without the time that it took."""
    return [tuple(r[k] for k in ("epoch", "loss", "quality", "lr", "steps")) for r in training["history"]]  # type: ignore[attr-defined]
