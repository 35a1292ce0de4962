"""The main job, top to bottom: pre-flight > capture > profile > plan > cut, recover, lower, verify > choose > report."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shohin.budget import Budget
from shohin.candidate import Candidate
from shohin.data import Data
from shohin.errors import BudgetError, DataError, ShohinError
from shohin.pipeline.choose import choose
from shohin.pipeline.job import Job
from shohin.pipeline.plan import Finalist, finalists, saliencies
from shohin.pipeline.reading import load_candidates
from shohin.pipeline.recover import build
from shohin.pipeline.ship import baseline, with_latency
from shohin.pipeline.timing import plan_of, profile
from shohin.planning.features import Features
from shohin.planning.latency import LatencyModel
from shohin.result import Result
from shohin.run import Run
from shohin.surgery import understand
from shohin.targets import Target, get_target

METHODS = ("prune", "quantize", "skip", "distill")


def optimize(
    model: nn.Module,
    data: Data,
    target: str | Target = "onnxruntime",
    budget: str | Budget | None = None,
    *,
    out: str | Path | None = None,
    time_limit: float | str | None = None,
    seed: int = 0,
    methods: Sequence[str] = METHODS,
    finalists: int = 3,
    progress: bool | None = None,
) -> Result:
    """Makes a model fit a device: decides widths, skipped regions and formats together under a measured budget.

    The same call on the same folder resumes a run that was stopped, exactly: finished steps are read from the journal and
    training goes on from its checkpoint. The original is always a candidate.

    Args:
        model: any module that `torch.export` takes; it is not changed.
        data: what the job may look at.
        target: name or `Target` with its conditions.
        budget: a sentence (``"latency <= 2 ms, drop <= 0.5 %"``) or a `Budget`.
        out: the run folder; default a dated one under ``runs/``.
        time_limit: seconds, or "20 min"; decides how long candidates are trained. Steps under way are finished.
        seed: of everything random.
        methods: what may be chosen, of "prune", "quantize", "skip", "distill".
        finalists: how many planned candidates are built.
        progress: show progress; default if standard error is a terminal.

    Returns:
        The result. If the budget cannot be met, ``result.met`` is False and ``result.notes["unmet"]`` says why.

    Raises:
        ModelError, DataError, BudgetError, TargetError, RunError: what, where, and what to do.
    """
    began = time.monotonic()
    target, budget = get_target(target), Budget.parse(budget)
    unknown = set(methods) - set(METHODS)
    if unknown:
        raise BudgetError(f"unknown method {sorted(unknown)[0]!r}; known: {', '.join(METHODS)}")
    seconds = parse_time(time_limit)
    torch.manual_seed(seed)
    with _inference_threads(target.threads):
        _check_data(model, data)
        graph = understand(model, data.example())
        folder = Path(out) if out is not None else Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
        run = Run(folder, _config(model, graph.program, data, target, budget, seed, methods, finalists, seconds))
        job = Job(
            run, model, data, target, budget, seed, graph, None if seconds is None else began + seconds, frozenset(methods), bool(progress)
        )
        with _Progress(progress) as show:
            return _stages(job, show, finalists)


def _stages(job: Job, show: _Progress, count: int) -> Result:
    run, graph = job.run, job.graph
    run.once("capture", "", lambda: _captured(job))
    job.candidates.update(load_candidates(run, job.model, graph))
    show.stage("pre-flight: one lowering, one timing, the metric")
    if "baseline" not in job.candidates or run.find("baseline") is None:
        job.candidates["baseline"] = baseline(job)
        run.once("baseline", "", lambda: _first_timing(job))
    original = job.candidates["baseline"]
    show.stage("profile: timing random plans", 20)
    model = profile(job, show.tick)
    show.stage("plan: saliency and loss tables", 40)
    saliency = saliencies(job, show.tick)
    chosen = finalists(job, model, original, saliency, show.tick, count)
    for number, finalist in enumerate(chosen):
        show.stage(f"build {finalist.name}: cut, recover, lower, verify")
        if finalist.name in job.candidates and run.find("built", finalist.name):
            continue
        if number and job.left() < 0:
            run.once("late", finalist.name, lambda: "the time limit was reached before this candidate was built")
            continue
        time_entry = run.find("time", finalist.name)
        if time_entry is None:
            run.append("time", finalist.name, _share(job, len(chosen) - number))
            time_entry = run.entries[-1]
        try:
            job.candidates[finalist.name] = build(job, finalist, saliency, time_entry["data"])
            run.append("built", finalist.name, {})
        except ShohinError as error:
            run.append("failed", finalist.name, str(error))
    show.stage("measure: all candidates against the original")
    with_latency(job, list(job.candidates))
    return _result(job, model, chosen)


def _share(job: Job, left: int) -> float:
    """Seconds of recovery for the next candidate: an even part of what is left, less what lowering and measuring take."""
    if job.deadline is None:
        return 120.0
    return max(0.0, (job.left() - 15.0) / max(left, 1) - 6.0)


def _result(job: Job, model: LatencyModel, chosen: list[Finalist]) -> Result:
    from shohin.pipeline.explain import explain_candidates

    picked = choose(job.candidates, job.budget, job.data.lower_is_better)
    for entry in job.run.entries:
        if entry["stage"] in ("late", "failed"):
            picked["reasons"].append(f"{entry['key']}: {entry['data']}")
    plan_entry = job.run.find("plan")
    picked["reasons"] += list(plan_entry["data"].get("unmet", [])) if plan_entry else []
    picked.update(explain_candidates(job, model, chosen))
    job.run.append("result", picked["best"], picked)
    notes = {"reasons": picked["reasons"], "unmet": picked["unmet"], "finished": True, "prediction": picked["prediction"]}
    result = Result(
        job.run.folder,
        job.candidates[picked["best"]],
        job.candidates["baseline"],
        [job.candidates[n] for n in picked["front"]],
        job.candidates,
        notes,
    )
    result.report()
    return result


def _captured(job: Job) -> dict[str, Any]:
    graph = job.graph
    return {
        "groups": len(graph.groups),
        "regions": len(graph.regions),
        "frozen": [{"address": f.address, "reason": f.reason + (f" ({f.line})" if f.line else "")} for f in graph.frozen],
        "remarks": list(graph.program.remarks),
    }


def _first_timing(job: Job) -> dict[str, float]:
    path = job.candidates["baseline"].artifact
    if path is None:
        raise DataError("the baseline has no file")
    timing = job.target.measure({"baseline": path}, job.example, kwargs=job.example_kwargs, rounds=50)["baseline"]
    return {"ms": timing.value}


def _check_data(model: nn.Module, data: Data) -> None:
    """Runs metric and loss on a little of everything, so that errors come now."""
    if not data.has_batches:
        raise DataError("optimize needs batches: give Data(train=loader, validation=loader2)")
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        for split in ("train", "validation"):
            call = next(data.calls(split))
            try:
                with torch.no_grad():
                    outputs = model(*call.args, **call.kwargs)
            except Exception as error:
                shapes = [tuple(a.shape) for a in call.args if isinstance(a, torch.Tensor)]
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise DataError(
                    f"the model does not run on the first {split} batch (shapes {shapes}): {type(error).__name__}: {first}"
                ) from error
            _check_finite(call, outputs, split)
            if data.has_labels:
                value = float(data.batch_loss(outputs, call))
                if value != value:
                    raise DataError(f"the loss of the first {split} batch is NaN; look for NaN in the targets or in the loss")
    finally:
        for module, mode in modes:
            module.training = mode


def _check_finite(call: Any, outputs: Any, split: str) -> None:
    for what, value in (("inputs", (call.args, call.kwargs)), ("outputs", outputs)):
        for t in torch.utils._pytree.tree_leaves(value):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise DataError(f"the {what} of the first {split} batch hold NaN or infinite values; clean the data first")


def _config(
    model: nn.Module,
    program: Any,
    data: Data,
    target: Target,
    budget: Budget,
    seed: int,
    methods: Any,
    finalists: int,
    seconds: float | None,
) -> dict[str, Any]:
    return {
        "version": 1,
        "model": type(model).__name__,
        "fingerprint": program.fingerprint,
        "weights": program.weights_hash(),
        "target": target.conditions,
        "budget": budget.to_json(),
        "asked": str(budget),
        "seed": seed,
        "methods": sorted(methods),
        "finalists": finalists,
        "time_limit": seconds,
        "quality_name": "quality" if data.metric is not None else "accuracy",
        "lower_is_better": data.lower_is_better,
    }


def parse_time(value: float | str | None) -> float | None:
    """Seconds from a number or a text such as "90", "90 s", "20 min", "1.5 h". Raises BudgetError if it does not parse."""
    if value is None or isinstance(value, (int, float)):
        return None if value is None else float(value)
    found = re.fullmatch(r"\s*([0-9.]+)\s*(s|sec|seconds|min|m|minutes|h|hours)?\s*", value)
    if not found:
        raise BudgetError(f"cannot read the time limit {value!r}: give seconds, or for example '20 min'")
    unit = (found.group(2) or "s")[0]
    return float(found.group(1)) * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit]


@contextmanager
def _inference_threads(threads: int) -> Iterator[None]:
    """torch uses as many threads as the target: two pools that spin on the same cores slow everything down."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Progress:
    """A status line of stages on a terminal; silent elsewhere."""

    def __init__(self, wanted: bool | None) -> None:
        import sys

        self._on = sys.stderr.isatty() if wanted is None else wanted
        self._bar: Any = None
        self._task: Any = None
        self.tick: Callable[[], None] = self._advance

    def __enter__(self) -> _Progress:
        if self._on:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, text: str, total: int | None = None) -> None:
        """The next stage, with the expected number of ticks."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.update(self._task, total=1, completed=1)
            self._task = self._bar.add_task(text, total=total)

    def _advance(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)


__all__ = ["METHODS", "Candidate", "Features", "optimize", "parse_time", "plan_of"]
