"""What is said when something is wrong, and with which exit code."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli_tasks import NET, TASK, invoke, run, write

import shohin
from shohin.cli import app

COMMANDS = ["optimize", "profile", "prune", "quantize", "distill", "search", "export", "verify", "report", "targets", "demo"]


def test_help_names_every_command() -> None:
    done = invoke("--help")
    assert done.exit_code == 0 and [c for c in COMMANDS if f" {c} " not in done.stdout] == []
    assert [c.callback.__name__ for c in app.registered_commands] == COMMANDS
    for command in COMMANDS:
        done = invoke(command, "--help")
        assert done.exit_code == 0 and "--debug" in done.stdout


def test_help_does_not_import_torch_and_is_fast() -> None:
    code = (
        "import time; t = time.process_time(); import sys; from shohin.cli import app\n"
        "app(['--help'], standalone_mode=False); print(time.process_time() - t, 'torch' in sys.modules, 'onnx' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        time, *heavy = done.stdout.splitlines()[-1].split()
        assert heavy == ["False", "False"]
        seconds.append(float(time))
    assert min(seconds) < 0.6


def test_version_and_targets() -> None:
    assert invoke("--version").stdout.strip() == f"shohin {shohin.__version__}"
    done = invoke("targets")
    assert done.exit_code == 0
    (row,) = [line for line in done.stdout.splitlines() if "onnxruntime" in line]
    assert " yes " in row
    assert "executorch" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "latency <= banana"), ["banana", "number"]),
        (("--budget", "latensy <= 2 ms"), ["latensy", "did you mean 'latency'"]),
        (("--budget", "latency <= 2 ms, latency <= 3 ms"), ["twice"]),
        (("--target", "onnxruntim"), ["onnxruntim", "did you mean 'onnxruntime'"]),
        (("--threads", 0), ["threads", "at least 1"]),
        (("--time-limit", "soon"), ["soon", "20 min"]),
        (("--methods", "prune,quantise"), ["quantise", "did you mean 'quantize'"]),
        (("--methods", ","), ["--methods"]),
    ],
)
def test_wrong_options_are_found_before_the_task_file_is_run(tmp_path: Path, options: tuple[object, ...], words: list[str]) -> None:
    path = write(tmp_path, "open(__file__ + '.ran', 'w')\n" + TASK)
    done = invoke("optimize", path, "--out", tmp_path / "run", *options)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("error:") and [w for w in words if w not in done.stderr] == [], done.stderr
    assert not Path(f"{path}.ran").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["optimize", "profile", "prune", "quantize", "distill", "search", "export"])
def test_every_verb_says_what_a_task_file_lacks(tmp_path: Path, command: str) -> None:
    done = invoke(command, write(tmp_path, "network = 1"), *(() if command == "profile" else ("--out", tmp_path / "out")))
    assert done.exit_code == 2 and ("'student'" if command == "distill" else "'model'") in done.stderr
    assert not (tmp_path / "out").exists()


USERS = {
    "at import": (TASK + "wrong = 1 / 0  # here", "ZeroDivisionError"),
    "in task()": (NET + "def task():\n    return {}['width']  # here", "KeyError: 'width'"),
    "in the metric": (
        TASK + "def metric(run):\n    raise ValueError('no such class')  # here\ndata.metric = metric",
        "ValueError: no such class",
    ),
    "in forward": (
        NET
        + "class Broken(Net):\n    def forward(self, x):\n        return self.head(x)  # here\n"
        + "model, data = Broken(), shohin.Data(train=batches())",
        "mat1 and mat2",
    ),
    "an import": ("import a_library_that_is_not_there  # here", "a_library_that_is_not_there"),
    "in generated code": (TASK + "exec('1 / 0')  # here", "ZeroDivisionError"),
    "sys.exit": (TASK + "raise SystemExit('first download the photos')  # here", "first download the photos"),
    "sys.exit(0)": (TASK + "raise SystemExit(0)  # here", "ended the program"),
    "wrong data": (NET + "model = Net()\ndata = shohin.Data()  # here", "Data needs batches"),
}


@pytest.mark.parametrize(("text", "words"), USERS.values(), ids=USERS)
def test_errors_of_the_users_code_name_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    (number,) = [i for i, line in enumerate(text.splitlines(), 1) if "# here" in line]
    done = invoke("optimize", path, "--out", tmp_path / "run")
    assert done.exit_code == 2, done.output
    assert words in done.stderr and f"{path}, line {number}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["at import", "in task()", "sys.exit", "wrong data"])
def test_debug_shows_the_traceback_too(tmp_path: Path, name: str) -> None:
    text, words = USERS[name]
    done = invoke("optimize", write(tmp_path, text), "--out", tmp_path / "run", "--debug")
    assert done.exit_code == 2 and "Traceback" in done.stderr and words in done.stderr


def test_an_error_inside_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the only way to see the message of a defect is to make one
    monkeypatch.setattr("shohin.targets.list_targets", lambda: 1 / 0)
    done = invoke("targets")
    assert done.exit_code == 70 and "unexpected error inside Shohin: ZeroDivisionError" in done.stderr


def test_real_processes(tmp_path: Path) -> None:
    done = run("optimize", tmp_path / "nothing.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: the task file {tmp_path / 'nothing.py'} does not exist\n"
    done = run("optimize", "--no-such-option")
    assert done.returncode == 2 and "--no-such-option" in done.stderr
    done = run("export", write(tmp_path, "x = [1, 2\n"))
    assert done.returncode == 2 and "never closed" in done.stderr and "Traceback" not in done.stderr


def test_demo_is_of_the_repository(tmp_path: Path) -> None:
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 2 and "make demo" in done.stderr
    (tmp_path / "examples").mkdir()
    write(tmp_path / "examples", "print('the example ran'); raise SystemExit(5)", "smartwatch.py")
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 5 and done.stdout == "the example ran\n"
