"""A real job through the command: stopped, resumed, shown, verified; and one that cannot be met."""

import json
import shutil
from pathlib import Path

from cli_tasks import NET, OPTIONS, Stopped, invoke, write

import shohin
from shohin.cli.taskfile import load_task
from shohin.run import read_tensors, write_tensors


def test_ctrl_c_says_how_to_go_on(stopped: Stopped) -> None:
    assert stopped.code == 130, stopped.stderr
    assert "the same command goes on" in stopped.stderr and str(stopped.folder) in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert '"stage": "result"' not in stopped.journal


def test_the_same_command_resumes(stopped: Stopped) -> None:
    assert stopped.resumed.exit_code == 0, stopped.resumed.output
    assert (stopped.folder / "journal.jsonl").read_text().startswith(stopped.journal)


def test_the_table_says_what_was_measured(stopped: Stopped) -> None:
    result, text = shohin.load(stopped.folder), stopped.resumed.stdout
    for candidate in (result.baseline, *result.front, result.best):
        (row,) = [line for line in text.splitlines() if line.split()[:1] == [candidate.name]]
        assert ("*" in row.split()[1]) == (candidate.name == result.best.name)
        assert f"{candidate.metrics.quality.value * 100:.2f} %" in row
        assert f"{candidate.metrics.latency_ms.value:.3f} ms" in row
        assert f"{candidate.notes['latency_ratio'][0]:.3f}×" in row
    assert [r for r in result.notes["reasons"] if r not in text] == []
    assert f"report: {stopped.folder / 'report.html'}" in text and (stopped.folder / "report.html").is_file()


def test_report_again(stopped: Stopped) -> None:
    page = stopped.folder / "report.html"
    page.unlink()
    done = invoke("report", stopped.folder)
    assert done.exit_code == 0, done.output
    assert str(page) in done.stdout and page.is_file() and "baseline" in done.stdout


def test_another_model_is_refused(stopped: Stopped, tmp_path: Path) -> None:
    other = write(tmp_path, NET + "model, data = Net(24), shohin.Data(train=batches(), validation=batches())")
    before = (stopped.folder / "journal.jsonl").read_text()
    done = invoke("optimize", other, "--out", stopped.folder, *OPTIONS)
    assert done.exit_code == 2 and "another model" in done.stderr and done.stdout == ""
    assert (stopped.folder / "journal.jsonl").read_text() == before


def test_a_budget_that_cannot_be_met(stopped: Stopped, tmp_path: Path) -> None:
    out = tmp_path / "run"
    budget = ("--budget", "latency <= 0.01x, drop <= 0 %", "--methods", "quantize", "--finalists", 1)
    done = invoke("optimize", stopped.task, "--out", out, *budget)
    assert done.exit_code == 3, done.output
    assert "the budget is not met" in done.stdout and "does not keep the budget" in done.stdout
    (unmet,) = [u for u in shohin.load(out).notes["unmet"] if u.startswith("latency")]
    assert unmet in done.stdout and str(out / "report.html") in done.stdout and "baseline" in done.stdout


def test_verify(stopped: Stopped, tmp_path: Path) -> None:
    files = sorted(stopped.folder.glob("candidates/*/model.onnx"))
    for path, count in ((stopped.folder, len(files)), (files[0].parent, 1), (files[0], 1)):
        done = invoke("verify", path)
        assert done.exit_code == 0, done.output
        assert done.stdout.count(" yes ") == count and "NO" not in done.stdout

    copy = tmp_path / "copy"
    shutil.copytree(files[0].parent, copy)
    kept = read_tensors(copy / "model.parity.safetensors")
    write_tensors(copy / "model.parity.safetensors", {k: v + 1 if k.startswith("output") else v for k, v in kept.items()})
    done = invoke("verify", copy)
    assert done.exit_code == 1 and " NO " in done.stdout and "tolerance" in done.stderr

    (copy / "model.onnx").write_bytes(b"something else")
    done = invoke("verify", copy)
    assert done.exit_code == 2 and "damaged" in done.stderr
    (tmp_path / "empty").mkdir()
    assert invoke("verify", tmp_path / "empty").exit_code == invoke("verify", tmp_path / "missing").exit_code == 2


def test_folders_that_are_not_runs(stopped: Stopped, tmp_path: Path) -> None:
    done = invoke("report", tmp_path)
    assert done.exit_code == 2 and "not a run folder" in done.stderr
    done = invoke("report", stopped.folder.with_name("rum"))
    assert done.exit_code == 2 and f"did you mean '{stopped.folder}'" in done.stderr
    broken = tmp_path / "broken"
    shutil.copytree(stopped.folder, broken)
    (broken / "config.json").write_text("{")
    done = invoke("report", broken)
    assert done.exit_code == 2 and "damaged" in done.stderr


