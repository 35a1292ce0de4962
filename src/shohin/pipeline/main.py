"""The main job, top to bottom: pre-flight > capture > profile > plan > cut, recover, lower, verify > choose > report."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shohin.budget import Budget
from shohin.data import Data
from shohin.errors import BudgetError, DataError, ShohinError
from shohin.pipeline.choose import choose
from shohin.pipeline.explain import explain_candidates
from shohin.pipeline.job import Job
from shohin.pipeline.plan import Finalist, finalists, saliencies
from shohin.pipeline.reading import load_candidates
from shohin.pipeline.recover import build
from shohin.pipeline.ship import baseline, save, with_latency
from shohin.pipeline.timing import profile
from shohin.planning.latency import LatencyModel
from shohin.program import call_inputs
from shohin.result import Result
from shohin.run import Run
from shohin.surgery import understand
from shohin.targets import Target, get_target
from shohin.training.randomness import generators_of, isolated, mix, seed_everything

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
        time_limit: seconds, or "20 min"; decides how long candidates are trained (two minutes each without it). Steps under way
            are finished. torch runs on as many threads as the target has.
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
    if not isinstance(data, Data):
        raise DataError(f"data must be a shohin.Data, not {type(data).__name__}: write shohin.Data(train=loader, validation=loader2)")
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    if finalists < 1:
        raise BudgetError(f"finalists must be at least 1; got {finalists}")
    unknown = set(methods) - set(METHODS)
    if unknown:
        raise BudgetError(f"unknown method {sorted(unknown)[0]!r}; known: {', '.join(METHODS)}")
    if "energy_mj" in budget.limits:
        raise BudgetError(f"the target {target.name!r} does not measure energy; bound latency, size, memory or drop")
    seconds = parse_time(time_limit)
    generators = generators_of(data.train, data.validation, data.test)
    with isolated(generators), _inference_threads(target.threads):
        seed_everything(mix(seed), generators)
        graph = understand(model, data.example())
        _check_data(model, data)
        show = _Progress(progress)
        folder = Path(out) if out is not None else Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
        inputs = _data_hash(data, seed, generators)
        deadline = None if seconds is None else began + seconds
        with Run(folder, _config(model, graph.program, inputs, data, target, budget, seed, methods, finalists, seconds)) as run:
            job = Job(run, model, data, target, budget, seed, graph, deadline, frozenset(methods), show.on)
            return _stages(job, show, finalists)


def _stages(job: Job, show: _Progress, count: int) -> Result:
    run, graph = job.run, job.graph
    run.once("capture", "", lambda: _captured(job))
    for call in job.calibration:
        call_inputs(graph.program, call)
        _check_finite(call, (), "a train batch")
    job.candidates.update(load_candidates(run, job.model, graph))
    show.stage("pre-flight: one lowering, one timing, the metric")
    if "baseline" not in job.candidates:
        job.candidates["baseline"] = baseline(job)
    run.once("baseline", "", lambda: _first_timing(job))
    original = job.candidates["baseline"]
    show.stage("profile: timing random plans")
    model = profile(job, show.tick)
    show.stage("plan: saliency and loss tables")
    saliency = saliencies(job, show.tick)
    chosen = finalists(job, model, original, saliency, show.tick, count)
    for number, finalist in enumerate(chosen):
        show.stage(f"build {finalist.name}: cut, recover, lower, verify")
        if finalist.name in job.candidates:
            continue
        if number and job.left() < 0:
            run.once("late", finalist.name, lambda: "the time limit was reached before this was built; the same command goes on with it")
            continue
        time_entry = run.find("time", finalist.name)
        if time_entry is None:
            run.append("time", finalist.name, _share(job, len(chosen) - number))
            time_entry = run.entries[-1]
        try:
            job.candidates[finalist.name] = build(job, finalist, saliency, time_entry["data"])
        except ShohinError as error:
            run.append("failed", finalist.name, str(error))
    show.stage("measure: all candidates against the original")
    names = sorted(job.candidates, key=lambda n: (n != "baseline", n))  # one order for every resume: the journal's key
    job.candidates = {n: job.candidates[n] for n in names}
    with_latency(job, names)
    return _result(job, model, chosen, saliency)


def _share(job: Job, left: int) -> float:
    """Seconds of recovery for the next candidate: an even part of what is left, less what lowering and measuring take."""
    if job.deadline is None:
        return 120.0
    return max(0.0, (job.left() - 15.0) / max(left, 1) - 6.0)


def _result(job: Job, model: LatencyModel, chosen: list[Finalist], saliency: dict[str, list[float]]) -> Result:
    picked = choose(job.candidates, job.budget, job.data.lower_is_better)
    missing = {e["key"]: e["data"] for e in job.run.entries if e["stage"] in ("late", "failed") and e["key"] not in job.candidates}
    picked["reasons"] += [f"{name}: {why}" for name, why in missing.items()]
    for c in job.candidates.values():
        picked["reasons"] += [f"{c.name}: {text}" for text in c.notes.get("parity", {}).get("departs", [])]
    if not chosen:
        frozen = "; ".join(dict.fromkeys(f"{f.address}: {f.reason}" for f in job.graph.frozen))
        picked["reasons"].append(
            f"no plan changes the model: {len(job.graph.groups)} unit groups, {len(job.graph.regions)} regions; frozen: {frozen}"
        )
    picked["reasons"] += (job.run.find("capture") or {"data": {}})["data"].get("remarks", [])
    plan_entry = job.run.find("plan")
    picked["reasons"] += list(plan_entry["data"].get("unmet", [])) if plan_entry else []
    picked.update(explain_candidates(job, model, chosen, saliency))
    _test(job, dict.fromkeys(("baseline", picked["best"])))
    picked["reasons"] += [text for text in dict.fromkeys(t for c in job.candidates.values() for t in c.notes.get("remarks", []))]
    for candidate in job.candidates.values():
        save(job, candidate)
    last = next((e["data"] for e in reversed(job.run.entries) if e["stage"] == "result"), None)
    if last != json.loads(json.dumps(picked)):
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


def _test(job: Job, names: Iterable[str]) -> None:
    """Accuracy of the files on the test split, after everything was chosen (journaled). A user's metric is about validation alone."""
    if job.data.test is None:
        return
    for name in names:
        candidate = job.candidates[name]
        if candidate.artifact is None:
            continue
        runner = job.target.runner(candidate.artifact)
        try:
            quality = job.run.once("test", name, lambda run=runner: job.data.quality(run, "test"))  # type: ignore[misc]
        except DataError as error:
            candidate.notes["remarks"] = [f"the test split was not used: {error}"]
        else:
            candidate.notes["test"] = {"quality": quality}


