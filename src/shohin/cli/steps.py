"""The commands that do one step: profile, prune, quantize, distill, export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli import options
from shohin.cli.guard import UNMET, console, guarded
from shohin.cli.jobs import show
from shohin.cli.taskfile import PAIR, checked_path, load_task
from shohin.errors import PlanError

if TYPE_CHECKING:
    from shohin.candidate import Candidate
    from shohin.data import Data
    from shohin.targets import Target

Keep = Annotated[float | None, typer.Option("--keep", help="Share that is left, in (0, 1]; 0.5 without a budget.", show_default=False)]
Of = Annotated[str, typer.Option("--of", help="Of what: macs or params. Zeros count elements.")]
Criterion = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        metavar="NAME",
        help="What decides. Units: taylor (default), first_order, obd, obs, obs_greedy, layer_obs, wanda, activation, apoz; without batches "
        "magnitude, magnitude_l1, norm_scale, geometric_median, random. Depth alone: divergence (default), cosine. Zeros: auto "
        "(default), sparsegpt, obc, wanda, taylor, fisher; without batches magnitude, lamp, random.",
    ),
]
Granularity = Annotated[
    str,
    typer.Option(
        "--granularity",
        metavar="LIST",
        help="What goes: channel (any unit), neuron, head, width, depth, or several of these as 'head,neuron'; or zeros: unstructured, "
        "N:M as '2:4', or blocks as 'block 1x8'.",
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        metavar="NAME",
        help="How much goes where. Units: planned (default), sensitivity, uniform, global. Zeros: uniform (default), global, erk, lamp, "
        "sensitivity.",
    ),
]
Normalization = Annotated[
    str | None,
    typer.Option(
        "--normalization",
        metavar="NAME",
        help="Which units compete, for --allocation global: global (default), mean, max, isomorphic, none.",
    ),
]
PruneBudget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="TEXT", help="Instead of --keep: bounds that hold on the target, for example 'latency <= 50 %, drop <= 1 %'."
    ),
]
Align = Annotated[int, typer.Option("--align", min=1, help="Kept channels are multiples of this.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Of the calibration batches.")]
Recover = Annotated[str, typer.Option("--recover", help="auto, none, compensate, or distill.")]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training batches.")]
Format = Annotated[
    str,
    typer.Option(
        "--format", help="Of every layer: int8, 'int8 dynamic', w4a8, float32, or weights of few bits, such as 'weights uint4 group 32'."
    ),
]
Layer = Annotated[
    list[str] | None, typer.Option("--layer", metavar="PATTERN=FORMAT", help="Format of some layers by address; may be repeated.")
]
Ranges = Annotated[str, typer.Option("--ranges", help="Of int8 activations: mse, percentile, entropy, minmax or moving.")]
Rounding = Annotated[
    str, typer.Option("--rounding", help="Of weights beside float activations: auto, nearest, hqq, gptq, adaround, descent or blocks.")
]
Smoothing = Annotated[bool, typer.Option("--smoothing/--no-smoothing", help="Of int8 activations whose channels differ much.")]
Equalize = Annotated[bool, typer.Option("--equalize/--no-equalize", help="Channels between int8 layers that only layers read.")]
Rotate = Annotated[
    bool | None,
    typer.Option(
        "--rotate/--no-rotate",
        help="Channels of residual streams, so that none stands out; by default around layers that round what they read.",
    ),
]
Train = Annotated[
    str,
    typer.Option(
        "--recover",
        help="none, or qat: train the weights and their grids as they will be rounded, for --epochs; the same command on the same folder "
        "resumes a training that was stopped.",
    ),
]
Learn = Annotated[str, typer.Option("--learn", help="How grids learn with --recover qat: lsq, pact, or fixed.")]
FormatBudget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="TEXT",
        help="Bounds of the file, 'size <= 60 %, latency <= 2 ms' for instance: each layer gets one of the formats of --format (several with "
        "commas), or stays float.",
    ),
]
Sensitivity = Annotated[str, typer.Option("--sensitivity", help="Of layers, with --budget: fisher, output or kl.")]
Drop = Annotated[
    str | None, typer.Option("--drop", help="Most that quality may fall, '0.3 %' for instance: the fewest layers then stay float.")
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
    keep: Keep = None,
    of: Of = "macs",
    criterion: Criterion = None,
    granularity: Granularity = "channel",
    recover: Recover = "auto",
    allocation: Allocation = None,
    normalization: Normalization = None,
    budget: PruneBudget = None,
    align: Align = 8,
    samples: Samples = 512,
    epochs: Epochs = 5,
    target: options.TargetName = "onnxruntime",
    out: options.OutFolder = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Remove channels, heads, neurons, layers or single weights until a share of the model is left; write the weights and the file.

    With a budget: exit code 3 if it cannot be met; the same command on the same folder resumes a run that was stopped.
    """
    folder = out if out is not None else options.dated("prune")
    with guarded(debug, task, folder if budget is not None else None, "" if out is not None else f"--out {folder}"):
        checked_path(task)
        from shohin.budget import Budget

        goal = options.the_target(target, 1, 1)
        if budget is None:
            options.free_folder(folder, "prune")
        else:
            Budget.parse(budget)
        names = tuple(n.strip() for n in granularity.split(","))
        values = load_task(task, seed)
        from shohin.verbs import prune

        made = prune(
            values["model"],
            values["data"],
            keep,
            of,
            criterion,
            names[0] if len(names) == 1 else names,
            None if recover.lower() == "none" else recover,
            budget=budget,
            target=goal,
            allocation=allocation,
            normalization=normalization,
            epochs=epochs,
            align=align,
            samples=samples,
            seed=seed,
            out=None if budget is None else folder,
        )
        if budget is None:
            _deliver(made, values["data"], goal, folder)
    if budget is not None:
        _told(folder, debug)


