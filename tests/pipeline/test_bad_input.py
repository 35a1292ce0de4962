"""Bad input through the main job: what is wrong, where, and what to do, before anything long, and nothing lost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline_task as task
import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.data import Data
from shohin.errors import BudgetError, DataError, ModelError, RunError, ShohinError, TargetError
from shohin.run import Run

if TYPE_CHECKING:
    from conftest import Finished

G = torch.Generator().manual_seed(4)
X, Y = torch.randn(16, task.CHANNELS, task.LENGTH, generator=G), torch.arange(16) % task.CLASSES
BAD = X.clone()
BAD[3, 2, 5] = float("nan")


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(1)
    return task.Watch(width, 0).eval()


def with_nan(name: str) -> nn.Module:
    model = net()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[1] = float("nan")
    return model


def raises(run: Any) -> float:
    return float(run(X).sum()) / 0


def good(**others: Any) -> Data:
    return Data([(X, Y)] * 2, [(X, Y)], **others)


class Moody(nn.Module):
    """Does not run in one of two modes of its input."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


CASES: dict[str, tuple[nn.Module, Data, dict[str, Any], type[ShohinError], str]] = {
    "example": (net(), good(example=(X[:, :3],)), {}, ModelError, "does not run on the example"),
    "train shape": (net(), Data([(X[:, :3], Y)], [(X, Y)]), {}, ModelError, r"does not run on the example \(tensor \(16, 3, 64\)"),
    "broken model": (Moody(), good(), {}, ModelError, "RuntimeError: not today"),
    "validation shape": (net(), Data([(X, Y)], [(X[:, :3], Y)]), {}, DataError, "does not run on the first validation batch"),
    "later train shape": (net(), Data([(X, Y), (X[..., :32], Y)], [(X, Y)]), {}, DataError, r"\(16, 4, 32\).*only the batch may differ"),
    "later validation shape": (
        net(),
        Data([(X, Y)], [(X, Y), (X[:, :3], Y)]),
        {},
        DataError,
        r"on a validation batch \(shapes \[\(16, 3, 64\)\]",
    ),
    "batch form": (net(), Data([(X, Y, Y)], [(X, Y)]), {}, DataError, r"a batch must be x, \(x, y\) or a dict.*length 3"),
    "no batches": (net(), Data(example=(X,)), {}, DataError, r"needs batches: give Data\(train=loader"),
    "empty train": (net(), Data([], [(X, Y)]), {}, DataError, "the train loader is empty.*give a list or a DataLoader"),
    "empty validation": (net(), Data([(X, Y)], []), {}, DataError, "the validation loader is empty"),
    "nan weight": (with_nan("stem.weight"), good(), {}, ModelError, "'stem.weight' holds 1 NaN"),
    "nan buffer": (with_nan("norm.running_var"), good(), {}, ModelError, "'norm.running_var' holds 1 NaN"),
    "nan data": (net(), Data([(BAD, Y)], [(X, Y)]), {}, DataError, "the inputs of the first train batch hold NaN"),
    "later nan data": (net(), Data([(X, Y), (BAD, Y)], [(X, Y)]), {}, DataError, "the inputs of a train batch hold NaN"),
    "later nan validation": (net(), Data([(X, Y)], [(X, Y), (BAD, Y)]), {}, DataError, "outputs on the validation batches hold NaN"),
    "nan metric": (net(), good(metric=lambda run: float("nan")), {}, DataError, "the metric returned nan; it must be a finite number"),
    "metric raises": (net(), good(metric=raises), {}, DataError, r"the metric raised ZeroDivisionError.*test_bad_input.py:\d+"),
    "metric of nothing": (net(), good(metric=lambda run: None), {}, DataError, "the metric raised TypeError.*returns a number"),
    "loss raises": (net(), good(loss=lambda out, batch: out[99]), {}, DataError, r"the loss raised IndexError.*loss\(outputs, batch\)"),
    "nan loss": (net(), good(loss=lambda out, batch: out.sum() * float("nan")), {}, DataError, "the loss of the first train batch is nan"),
    "no labels": (net(), Data([X], [X]), {}, DataError, r"accuracy and needs integer targets; give Data\(metric="),
    "banana": (net(), good(), {"budget": "latency <= banana"}, BudgetError, "'banana' is not a number with a unit, for example"),
    "contradiction": (net(), good(), {"budget": "latency <= 2 ms, latency <= 3 ms"}, BudgetError, "bounds latency twice"),
    "energy": (net(), good(), {"budget": "energy <= 2 mj"}, BudgetError, "does not measure energy"),
    "not a model": ("net", good(), {}, ModelError, "a model is a torch.nn.Module, not str"),  # type: ignore[dict-item]
    "not data": (net(), [(X, Y)], {}, DataError, r"must be a shohin.Data, not list: write shohin.Data\(train="),  # type: ignore[dict-item]
    "finalists": (net(), good(), {"finalists": 0}, BudgetError, "finalists must be at least 1"),
    "no time": (net(), good(), {"time_limit": -3}, BudgetError, "cannot read the time limit -3"),
    "time": (net(), good(), {"time_limit": "soon"}, BudgetError, "cannot read the time limit 'soon'"),
    "method": (net(), good(), {"methods": ("prune", "magic")}, BudgetError, "unknown method 'magic'; known: prune"),
    "target": (net(), good(), {"target": "onnxruntim"}, TargetError, "unknown target 'onnxruntim'.*did you mean 'onnxruntime'"),
    "target not installed": (
        net(),
        good(),
        {"target": "executorch"},
        TargetError,
        r"not installed; install it with: pip install 'shohin\[",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_come_at_once_and_say_what_to_do(case: str, cache: Path, tmp_path: Path) -> None:
    model, data, options, kind, said = CASES[case]
    began = time.monotonic()
    with pytest.raises(kind, match=said) as error:
        shohin.optimize(model, data, out=tmp_path / "run", progress=False, **options)
    assert type(error.value) is kind and time.monotonic() - began < 30
    if (tmp_path / "run").exists():
        assert not {e["stage"] for e in Run(tmp_path / "run").entries} & {"profile", "tables", "plan"}


def again(finished: Finished, out: Path, **changed: Any) -> Any:
    asked = {"budget": "latency <= 80 %, drop <= 0.05", "seed": 3, "finalists": 2, **changed}
    model = asked.pop("model", finished.model)
    return shohin.optimize(model, finished.data, out=out, progress=False, **asked)


def test_a_folder_is_kept_for_its_own_job(finished: Finished) -> None:
    out, before = finished.result.folder, sorted(p.name for p in finished.result.folder.rglob("*"))
    for changed, said in (
        ({"model": task.trained(40, 2, 0)}, "another fingerprint: it belongs to another model"),
        ({"model": task.trained(48, 2, 1)}, "another weights: it belongs to another model"),
        ({"seed": 4}, "another seed: to change it, use another folder"),
        ({"budget": "latency <= 1 ms"}, "another asked"),
        ({"methods": ("prune",)}, "another methods"),
    ):
        with pytest.raises(RunError, match=said):
            again(finished, out, **changed)
    assert sorted(p.name for p in out.rglob("*")) == before


def test_a_damaged_candidate_is_named_and_can_be_built_again(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished.result.folder, out)
    best = finished.result.best
    weights = out / "candidates" / best.name / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 16
    weights.write_bytes(content)
    for attempt in (lambda: shohin.load(out), lambda: again(finished, out)):
        with pytest.raises(RunError, match=rf"{best.name}/model\.safetensors is damaged .*delete the folder"):
            attempt()
    shutil.rmtree(weights.parent)
    shutil.rmtree(out / "work")  # caches may always be deleted
    rebuilt = again(finished, out).candidates[best.name]
    assert rebuilt.plan == best.plan and rebuilt.artifact.read_bytes() == best.artifact.read_bytes()  # type: ignore[union-attr]
    assert rebuilt.metrics.values()["quality"] == best.metrics.values()["quality"]


@pytest.mark.parametrize(
    ("content", "said"), [("{", "damaged"), ("{}", "damaged"), ('{"checksums": {"../../config.json": "0"}}', "outside its folder")]
)
def test_a_candidate_file_that_is_no_candidate(finished: Finished, tmp_path: Path, content: str, said: str) -> None:
    shutil.copytree(finished.result.folder, tmp_path / "copy")
    (tmp_path / "copy" / "candidates" / "baseline" / "candidate.json").write_text(content)
    with pytest.raises(RunError, match=said):
        shohin.load(tmp_path / "copy")
