"""Explain: where milliseconds and loss went, layer by layer, and how good the predictions were."""

from __future__ import annotations

from typing import Any

import numpy as np

from shohin.pipeline.job import Job
from shohin.pipeline.plan import Finalist
from shohin.planning.choice import Choice
from shohin.planning.latency import LatencyModel


def explain_candidates(job: Job, model: LatencyModel, chosen: list[Finalist]) -> dict[str, Any]:
    """``steps`` and ``layers`` by candidate, and ``prediction`` errors against what shipped."""
    by_name = {f.name: f for f in chosen}
    base = job.candidates["baseline"].metrics.values()
    whole = Choice(job.graph.sizes)
    before = model.operator_ms(whole)
    steps: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for name, candidate in job.candidates.items():
        finalist = by_name.get(name)
        if finalist is None:
            continue
        values = candidate.metrics.values()
        steps[name] = [{"step": "start", "quality": base["quality"], "latency_ms": base["latency_ms"]}]
        steps[name] += [dict(s) for s in candidate.notes.get("steps", [])]
        if candidate.plan.formats:
            steps[name].append({"step": "quantize", "quality": values["quality"]})
        steps[name][-1]["latency_ms"] = values["latency_ms"]
        layers[name] = _layers(job, model, finalist, before, whole)
        # predicted in the profile's interleaving: compared as ratios to the baseline, which both interleavings hold
        profile = (job.run.find("profile") or {"data": {"ms": [base["latency_ms"]]}})["data"]["ms"][0]
        predicted = finalist.predicted_ms / profile * base["latency_ms"]
        candidate.notes["predicted"] = {"latency_ms": predicted}
        errors[name] = abs(predicted / values["latency_ms"] - 1)
    found = sorted(errors.values())
    prediction = {"errors": errors, "median": float(np.median(found)) if found else None, "worst": max(found, default=None)}
    return {"steps": steps, "layers": layers, "prediction": prediction}


def _layers(job: Job, model: LatencyModel, finalist: Finalist, before: dict[str, float], whole: Choice) -> list[dict[str, Any]]:
    after = model.operator_ms(finalist.choice)
    sites = set(job.graph.sites)
    rows = []
    for op in job.graph.costs:
        if op.address not in sites:
            continue
        skipped = bool(set(op.regions) & finalist.choice.skipped)
        rows.append(
            {
                "address": op.address,
                "kind": op.kind,
                "width_before": _width(job, op.address, whole),
                "width_after": 0 if skipped else _width(job, op.address, finalist.choice),
                "format": "skipped" if skipped else "int8" if op.address in finalist.choice.int8 else "float32",
                "ms_before": before[op.address],
                "ms_after": after[op.address],
                "macs": op.amounts(whole.kept)[0],
            }
        )
    return rows


def _width(job: Job, address: str, choice: Choice) -> int:
    """Output channels of a layer under a choice."""
    graph = job.graph
    node = next(n for n, o in graph.program.origins.items() if o.address == address)
    weight = next(n for n in graph.program.graph.nodes if n.name == node).args[1]
    name = graph.program.names[weight.name]
    size = int(graph.program.tensors[name].shape[0])
    for group in graph.groups:
        index = group.slices.get(name, {}).get(0)
        if index is not None:
            size -= index.shape[1] * (group.size - choice.kept[group.name])
    return size