def _told(folder: Path, debug: bool) -> None:
    """What came of a budget, as `shohin optimize` says it."""
    with guarded(debug):
        from shohin.pipeline import load

        result = load(folder)
        show(result)
    if not result.met:
        raise typer.Exit(UNMET)


def quantize(
    task: options.TaskFile,
    format: Format = "int8",
    layer: Layer = None,
    budget: FormatBudget = None,
    sensitivity: Sensitivity = "fisher",
    ranges: Ranges = "mse",
    smoothing: Smoothing = True,
    equalize: Equalize = True,
    rotate: Rotate = None,
    rounding: Rounding = "auto",
    drop: Drop = None,
    recover: Train = "none",
    learn: Learn = "lsq",
    epochs: Epochs = 5,
    target: options.TargetName = "onnxruntime",
    out: options.OutFolder = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Give weights and activations fewer bits; write the snapped weights and the file."""
    trains = recover.lower() != "none"
    folder = out if out is not None else options.dated("quantize")
    with guarded(debug, task, folder if trains else None, "" if out is not None else f"--out {folder}"):
        checked_path(task)
        from shohin.run import CHECKPOINT

        goal = options.the_target(target, 1, 1)
        options.free_folder(folder, "quantize", CHECKPOINT if trains else "")
        formats = _formats(format, layer) if budget is None else tuple(text.strip() for text in format.split(","))
        if budget is None and "," in format:
            raise PlanError("several formats are chosen from under a budget: add --budget 'size <= 60 %', for instance, or name one format")
        if not trains and learn != "lsq":
            raise PlanError("--learn says how grids learn in a training: add --recover qat")
        if budget is not None and layer:
            raise PlanError("--layer says what a layer is, and --budget chooses it: give one of them")
        values = load_task(task, seed)
        from shohin.quantization import QAT
        from shohin.verbs import quantize

        made = quantize(
            values["model"],
            values["data"],
            formats,
            goal,
            budget=budget,
            sensitivity=sensitivity,
            ranges=ranges,
            smoothing=smoothing,
            equalize=equalize,
            rotate=rotate,
            rounding=rounding,
            drop=drop,
            recover=QAT(learn) if recover == "qat" else recover if trains else None,  # type: ignore[arg-type]
            epochs=epochs,
            seed=seed,
            out=folder if trains else None,
        )
        _deliver(made, values["data"], goal, folder)
        if budget is not None and not made.notes["met"]:
            for text in made.notes["unmet"]:
                console().print(f"not met: {text}", soft_wrap=True)
            raise typer.Exit(UNMET)


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
    """Exports a candidate into a folder: model.onnx, model.safetensors (sparse weights packed: weights.safetensors), and candidate.json
    with plan, metrics and checksums.
    """
    from torch import Tensor

    from shohin.pipeline.ship import candidate_json
    from shohin.run import write_json, write_tensors
    from shohin.verbs import export

    shipped = export(made, data, target, folder / "model.onnx")
    known: dict[str, Any] = {**made.metrics.to_json(), **shipped.metrics.to_json()}
    shipped.metrics = type(shipped.metrics).from_json(known)
    packed = folder / "weights.safetensors"
    if made.model is not None and made.plan.sparsity:
        from shohin.pruning import sparse

        sparse.write(packed, made.model)
    elif made.model is not None:
        write_tensors(folder / "model.safetensors", {k: v for k, v in made.model.state_dict().items() if isinstance(v, Tensor)})
    write_json(folder / "candidate.json", candidate_json(shipped))
    _show(shipped, folder)
    if packed.exists():
        console().print(f"weights with their zeros packed: {packed}, {packed.stat().st_size} bytes", soft_wrap=True)


def _show(made: Candidate, where: Path | None) -> None:
    from shohin.cli import tables

    screen = console()
    screen.print(tables.candidate(made))
    if made.notes.get("form") == "graph":
        screen.print(f"in graph form: {made.notes.get('form_reason')}", soft_wrap=True)
    screen.print(f"written: {where}", soft_wrap=True)
