"""The commands that do one step: profile, prune, quantize, distill, export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli import options
from shohin.cli.guard import console, guarded
from shohin.cli.taskfile import PAIR, checked_path, load_task
from shohin.errors import PlanError

if TYPE_CHECKING:
    from shohin.candidate import Candidate
    from shohin.data import Data
    from shohin.targets import Target

Keep = Annotated[float, typer.Option("--keep", help="Share that is left, in (0, 1].")]
Of = Annotated[str, typer.Option("--of", help="Of what: macs or params.")]
Criterion = Annotated[str, typer.Option("--criterion", help="taylor (needs batches) or magnitude.")]
Granularity = Annotated[str, typer.Option("--granularity", help="What is removed at a time: channel (or head, neuron).")]
Recover = Annotated[str, typer.Option("--recover", help="auto, none, compensate, or distill.")]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training batches.")]
Format = Annotated[str, typer.Option("--format", help="Of every layer: int8 or float32.")]
Layer = Annotated[
    list[str] | None, typer.Option("--layer", metavar="PATTERN=FORMAT", help="Format of some layers by address; may be repeated.")
]
Losses = Annotated[str | None, typer.Option("--losses", metavar="NAME", help="kd, dkd, dist or mse; default kd.")]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also draw the model, its groups coloured, as one HTML page.")
]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")]


def profile(
    task: options.TaskFile,
    target: options.TargetName = "onnxruntime",
    seed: options.Seed = 0,
    threads: options.Threads = 1,
    batch: options.Batch = 1,
    html: HtmlFile = None,
    debug: options.Debug = False,
) -> None:
    """Show where MACs, bytes and measured milliseconds go, layer by layer; what can be chosen, and what is frozen and why."""
    with guarded(debug, task):
        checked_path(task)
        goal = options.the_target(target, threads, batch)
        values = load_task(task, seed)
        from shohin.report.profile_text import profile_parts
        from shohin.verbs import profile

        found = profile(values["model"], values["data"], goal, seed=seed)
        screen = console()
        for part in profile_parts(found):
            screen.print(part)
        if html is not None:
            from shohin.graph.html import to_html
            from shohin.run import write_atomic

            html.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(html, to_html(found.graph, task.stem).encode())
            screen.print(f"written: {html}", soft_wrap=True)


def prune(
    task: options.TaskFile,
    keep: Keep = 0.5,
    of: Of = "macs",
    criterion: Criterion = "taylor",
    granularity: Granularity = "channel",
    recover: Recover = "auto",
    epochs: Epochs = 5,
    target: options.TargetName = "onnxruntime",
    out: options.OutFolder = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Remove channels, heads and neurons until a share of the model is left; write the smaller model and its file."""
    with guarded(debug, task):
        checked_path(task)
        goal, folder = options.the_target(target, 1, 1), options.free_folder(out, "prune")
        values = load_task(task, seed)
        from shohin.verbs import prune

        how = None if recover.lower() == "none" else recover
        made = prune(values["model"], values["data"], keep, of, criterion, granularity, how, epochs=epochs, seed=seed)
        _deliver(made, values["data"], goal, folder)


def quantize(
    task: options.TaskFile,
    format: Format = "int8",
    layer: Layer = None,
    target: options.TargetName = "onnxruntime",
    out: options.OutFolder = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Give weights and activations fewer bits; write the snapped weights and the file."""
    with guarded(debug, task):
        checked_path(task)
        goal, folder = options.the_target(target, 1, 1), options.free_folder(out, "quantize")
        formats = _formats(format, layer)
        values = load_task(task, seed)
        from shohin.verbs import quantize

        made = quantize(values["model"], values["data"], formats, goal, seed=seed)
        _deliver(made, values["data"], goal, folder)


def _formats(format: str, layers: list[str] | None) -> str | Mapping[str, str]:
    if not layers:
        return format
    formats = {"*": format}
    for text in layers:
        pattern, sign, name = text.rpartition("=")
        if not (pattern and sign and name):
            raise PlanError(f"--layer {text!r}: write PATTERN=FORMAT, for example --layer 'stem.*=float32'")
        formats[pattern.strip()] = name.strip()
    return formats


def distill(
    task: options.TaskFile,
    losses: Losses = None,
    epochs: Epochs = 5,
    target: options.TargetName = "onnxruntime",
    out: options.OutFolder = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Train a student to answer as its teacher does. The task file defines `student`, `teacher` and `data`."""
    with guarded(debug, task):
        checked_path(task)
        goal, folder = options.the_target(target, 1, 1), options.free_folder(out, "distill")
        values = load_task(task, seed, PAIR)
        from shohin.verbs import distill

        names = None if losses is None else tuple(n.strip() for n in losses.split(",") if n.strip())
        made = distill(values["student"], values["teacher"], values["data"], names, epochs, seed=seed)
        _deliver(made, values["data"], goal, folder)


def export(
    task: options.TaskFile,
    out: OutFile = Path("m.onnx"),
    target: options.TargetName = "onnxruntime",
    seed: options.Seed = 0,
    threads: options.Threads = 1,
    batch: options.Batch = 1,
    debug: options.Debug = False,
) -> None:
    """Write the model as it is to the target's file, compare the two, and measure it."""
    with guarded(debug, task):
        checked_path(task)
        goal = options.the_target(target, threads, batch)
        values = load_task(task, seed)
        from shohin.verbs import export

        made = export(values["model"], values["data"], goal, out)
        _show(made, made.artifact)


def _deliver(made: Candidate, data: Data, target: Target, folder: Path) -> None:
    """Exports a candidate into a folder: model.onnx, model.safetensors, and candidate.json with plan, metrics and checksums."""
    from torch import Tensor

    from shohin.pipeline.ship import candidate_json
    from shohin.run import write_json, write_tensors
    from shohin.verbs import export

    shipped = export(made, data, target, folder / "model.onnx")
    known: dict[str, Any] = {**made.metrics.to_json(), **shipped.metrics.to_json()}
    shipped.metrics = type(shipped.metrics).from_json(known)
    if made.model is not None:
        write_tensors(folder / "model.safetensors", {k: v for k, v in made.model.state_dict().items() if isinstance(v, Tensor)})
    write_json(folder / "candidate.json", candidate_json(shipped))
    _show(shipped, folder)


def _show(made: Candidate, where: Path | None) -> None:
    from shohin.cli import tables

    screen = console()
    screen.print(tables.candidate(made))
    if made.notes.get("form") == "graph":
        screen.print(f"in graph form: {made.notes.get('form_reason')}", soft_wrap=True)
    screen.print(f"written: {where}", soft_wrap=True)