def test_quantize_writes_weights_plan_and_file(stopped: Stopped, tmp_path: Path) -> None:
    done = invoke("quantize", stopped.task, "--out", tmp_path / "q", "--layer", "stem.*=float32")
    assert done.exit_code == 0, done.output
    formats = json.loads((tmp_path / "q" / "candidate.json").read_text())["plan"]["formats"]
    assert set(formats.values()) == {"int8"} and formats and not any(a.startswith("stem") for a in formats)
    assert "size_bytes" in done.stdout and invoke("verify", tmp_path / "q").exit_code == 0

    few = ("--format", "weights uint4 group 16", "--rounding", "nearest")
    done = invoke("quantize", stopped.task, "--out", tmp_path / "few", *few)
    assert done.exit_code == 0, done.output
    formats = json.loads((tmp_path / "few" / "candidate.json").read_text())["plan"]["formats"]
    assert set(formats.values()) == {"weights uint4 group 16"} and invoke("verify", tmp_path / "few").exit_code == 0
    for option, value in (("--ranges", "largest"), ("--rounding", "up"), ("--format", "weights int3")):
        done = invoke("quantize", stopped.task, "--out", tmp_path / "q2", option, value)
        assert done.exit_code == 2 and value.removeprefix("weights ") in done.stderr and not (tmp_path / "q2").exists()

    trained = ("quantize", stopped.task, "--out", tmp_path / "t", "--format", "w4a8", "--recover", "qat", "--epochs", 1, "--learn")
    done = invoke(*trained, "steps")
    assert done.exit_code == 2 and "'lsq'" in done.stderr and not (tmp_path / "t").exists()
    done = invoke(*trained, "pact")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "t" / "candidate.json").read_text())
    assert set(found["plan"]["formats"].values()) == {"w4a8"} and found["notes"]["learn"] == "pact"
    for path in (tmp_path / "t").iterdir():
        if path.name != "training.safetensors":
            path.unlink()
    done = invoke(*trained, "pact")  # a training that is over goes on to the same result
    assert done.exit_code == 0 and json.loads((tmp_path / "t" / "candidate.json").read_text())["evidence"] == found["evidence"], done.output
    assert invoke(*trained, "pact").exit_code == 2

    done = invoke("quantize", stopped.task, "--out", tmp_path / "b", "--format", "int8,w4a8", "--budget", "size <= 90 %")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "b" / "candidate.json").read_text())["notes"]["met"]
    done = invoke("quantize", stopped.task, "--out", tmp_path / "c", "--budget", "size <= 1 b")
    assert done.exit_code == 3 and "not met: size_bytes" in done.stdout, done.output
    done = invoke("quantize", stopped.task, "--out", tmp_path / "d", "--budget", "size <= 50 %", "--layer", "stem.*=float32")
    assert done.exit_code == 2 and "--layer" in done.stderr

    done = invoke("quantize", stopped.task, "--out", tmp_path / "q")
    assert done.exit_code == 2 and "not an empty folder" in done.stderr
    done = invoke("quantize", stopped.task, "--out", tmp_path / "q2", "--layer", "nothing.*=float32")
    assert done.exit_code == 2 and "nothing.*" in done.stderr and not (tmp_path / "q2").exists()
    done = invoke("quantize", stopped.task, "--out", tmp_path / "q2", "--layer", "float32")
    assert done.exit_code == 2 and "PATTERN=FORMAT" in done.stderr


def test_prune_writes_a_smaller_model(stopped: Stopped, tmp_path: Path) -> None:
    done = invoke("prune", stopped.task, "--keep", 0.6, "--recover", "none", "--out", tmp_path / "p")
    assert done.exit_code == 0, done.output
    before = sum(p.numel() for p in load_task(stopped.task)["model"].parameters())
    assert 0 < json.loads((tmp_path / "p" / "candidate.json").read_text())["metrics"]["params"]["value"] < before
    assert read_tensors(tmp_path / "p" / "model.safetensors")["stem.0.weight"].shape[0] in (8, 16)


def test_export_and_profile(stopped: Stopped, tmp_path: Path) -> None:
    done = invoke("export", stopped.task, "--out", tmp_path / "e" / "net.onnx")
    assert done.exit_code == 0 and (tmp_path / "e" / "net.onnx").is_file(), done.output

    done = invoke("profile", stopped.task)
    assert done.exit_code == 0 and "body.0/conv2d.0" in done.stdout and "ms measured" in done.stdout, done.output


def test_distill_trains_the_student(tmp_path: Path) -> None:
    pair = write(tmp_path, NET + "student, teacher, data = Net(8), Net(), shohin.Data(train=batches(), validation=batches())", "pair.py")
    done = invoke("distill", pair, "--epochs", 1, "--out", tmp_path / "d")
    assert done.exit_code == 0, done.output
    assert read_tensors(tmp_path / "d" / "model.safetensors")["head.weight"].shape == (4, 8)