def _captured(job: Job) -> dict[str, Any]:
    graph = job.graph
    remarks = list(graph.program.remarks)
    for split, other in (("validation", "train"), ("train", "validation")):
        if getattr(job.data, split) is None:
            remarks.append(f"there are no {split} batches: {other} is used in their place, so nothing is held back")
    return {
        "groups": len(graph.groups),
        "regions": len(graph.regions),
        "frozen": [{"address": f.address, "reason": f.reason + (f" ({f.line})" if f.line else "")} for f in graph.frozen],
        "remarks": remarks,
    }


def _first_timing(job: Job) -> dict[str, float]:
    path = job.candidates["baseline"].artifact
    if path is None:
        raise DataError("the baseline has no file")
    timing = job.target.measure({"baseline": path}, job.example, kwargs=job.example_kwargs, rounds=50)["baseline"]
    return {"ms": timing.value}


def _check_data(model: nn.Module, data: Data) -> None:
    """Runs the model and the loss on a little of everything, so that errors come now."""
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
            _check_finite(call, outputs, f"the first {split} batch")
            if data.has_labels:
                with torch.no_grad():
                    value = float(data.batch_loss(outputs, call))
                if not math.isfinite(value):
                    raise DataError(f"the loss of the first {split} batch is {value}; look for NaN in the targets or in the loss")
    finally:
        for module, mode in modes:
            module.training = mode


def _check_finite(call: Any, outputs: Any, where: str) -> None:
    for what, value in (("inputs", (call.args, call.kwargs)), ("outputs", outputs)):
        for t in torch.utils._pytree.tree_leaves(value):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise DataError(f"the {what} of {where} hold NaN or infinite values; clean the data first")


def _config(
    model: nn.Module,
    program: Any,
    inputs: str,
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
        "data": inputs,
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


def _data_hash(data: Data, seed: int, generators: list[torch.Generator]) -> str:
    """Hash of what the job looks at: lengths of the loaders, and the first validation batch."""
    digest = hashlib.sha256()
    for loader in (data.train, data.validation):
        digest.update(f"{len(loader) if isinstance(loader, Sized) else None};".encode())
    seed_everything(mix(seed, "data hash"), generators)
    call = next(data.calls("validation"))
    for t in torch.utils._pytree.tree_leaves((call.args, call.kwargs, call.target)):
        if isinstance(t, torch.Tensor):
            digest.update(f"{tuple(t.shape)} {t.dtype};".encode())
            digest.update(t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def parse_time(value: float | str | None) -> float | None:
    """Seconds from a number or a text such as "90", "90 s", "20 min", "1.5 h". Raises BudgetError if it does not parse."""
    if value is None:
        return None
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(s|sec|seconds|min|m|minutes|h|hours)?\s*", str(value))
    seconds = float(value) if isinstance(value, (int, float)) else float(found.group(1)) if found else math.nan
    if not 0 < seconds < math.inf:
        raise BudgetError(f"cannot read the time limit {value!r}: give seconds, or for example '20 min'")
    unit = (found.group(2) or "s")[0] if found else "s"
    return seconds * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit]


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
    """A line for each stage on standard error, with the time since the start. The training loop shows its own bar."""

    def __init__(self, wanted: bool | None) -> None:
        import sys

        self.on = sys.stderr.isatty() if wanted is None else wanted
        self._began = time.monotonic()

    def stage(self, text: str) -> None:
        """Says what begins."""
        if self.on:
            from rich.console import Console

            Console(stderr=True, highlight=False).print(f"[dim]{time.monotonic() - self._began:5.0f} s[/dim]  {text}")

    def tick(self) -> None:
        """Called by long steps; a line for each would be noise."""


__all__ = ["METHODS", "optimize", "parse_time"]
