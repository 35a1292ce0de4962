"""From exceptions to words and exit codes.

========  =====================================================================================
0         done, and the budget is met
1         ``shohin verify``: something does not pass
2         wrong use, an error that Shohin explains, or an exception of the user's own code
3         the budget cannot be met
70        an unexpected error inside Shohin (``EX_SOFTWARE``)
130       stopped by Ctrl-C
========  =====================================================================================
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from shohin.errors import ShohinError

if TYPE_CHECKING:
    from rich.console import Console

FAILED, WRONG, UNMET, BUG, STOPPED = 1, 2, 3, 70, 130
_HERE = Path(__file__).resolve().parents[1]


def console(stderr: bool = False) -> Console:
    """Where to write. A pipe gets lines that are wide enough for the tables."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else 160)


def complain(text: str) -> None:
    """An error on stderr."""
    out = console(stderr=True)
    out.print("error:", style="bold red", end=" ", soft_wrap=True)
    out.print(text, soft_wrap=True)


@contextmanager
def guarded(debug: bool, task: Path | None = None, run: Path | None = None, resume: str = "") -> Iterator[None]:
    """Runs a command's body; what it raises becomes a message and an exit code.

    Args:
        debug: print the traceback too.
        task: the task file: frames in its folder are the user's own code.
        run: the folder that a stopped job can be resumed from, or None if there is nothing to resume.
        resume: what must be added to the command to go on in that folder.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _stopped(run, resume)
        raise typer.Exit(STOPPED) from None
    except (Exception, SystemExit) as error:
        if debug:
            traceback.print_exc()
        where = user_line(error, task)
        if isinstance(error, ShohinError):
            complain(f"{error}{where}")
        elif isinstance(error, SystemExit):  # in the user's code: sys.exit("what is wrong"), or a script that ends itself
            said = isinstance(error.code, str)
            complain(f"{error.code if said else f'the task file ended the program: sys.exit({error.code})'}{where}")
        elif where:
            complain(f"{_named(error)}{where}" + ("" if debug else "\n  --debug shows the traceback"))
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            hint = "" if debug else "; --debug shows the traceback"
            complain(f"unexpected error inside Shohin: {_named(error)}\n  in {frame.filename}, line {frame.lineno}{hint}")
            raise typer.Exit(BUG) from None
        raise typer.Exit(WRONG) from None


def user_line(error: BaseException, task: Path | None) -> str:
    """Where in the user's own code an exception, or what caused it, was raised; empty if it was not there."""
    if task is None:
        return ""
    folder = task.resolve().parent
    seen: BaseException | None = error
    found = None
    while seen is not None:
        for frame in traceback.extract_tb(seen.__traceback__):
            if frame.filename.startswith("<"):  # generated code has no file; its name would count as one in the working folder
                continue
            file = Path(frame.filename).resolve()
            if file.is_relative_to(folder) and not file.is_relative_to(_HERE) and "site-packages" not in file.parts:
                found = frame
        seen = seen.__cause__
    if found is None:
        return ""
    code = f": {found.line}" if found.line else ""
    return f"\n  in {found.filename}, line {found.lineno}, in {found.name}{code}"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _stopped(run: Path | None, resume: str) -> None:
    from shohin.run import CHECKPOINT

    out = console(stderr=True)
    if run is None:
        out.print("stopped.", soft_wrap=True)
    elif not any((run / name).exists() for name in ("config.json", CHECKPOINT)):
        out.print("stopped before anything was written; nothing is lost.", soft_wrap=True)
    else:
        again = f"the same command with {resume}" if resume else "the same command"
        out.print(f"stopped. What was finished is in {run}; {again} goes on from there.", soft_wrap=True)
