"""Task files that are right, and what is said of those that are not."""

import sys
from pathlib import Path

import pytest
import torch
from cli_tasks import NET, TASK, write
from torch import nn

from shohin.cli.taskfile import PAIR, TaskError, load_task
from shohin.data import Data


@pytest.fixture(autouse=True)
def _own_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's folder is put on the search path; its files must not stand before packages in what runs later."""
    monkeypatch.setattr(sys, "path", list(sys.path))


DATA = "shohin.Data(train=batches(), validation=batches())"
RIGHT = {
    "names": TASK,
    "function": NET + f"def task():\n    return Net(), {DATA}",
    "function with a seed": NET + f"def task(seed=0, cache=None):\n    torch.manual_seed(seed)\n    return Net(), {DATA}",
    "needed seed": NET + f"def task(seed):\n    torch.manual_seed(seed)\n    return Net(), {DATA}",
    "list": NET + f"def task():\n    return [Net(), {DATA}]",
    "dict": NET + f"def task():\n    return dict(data={DATA}, model=Net(), more=1)",
    "both": TASK + "def task():\n    raise RuntimeError('not needed')",
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_right_files(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    values = load_task(path, seed=3)
    assert list(values) == ["model", "data"]
    assert isinstance(values["model"], nn.Module) and isinstance(values["data"], Data)
    # a model that is built without a seed of its own is the same one the next time, so that a run can be resumed
    again = load_task(path, seed=3)["model"].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in values["model"].state_dict().items())
    other = load_task(path, seed=4)["model"].state_dict()
    assert not torch.equal(other["head.weight"], again["head.weight"])


@pytest.mark.parametrize("text", [f"student, teacher, data = Net(8), Net(), {DATA}", f"def task():\n    return Net(8), Net(), {DATA}"])
def test_distillation_needs_three(tmp_path: Path, text: str) -> None:
    values = load_task(write(tmp_path, NET + text), names=PAIR)
    assert [v.head.in_features for v in (values["student"], values["teacher"])] == [8, 16]


def test_the_file_runs_once_under_a_name_of_its_own_and_sees_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "def width():\n    return 8\n", "neighbour_of_a_task.py")
    text = TASK + "from neighbour_of_a_task import width\nmodel = Net(width())\nopen(__file__ + '.ran', 'a').write(__name__ + '\\n')\n"
    path = write(tmp_path, text + "if __name__ == '__main__':\n    raise RuntimeError\n", "my task-1.py")
    assert load_task(path)["model"].head.in_features == 8
    (name,) = Path(f"{path}.ran").read_text().splitlines()
    assert name in sys.modules and sys.modules[name].__file__ == str(path.resolve())
    assert type(sys.modules[name].model).__module__ == name


WRONG = {
    "no model": ("net = 1\n" + NET + f"data = {DATA}", ["'model'", "data (Data)", "task()"]),
    "other name": (NET + f"network = Net()\ndata = {DATA}", ["'model'", "did you mean 'network'", "model = network"]),
    "no data": (NET + "model = Net()\nloader = batches()", ["'data'", "loader (list)"]),
    "other data": (NET + f"model = Net()\nbatches_of_mine = {DATA}", ["'data'", "did you mean 'batches_of_mine'"]),
    "other function": (NET + "def tasks():\n    return 1", ["'model'", "did you mean 'tasks'"]),
    "empty": ("", ["'model'", "found: nothing"]),
    "class": (NET + f"model = Net\ndata = {DATA}", ["the class Net", "model = Net(...)"]),
    "not a module": (NET + f"model = Net().state_dict()\ndata = {DATA}", ["'model'", "OrderedDict", "torch.nn.Module"]),
    "not data": (NET + "model = Net()\ndata = batches()", ["'data'", "of type list", "shohin.Data(train=loader"]),
    "returns one": (NET + "def task():\n    return Net()", ["task()", "of type Net", "model, data"]),
    "returns None": (NET + "def task():\n    Net()", ["task()", "returned None"]),
    "returns three": (NET + "def task():\n    return 1, 2, 3", ["tuple of 3 values", "model, data"]),
    "returns less": (NET + "def task():\n    return {'model': Net()}", ["without 'data'", "'model'"]),
    "wrong order": (NET + f"def task():\n    return {DATA}, Net()", ["'model'", "of type Data"]),
    "needs more": (NET + "def task(width):\n    return 1", ["needs width", "seed"]),
    "syntax": (NET + "model = = 1\n", ["job.py", f"line {NET.count(chr(10)) + 1}", "model = = 1"]),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_wrong_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TaskError) as error:
        load_task(path)
    said = str(error.value)
    assert [w for w in ("job.py", *words) if w not in said] == [], said


def test_what_the_user_raises_comes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        load_task(write(tmp_path, "1 / 0"))


def test_wrong_paths(tmp_path: Path) -> None:
    write(tmp_path, TASK, "watch.py")
    write(tmp_path, TASK, "watch.txt")
    write(tmp_path, TASK, "onnx.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00x = 1")
    for name, words in {
        "wach.py": "did you mean",
        "watch.txt": "not a Python file",
        "": "is a folder",
        "nowhere/watch.py": "does not exist",
        "onnx.py": "rename it",
        "binary.py": "binary.py",
    }.items():
        with pytest.raises(TaskError, match=words):
            load_task(tmp_path / name)
