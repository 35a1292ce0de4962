"""`shohin prune`: every option of the verb, its errors as they are, and what is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tasks import NET, TASK, invoke, write
from typer.main import get_command

import shohin
from shohin.cli import app
from shohin.cli.taskfile import load_task
from shohin.pipeline.units import ALLOCATIONS
from shohin.pruning import sparse
from shohin.pruning.criteria import CRITERIA
from shohin.pruning.criteria.blocks import BLOCK_CRITERIA
from shohin.pruning.normalization import WAYS
from shohin.verbs.pruning import RECOVERIES, UNITS

SEEDED = NET + "\ntorch.manual_seed(0)\nmodel = Net()\ndata = shohin.Data(train=batches(), validation=batches())\n"
CHOICES = {
    "--criterion": (*CRITERIA, *BLOCK_CRITERIA, *sparse.CRITERIA),
    "--granularity": (*UNITS, "unstructured", "2:4", "block 1x8"),
    "--allocation": (*ALLOCATIONS, *sparse.ALLOCATIONS),
    "--normalization": tuple(WAYS),
    "--recover": tuple(name for name in RECOVERIES if name),
}


@pytest.mark.parametrize("option", CHOICES)
def test_help_names_every_choice(option: str) -> None:
    command: Any = get_command(app)
    (found,) = [p for p in command.commands["prune"].params if option in p.opts]
    words = found.help.replace(",", " ").replace(";", " ").replace("'", " ").replace(".", " ")
    assert [name for name in CHOICES[option] if f" {name} " not in f" {words} "] == []


def plan_of(folder: Path) -> dict[str, Any]:
    """What the command wrote."""
    plan: dict[str, Any] = json.loads((folder / "candidate.json").read_text())["plan"]
    return plan


def test_zeros_are_written_packed_beside_a_file_that_verifies(tmp_path: Path) -> None:
    task, out = write(tmp_path, SEEDED), tmp_path / "sparse"
    done = invoke("prune", task, "--granularity", "2:4", "--criterion", "magnitude", "--recover", "none", "--out", out)
    assert done.exit_code == 0, done.output
    assert plan_of(out)["sparsity"] == {"body.0.weight": "2:4", "head.weight": "2:4"}
    model = load_task(task)["model"]
    values = sparse.read(out / "weights.safetensors")
    model.load_state_dict(values)
    assert set(sparse.masks_of(model, {"body.0.weight": "2:4", "head.weight": "2:4"})) == {"body.0.weight", "head.weight"}
    size = (out / "weights.safetensors").stat().st_size
    assert (
        f"{size} bytes" in done.stdout and size < 4 * sum(v.numel() for v in values.values()) and not (out / "model.safetensors").exists()
    )
    assert invoke("verify", out).exit_code == 0


OPTIONS: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "allocation and normalization": (
        ("--allocation", "global", "--normalization", "mean", "--criterion", "magnitude_l1", "--align", 2, "--keep", 0.6),
        {"allocation": "global", "normalization": "mean", "criterion": "magnitude_l1", "align": 2, "keep": 0.6},
    ),
    "several granularities": (
        ("--granularity", "channel, depth", "--align", 4, "--samples", 16),
        {"granularity": ("channel", "depth"), "align": 4, "samples": 16},
    ),
    "depth": (("--granularity", "depth", "--criterion", "cosine"), {"granularity": "depth", "criterion": "cosine"}),
    "parameters": (("--of", "params", "--criterion", "obs", "--samples", 16), {"of": "params", "criterion": "obs", "samples": 16}),
}


@pytest.mark.parametrize(("given", "arguments"), OPTIONS.values(), ids=OPTIONS)
def test_options_reach_the_verb(tmp_path: Path, given: tuple[object, ...], arguments: dict[str, Any]) -> None:
    task = write(tmp_path, SEEDED)
    done = invoke("prune", task, "--recover", "none", "--out", tmp_path / "p", *given)
    assert done.exit_code == 0, done.output
    values = load_task(task)
    wanted = shohin.prune(values["model"], values["data"], recover=None, **arguments)
    assert plan_of(tmp_path / "p") == wanted.plan.to_json() and not wanted.plan.is_identity


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--criterion", "tailor"), ["tailor", "did you mean 'taylor'"]),
        (("--granularity", "filter"), ["filter", "'neuron'"]),
        (("--granularity", "head"), ["no head", "channel"]),
        (("--granularity", "2:4", "--keep", 0.3), ["2:4", "contradicts"]),
        (("--granularity", "unstructured", "--criterion", "obd"), ["obd", "sparsegpt"]),
        (("--normalization", "mean"), ["normalization", "global"]),
        (("--keep", 0.5, "--budget", "latency <= 50 %"), ["keep", "not both"]),
        (("--budget", "latency <= 50 %", "--criterion", "obs"), ["budget", "criterion"]),
    ],
)
def test_errors_of_the_verb_come_through(tmp_path: Path, given: tuple[object, ...], words: list[str]) -> None:
    done = invoke("prune", write(tmp_path, SEEDED), "--out", tmp_path / "p", *given)
    assert done.exit_code == 2 and done.stderr.startswith("error:"), done.output
    assert [w for w in words if w not in done.stderr] == [], done.stderr
    assert not (tmp_path / "p").exists()


def test_a_wrong_budget_is_found_before_the_task_file_is_run(tmp_path: Path) -> None:
    task = write(tmp_path, "open(__file__ + '.ran', 'w')\n" + TASK)
    done = invoke("prune", task, "--budget", "latensy <= 50 %", "--out", tmp_path / "p")
    assert done.exit_code == 2 and "did you mean 'latency'" in done.stderr
    assert not Path(f"{task}.ran").exists() and not (tmp_path / "p").exists()


@pytest.fixture
def budgeted(tmp_path: Path) -> Callable[..., Any]:
    """The command with a budget on a small network."""
    task = write(tmp_path, SEEDED.replace("Net()", "Net(48)"))
    return lambda budget: invoke("prune", task, "--budget", budget, "--out", tmp_path / "run")


def test_a_budget_makes_a_run_that_the_same_command_finds_again(tmp_path: Path, budgeted: Callable[..., Any]) -> None:
    done = budgeted("size <= 70 %")
    assert done.exit_code == 0, done.output
    best = shohin.load(tmp_path / "run").best
    assert best.plan.widths and not best.plan.formats
    assert best.artifact.stat().st_size <= 0.7 * shohin.load(tmp_path / "run").baseline.artifact.stat().st_size
    assert f"file: {best.artifact}" in done.stdout
    journal = (tmp_path / "run" / "journal.jsonl").read_text()
    assert budgeted("size <= 70 %").exit_code == 0
    assert (tmp_path / "run" / "journal.jsonl").read_text() == journal


def test_a_budget_that_cannot_be_met_ends_with_three(budgeted: Callable[..., Any]) -> None:
    done = budgeted("size <= 0.1 %")
    assert done.exit_code == 3 and "the budget is not met" in done.stdout, done.output
