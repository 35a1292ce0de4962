"""One run: a cut by one method, judged before any training, after new normalization statistics, and after the same short training."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cutting.common import Found, Unreachable, Work, macs, work
from cutting.methods import BUDGETS, CHANNELS, is_ours
from cutting.originals import Original
from cutting.sparse import keeping_zeros, share
from distilling.tasks import task_loss
from records import Record
from shohin.evidence import recalibrate
from shohin.pipeline.ship import lower_program
from shohin.program import capture
from shohin.targets import get_target
from shohin.training import train

#: more than the budget by so much is a mistake of this benchmark
SLACK = 1e-6
PROCESSES = 3


def trial(original: Original, budget: str, method: str, seed: int, *, training: bool = True, timing: bool = True) -> Record:
    """A JSON-able record. The test split is looked at last, once for each stage; nothing depends on it.

    Returns:
        Qualities ``{"validation", "test"}`` by stage: "raw" (as the method leaves it), "recalibrated" (batch-norm statistics of the
        same samples by hand), "trained" (the short training, from what is better on validation of the two for a peer, from the raw
        model for Shohin). "macs" and "params": shares left. "latency": the exported file against the original's. Where a method
        cannot do it, "unreachable" says why.

    Raises:
        RuntimeError: if a method leaves more than its budget.
    """
    allowed, methods = BUDGETS[budget]
    record: Record = {"model": original.name, "budget": budget, "method": method, "seed": seed}
    given = work(original, allowed, seed)
    began = time.monotonic()
    try:
        found = methods[method](given)
    except Unreachable as error:
        return {**record, "unreachable": str(error)[:500]}
    record |= {"seconds": {"score": round(found.score, 3), "cut": round(found.cut, 3), "compensate": round(found.compensate, 3)}}
    record |= {"notes": found.notes, **_left(given, found.model, methods is CHANNELS)}
    stages = {"raw": found.model, "recalibrated": copy.deepcopy(found.model)}
    recalibrate(stages["recalibrated"], given.samples, None)
    validation = {stage: given.data.quality(model, "validation") for stage, model in stages.items()}
    if timing:
        record["latency"] = latency(given, found.model)
    if training:
        start = "raw" if is_ours(method) or validation["raw"] >= validation["recalibrated"] else "recalibrated"
        stages["trained"], record["steps"] = trained(given, found, stages[start], methods is not CHANNELS)
        validation["trained"] = given.data.quality(stages["trained"], "validation")
    for stage, model in stages.items():
        record[stage] = {"validation": validation[stage], "test": given.data.quality(model, "test")}
    return {**record, "whole_seconds": round(time.monotonic() - began, 1)}


def _left(given: Work, model: nn.Module, cut: bool) -> dict[str, Any]:
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, given.model)]
    if not cut:
        left = share(model) / share(given.model)
        rest = {"nonzero": left, "params": sizes[0] / sizes[1]}
    else:
        left = macs(model, given.example) / macs(given.model, given.example)
        rest = {"macs": left, "params": sizes[0] / sizes[1]}
    if left > given.budget + (SLACK if cut else 0.01):
        raise RuntimeError(f"{left:.4f} is left, more than {given.budget}")
    return rest


def trained(given: Work, found: Found, start: nn.Module, sparse: bool) -> tuple[nn.Module, int | None]:
    """The model after the short training, with steps of plain training; its own training where the method has one."""
    if found.trained is not None:
        return found.trained.eval(), None
    config = given.original.short
    config = replace(config, epochs=config.epochs - found.epochs, seed=given.seed)
    model = copy.deepcopy(start)
    keep = keeping_zeros(model, config) if sparse else None
    result = train(model, given.data, task_loss, config, evaluate=given.data.quality, optimizer=keep)
    steps = sum(epoch.steps for epoch in result.history)
    return model.eval(), steps + int(found.notes.get("steps_before", 0))


def latency(given: Work, model: nn.Module) -> dict[str, Any]:
    """Milliseconds of the exported file, and its ratio to the original's, both measured in one interleaving in each of some processes."""
    target = get_target("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, network in (("original", given.model), ("cut", model)):
            files[name] = Path(folder) / f"{name}.onnx"
            lower_program(target, capture(network, (given.example,)), files[name], (given.example,), {})
        size = {f"{name}_bytes": path.stat().st_size for name, path in files.items()}
        found = target.compare(files, (given.example,), reference="original", processes=PROCESSES, seed=given.seed)
    cut = found["cut"]
    return {
        "ratio": cut.ratio,
        "range": [cut.low, cut.high],
        "ms": cut.timing.value,
        "original_ms": found["original"].timing.value,
        **size,
    }
