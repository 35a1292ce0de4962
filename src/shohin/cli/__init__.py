"""The command ``shohin``: the verbs of the library on a task file. torch and the runtimes are imported by the commands that need them."""

from __future__ import annotations

from typing import Annotated

import typer

from shohin.cli import jobs, steps

app = typer.Typer(
    name="shohin",
    help="Makes a PyTorch model fit the device it must run on. A task file is a Python file that defines `model` and `data`, "
    "or a function `task()` that returns both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from shohin import __version__

        typer.echo(f"shohin {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of the command itself."""


for _command in (
    jobs.optimize,
    steps.profile,
    steps.prune,
    steps.quantize,
    steps.distill,
    jobs.search,
    steps.export,
    jobs.verify,
    jobs.report,
    jobs.targets,
    jobs.demo,
):
    app.command()(_command)


def main() -> None:
    """The entry point."""
    app(prog_name="shohin")


__all__ = ["app", "main"]
