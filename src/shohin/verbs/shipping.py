"""Search by the main job, the file that ships, and what it is checked by later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from shohin.budget import Budget
from shohin.candidate import Candidate, Measurement, Metrics
from shohin.data import Data
from shohin.errors import ModelError, RunError
from shohin.plan import Plan
from shohin.program import capture
from shohin.result import Result
from shohin.targets import Target, get_target
from shohin.verbs.common import checked, seeded


def search(
    model_or_space: nn.Module,
    data: Data,
    target: str | Target = "onnxruntime",
    budget: str | Budget | None = None,
    *,
    time_limit: float | str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Result:
    """Architecture search alone: widths and depth of the user's own model under a measured budget, in float32.

    Arguments, result and errors as for `shohin.optimize`.
    """
    from shohin.pipeline import optimize

    if not isinstance(model_or_space, nn.Module):
        raise ModelError(f"search takes a model; spaces of building blocks are not supported yet (got {type(model_or_space).__name__})")
    return optimize(model_or_space, data, target, budget, out=out, time_limit=time_limit, seed=seed, methods=("prune", "skip", "distill"))


def export(
    candidate_or_model: Candidate | nn.Module, data: Data, target: str | Target = "onnxruntime", path: str | Path = "m.onnx"
) -> Candidate:
    """Lowers to the file that ships and verifies it against the view; stores what `verify` needs beside it.

    Returns:
        A candidate with ``.artifact`` and ``.metrics`` (size, latency; quality if ``data`` can tell).

    Raises:
        TargetError: if the file does not equal the view, or the target cannot run it.
    """
    from shohin.pipeline.reading import requantized
    from shohin.pipeline.ship import expected_formats, least_snr, lower_program, lower_quantized, verify_export

    goal, path = get_target(target), Path(path)
    given = candidate_or_model if isinstance(candidate_or_model, Candidate) else Candidate("exported", Plan(""), candidate_or_model)
    if given.model is None:
        raise RunError(f"candidate {given.name!r} has no model; load it with shohin.load(folder, model=..., example=...)")
    with seeded(checked(data), 0):
        example = data.example()
        program = capture(given.model, example)
        quantized = requantized(program, given) if given.plan.formats else None
        path.parent.mkdir(parents=True, exist_ok=True)
        if quantized is None:
            shown, notes = lower_program(goal, program, path, example.args, example.kwargs)
        else:
            shown, _, notes = lower_quantized(goal, quantized, path, example.args, example.kwargs)
        parity = verify_export(goal, shown, path, expected_formats(program, quantized), [example], snr=least_snr(quantized))
        timing = goal.measure({"file": path}, example.args, kwargs=example.kwargs)["file"]
        quality = None
        if data.metric is not None or (data.has_batches and data.has_labels and data.loss is None):
            quality = Measurement(data.quality(goal.runner(path)), "measured: the metric over the file, on validation")
    metrics = Metrics(
        quality=quality, latency_ms=timing.measurement(), size_bytes=Measurement(float(path.stat().st_size), "measured: bytes of the file")
    )
    return Candidate(
        given.name,
        given.plan,
        given.model,
        shown,
        given.evidence,
        path,
        metrics,
        {**given.notes, "parity": parity, "lowering": notes},
        given.removed,
    )


def verify(path: str | Path) -> dict[str, Any]:
    """Repeats the parity checks of a run, a candidate's folder or a file, on this machine.

    Args:
        path: a run folder, a candidate's folder, or ``model.onnx`` with its parity files beside it.

    Returns:
        ``{"passes": bool, "files": {path: {"passes", "max_rel", "snr_db", "argmax_agree", "argmax_total", "tolerance"}}}``.

    Raises:
        RunError: if there is nothing to verify, or a file is missing or damaged.
    """
    from shohin.pipeline.ship import verify_stored

    path = Path(path)
    if path.is_dir() and (path / "candidates").is_dir():
        files = sorted(p.with_name("model.onnx") for p in (path / "candidates").glob("*/candidate.json"))  # what is finished
    elif path.is_dir():
        files = sorted(path.glob("*.onnx"))
    else:
        files = [path]
    if not files or not all(f.exists() for f in files):
        raise RunError(f"{path}: nothing to verify here; give a run folder, a candidate's folder or a file with its parity beside it")
    found = {str(f): verify_stored(f) for f in files}
    return {"passes": all(f["passes"] for f in found.values()), "files": found}
