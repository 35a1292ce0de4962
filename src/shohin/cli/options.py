"""Arguments and options that several commands share, and the checks that need no model."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shohin.errors import RunError, closest

if TYPE_CHECKING:
    from shohin.targets import Target

TaskFile = Annotated[
    Path, typer.Argument(metavar="TASK.py", help="Python file that defines `model` and `data`, or `task()`.", show_default=False)
]
TargetName = Annotated[str, typer.Option("--target", help="The runtime; `shohin targets` lists them.")]
Threads = Annotated[int, typer.Option("--threads", help="Threads of the runtime.")]
Batch = Annotated[int, typer.Option("--batch", help="Samples per run.")]
BudgetText = Annotated[str, typer.Option("--budget", metavar="TEXT", help='For example "latency <= 2 ms, size <= 300 kb, drop <= 0.5 %".')]
TimeLimit = Annotated[
    str | None, typer.Option("--time-limit", metavar="TIME", help='For example "20 min"; decides how long candidates are trained.')
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Where the results go; default a dated folder under runs/.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def the_target(name: str, threads: int, batch: int) -> Target:
    """The target with its conditions. Raises TargetError."""
    from shohin.targets import get_target

    return get_target(name, threads=threads, batch=batch)


def dated(kind: str = "") -> Path:
    """A folder under runs/ that is named after now."""
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return Path("runs") / (f"{now}-{kind}" if kind else now)


def free_folder(out: Path | None, kind: str, unfinished: str = "") -> Path:
    """The folder of a step's result. Raises RunError if it would be written over; the file ``unfinished`` may lie there."""
    folder = out if out is not None else dated(kind)
    if folder.exists() and (not folder.is_dir() or any(path.name != unfinished for path in folder.iterdir())):
        raise RunError(f"{folder} exists and is not an empty folder; give another --out")
    return folder


def run_folder(folder: Path) -> Path:
    """An existing run folder. Raises RunError if there is none, with what may have been meant."""
    if not (folder / "config.json").is_file():
        around = folder.parent.iterdir() if folder.parent.is_dir() else ()
        runs = [str(p) for p in around if (p / "config.json").is_file()]
        what = "is not a run folder (it has no config.json)" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {what}{closest(str(folder), runs)}")
    return folder
