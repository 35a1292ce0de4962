"""The commands that make, show and check runs: optimize, search, report, verify, targets, demo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli import options
from shohin.cli.guard import FAILED, UNMET, WRONG, complain, console, guarded
from shohin.cli.taskfile import checked_path, load_task
from shohin.errors import BudgetError, closest

if TYPE_CHECKING:
    from shohin.result import Result

Methods = Annotated[
    str | None, typer.Option("--methods", metavar="LIST", help="What may be chosen: prune,quantize,skip,distill; default all.")
]
Finalists = Annotated[int, typer.Option("--finalists", min=1, help="How many planned candidates are built.")]


def optimize(
    task: options.TaskFile,
    target: options.TargetName = "onnxruntime",
    budget: options.BudgetText = "",
    out: options.OutFolder = None,
    time_limit: options.TimeLimit = None,
    seed: options.Seed = 0,
    methods: Methods = None,
    finalists: Finalists = 3,
    threads: options.Threads = 1,
    batch: options.Batch = 1,
    debug: options.Debug = False,
) -> None:
    """Fit the model to a device: widths, skipped blocks and formats together, under a measured budget.

    The same command on the same folder resumes a run that was stopped. Exit code 3 if the budget cannot be met.
    """
    chosen = None if methods is None else tuple(m.strip() for m in methods.split(",") if m.strip())

    def work(model: Any, data: Any, **common: Any) -> Result:
        from shohin.pipeline import METHODS, optimize

        return optimize(model, data, methods=METHODS if chosen is None else chosen, finalists=finalists, **common)

    _job(work, task, target, budget, out, time_limit, seed, threads, batch, debug, chosen)


def search(
    task: options.TaskFile,
    target: options.TargetName = "onnxruntime",
    budget: options.BudgetText = "",
    out: options.OutFolder = None,
    time_limit: options.TimeLimit = None,
    seed: options.Seed = 0,
    threads: options.Threads = 1,
    batch: options.Batch = 1,
    debug: options.Debug = False,
) -> None:
    """Architecture search alone: the best structure for the target under a budget. Exit code 3 if it cannot be met."""

    def work(model: Any, data: Any, **common: Any) -> Result:
        from shohin.verbs import search

        return search(model, data, **common)

    _job(work, task, target, budget, out, time_limit, seed, threads, batch, debug)


def _job(
    work: Callable[..., Result],
    task: Path,
    target: str,
    budget: str,
    out: Path | None,
    time_limit: str | None,
    seed: int,
    threads: int,
    batch: int,
    debug: bool,
    methods: tuple[str, ...] | None = None,
) -> None:
    """What can be wrong in the options is found before the task file is run, for that may train for an hour."""
    folder = out if out is not None else options.dated()
    with guarded(debug, task, folder, "" if out is not None else f"--out {folder}"):
        checked_path(task)
        from shohin.budget import Budget
        from shohin.pipeline import parse_time

        wanted, seconds, goal = Budget.parse(budget), parse_time(time_limit), options.the_target(target, threads, batch)
        if methods is not None:
            _check_methods(methods)
        values = load_task(task, seed)
        result = work(values["model"], values["data"], target=goal, budget=wanted, out=folder, time_limit=seconds, seed=seed)
        show(result)
    if not result.met:
        raise typer.Exit(UNMET)


def _check_methods(methods: tuple[str, ...]) -> None:
    from shohin.pipeline import METHODS

    for name in methods:
        if name not in METHODS:
            raise BudgetError(f"unknown method {name!r} in --methods; known: {', '.join(METHODS)}{closest(name, METHODS)}")
    if not methods:
        raise BudgetError(f"--methods is empty; known: {', '.join(METHODS)}")


def show(result: Result, page: Path | None = None) -> None:
    """Prints table, reasons and the path of the report."""
    from shohin.cli import tables

    screen = console()
    screen.print(tables.front(result))
    unmet = [str(u) for u in result.notes.get("unmet") or ()]
    for reason in result.notes.get("reasons") or ():
        if reason not in unmet:
            screen.print(f"- {reason}", soft_wrap=True)
    if unmet:
        screen.print("the budget is not met:", style="bold", soft_wrap=True)
    for sentence in unmet:
        screen.print(f"- {sentence}", soft_wrap=True)
    if result.best.artifact is not None:
        screen.print(f"file: {result.best.artifact}", soft_wrap=True)
    screen.print(f"report: {page or result.folder / 'report.html'}", soft_wrap=True)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)], debug: options.Debug = False
) -> None:
    """Write the HTML report of a finished or interrupted run again, and show its table."""
    with guarded(debug):
        options.run_folder(folder)
        from shohin.pipeline import load

        result = load(folder)
        show(result, result.report())


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run folder, a candidate's folder, or a file.", show_default=False)],
    debug: options.Debug = False,
) -> None:
    """Repeat the parity checks of a run, a candidate or a file on this machine. Exit code 1 if one fails."""
    with guarded(debug):
        from shohin.cli import tables
        from shohin.verbs import verify

        found = verify(path)
        files = found.get("files")
        console().print(tables.checks(files if isinstance(files, Mapping) and files else found))
    if not found["passes"]:
        complain("what the file gives here differs by more than the tolerance from what it was exported from; see NO above")
        raise typer.Exit(FAILED)


def targets(debug: options.Debug = False) -> None:
    """List the runtimes, and which can be used here."""
    with guarded(debug):
        from shohin.cli import tables
        from shohin.targets import list_targets

        console().print(tables.targets(list_targets()))


def demo(debug: options.Debug = False) -> None:
    """Run the example of the repository (for a clone; `make demo` also installs what it needs)."""
    example = Path("examples") / "smartwatch.py"
    if not example.is_file():
        complain(
            f"{example} is not here: the demo is in the repository, not in the installed package. "
            "Clone the repository and run `make demo` there, or this command from its folder"
        )
        raise typer.Exit(WRONG)
    with guarded(debug):
        done = subprocess.run([sys.executable, str(example)])
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode  # negative: the signal that ended it
    raise typer.Exit(code)
