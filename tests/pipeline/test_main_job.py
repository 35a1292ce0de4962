"""The main job, end to end, on a small residual net: what a user is promised of the result and its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import shohin
from shohin.budget import Budget
from shohin.candidate import Candidate
from shohin.data import first_output
from shohin.errors import RunError
from shohin.run import Run, checksum, read_tensors

if TYPE_CHECKING:
    from conftest import Finished

BUDGET = Budget.parse("latency <= 80 %, drop <= 0.05")


def small(candidates: dict[str, Candidate]) -> list[Candidate]:
    """All but the original."""
    return [c for c in candidates.values() if c.name != "baseline"]


def test_the_best_keeps_the_budget_and_beats_the_original(finished: Finished) -> None:
    result = finished.result
    best, base = result.best.metrics.values(), result.baseline.metrics.values()
    assert result.met and result.notes["finished"] and result.best is not result.baseline
    assert BUDGET.violations(best, base) == {}
    assert best["latency_ms"] < base["latency_ms"] and best["size_bytes"] < 0.5 * base["size_bytes"]
    assert set(best) >= {"quality", "latency_ms", "size_bytes", "memory_bytes", "macs", "params"}
    assert result.best in result.front and len(small(result.candidates)) >= 2
    front = [c.metrics.values() for c in result.front]
    assert [v["latency_ms"] for v in front] == sorted(v["latency_ms"] for v in front)
    assert [v["quality"] for v in front] == sorted(v["quality"] for v in front)


def test_numbers_are_those_of_the_files(finished: Finished) -> None:
    target = shohin.Target("onnxruntime")
    for c in finished.result.candidates.values():
        assert c.artifact is not None and c.artifact.stat().st_size == c.metrics.values()["size_bytes"]
        assert finished.data.quality(target.runner(c.artifact)) == c.metrics.values()["quality"]
        measured = c.metrics.latency_ms
        assert measured is not None and measured.how.startswith("measured") and {"threads", "batch"} <= measured.conditions.keys()
    for c in (finished.result.best, finished.result.baseline):
        assert c.artifact is not None
        assert c.notes["test"] == {"quality": finished.data.quality(target.runner(c.artifact), "test")}


def test_every_candidate_folder_is_whole(finished: Finished) -> None:
    for c in finished.result.candidates.values():
        folder = finished.result.folder / "candidates" / c.name
        assert {f.name for f in folder.iterdir()} == {
            "candidate.json",
            "model.onnx",
            "model.safetensors",
            "model.parity.json",
            "model.parity.safetensors",
        }
        stored = json.loads((folder / "candidate.json").read_text())
        assert stored["plan"] == c.plan.to_json() and stored["metrics"] == c.metrics.to_json()
        assert {f: checksum(folder / f) for f in stored["checksums"]} == stored["checksums"]
        assert c.model is not None
        tensors = read_tensors(folder / "model.safetensors")
        assert tensors.keys() == c.model.state_dict().keys()
        if c.name != "baseline":
            assert sum(t.numel() for t in tensors.values()) <= sum(t.numel() for t in finished.model.state_dict().values())
            assert c.notes["proof"]["holds"] and c.notes["parity"]["departs"] == []


def outputs(run: Any, finished: Finished) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([first_output(run(*c.args)) for c in finished.data.calls("validation")])


def snr(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum().clamp_min(1e-30)))


def test_loading_gives_the_same(finished: Finished) -> None:
    result, files = finished.result, shohin.load(finished.result.folder)
    assert files.best.name == result.best.name and [c.name for c in files.front] == [c.name for c in result.front]
    assert files.met and files.notes["reasons"] == result.notes["reasons"] and list(files.candidates) == list(result.candidates)
    for name, c in files.candidates.items():
        mine = result.candidates[name]
        assert c.plan == mine.plan and c.metrics == mine.metrics and c.artifact == mine.artifact and c.removed == mine.removed
        assert json.loads(json.dumps(c.notes)) == json.loads(json.dumps(mine.notes)) and c.model is None
        assert {n: q.to_json() for n, q in c.evidence.items()} == {n: q.to_json() for n, q in mine.evidence.items()}


def test_loading_with_the_model_rebuilds_candidates_that_equal_their_files(finished: Finished) -> None:
    x = finished.data.example().args[0]
    loaded = shohin.load(finished.result.folder, model=finished.model, example=x)
    assert shohin.load(finished.result.folder, model=finished.model, example=finished.data).best.plan == loaded.best.plan
    target = shohin.Target("onnxruntime")
    for name, c in loaded.candidates.items():
        assert c.model is not None and c.artifact is not None
        mine, shipped = finished.result.candidates[name], outputs(target.runner(c.artifact), finished)
        assert mine.model is not None
        for n, t in mine.model.state_dict().items():
            assert torch.equal(t, c.model.state_dict()[n]), n
        if c.plan.formats:
            assert c.view is not None and mine.view is not None
            assert snr(shipped, outputs(c.view, finished)) > 30 and snr(outputs(mine.view, finished), outputs(c.view, finished)) > 60
        else:
            torch.testing.assert_close(outputs(c.model.eval(), finished), shipped, rtol=1e-3, atol=1e-3)
    with pytest.raises(RunError, match="needs example="):
        shohin.load(finished.result.folder, model=finished.model)
    with pytest.raises(RunError, match="belongs to another model"):
        shohin.load(finished.result.folder, model=torch.nn.Conv1d(4, 8, 3), example=finished.data.example().args)


def test_a_loaded_candidate_can_be_exported_again(finished: Finished, tmp_path: Path) -> None:
    loaded = shohin.load(finished.result.folder, model=finished.model, example=finished.data)
    target = shohin.Target("onnxruntime")
    for c in small(loaded.candidates):
        again = shohin.export(c, finished.data, path=tmp_path / f"{c.name}.onnx")
        assert again.artifact is not None and c.artifact is not None
        assert snr(outputs(target.runner(c.artifact), finished), outputs(target.runner(again.artifact), finished)) > 30
        assert again.metrics.values()["size_bytes"] == pytest.approx(c.metrics.values()["size_bytes"], rel=0.05)
        assert again.notes["parity"]["departs"] == []


def test_the_user_s_model_and_process_are_left_alone(finished: Finished) -> None:
    before, after = finished.before, finished.after
    assert before.pop("state").keys() == after["state"].keys()
    for name, tensor in finished.model.state_dict().items():
        assert torch.equal(tensor, after["state"][name])
    after.pop("state")
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, key


def test_weights_are_those_from_before(finished: Finished) -> None:
    import pipeline_task as task

    for name, tensor in task.trained().state_dict().items():
        assert torch.equal(tensor, finished.model.state_dict()[name]), name


def test_the_report_has_a_row_for_each_candidate(finished: Finished) -> None:
    page = (finished.result.folder / "report.html").read_text()
    for c in finished.result.candidates.values():
        assert f">{c.name}" in page and f"{c.metrics.values()['quality'] * 100:.2f} %" in page
    assert finished.result.report() == finished.result.folder / "report.html"
    assert (finished.result.folder / "model_card.md").exists()


def test_predictions_were_made_before_they_were_measured(finished: Finished) -> None:
    entries = Run(finished.result.folder).entries
    stages = [e["stage"] for e in entries]
    assert stages.index("profile") < stages.index("plan") < stages.index("time") < stages.index("measure") < stages.index("result")
    errors = finished.result.notes["prediction"]["errors"]
    assert errors.keys() == {c.name for c in small(finished.result.candidates)}
    assert np.isfinite(list(errors.values())).all()
    last = entries[-1]["data"]
    for c in small(finished.result.candidates):
        steps = [s["step"] for s in last["steps"][c.name]]
        assert len(steps) == len(set(steps)) and steps[0] == "start" and ("quantize" in steps) == bool(c.plan.formats)


def test_asking_again_measures_nothing_again(finished: Finished) -> None:
    folder = finished.result.folder
    entries = len(Run(folder).entries)
    again = shohin.optimize(
        finished.model, finished.data, budget="latency <= 80 %, drop <= 0.05", out=folder, seed=3, finalists=2, progress=False
    )
    assert len(Run(folder).entries) == entries
    assert again.best.name == finished.result.best.name and again.best.metrics == finished.result.best.metrics


def test_verification_passes_and_notices_one_byte(finished: Finished, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.result.folder, copy)
    found = shohin.verify(copy)
    assert found["passes"] and len(found["files"]) == len(finished.result.candidates)
    path = copy / "candidates" / finished.result.best.name / "model.onnx"
    assert shohin.verify(path)["passes"] and shohin.verify(path.parent)["passes"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for place in (copy, path.parent, path):
        with pytest.raises(RunError, match="damaged or was replaced"):
            shohin.verify(place)
    with pytest.raises(RunError, match=r"model\.onnx is damaged or missing \(checksum\)"):
        shohin.load(copy)
    with pytest.raises(RunError, match="nothing to verify"):
        shohin.verify(tmp_path)


def test_a_candidate_that_is_deleted_is_missed(finished: Finished, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.result.folder, copy)
    shutil.rmtree(copy / "candidates" / finished.result.best.name)
    with pytest.raises(RunError, match=f"lacks the candidate '{finished.result.best.name}'"):
        shohin.load(copy)
