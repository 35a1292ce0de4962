"""Explain: where milliseconds and loss went, layer by layer, and how good the predictions were."""

from __future__ import annotations

from typing import Any

import numpy as np

from shohin.pipeline.job import Job
from shohin.pipeline.plan import Finalist, tables
from shohin.planning.choice import Choice
from shohin.planning.latency import LatencyModel


def explain_candidates(job: Job, model: LatencyModel, chosen: list[Finalist], saliency: dict[str, list[float]]) -> dict[str, Any]:
    """``steps`` and ``layers`` by candidate, and ``prediction`` errors against what shipped."""
    by_name = {f.name: f for f in chosen}
    base = job.candidates["baseline"].metrics.values()
    whole = Choice(job.graph.sizes)
    before = model.operator_ms(whole)
    steps: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    errors: dict[str, float] = {}
    options, regions = tables(job, saliency, lambda: None)  # journaled: read, not measured again
    widths = {g.name: dict(zip(g.counts, g.loss.tolist(), strict=True)) for g in options}
    skips = {r.name: r.loss for r in regions}
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
        _attribute(job, layers[name], finalist.choice, widths, skips)
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


def _attribute(job: Job, rows: list[dict[str, Any]], choice: Choice, widths: dict[str, dict[int, float]], skips: dict[str, float]) -> None:
    """Adds to each layer the loss that planning expected of the choice made there.

    A width's loss stands at the layer that produces the axis, a skipped region's at its first layer.
    """
    graph = job.graph
    operators = {op.address: op for op in graph.costs}
    of_weight = {_weight(job, row["address"]): row for row in rows}
    dead = {n for r in choice.skipped for n in graph.region(r).nodes}
    gone = {o.address for n, o in graph.program.origins.items() if n in dead}
    for group in graph.groups:
        loss = widths[group.name].get(choice.kept[group.name], 0.0)
        row = of_weight.get(group.name.partition("#")[0])
        if row is not None and loss and row["address"] not in gone:
            row["loss"] = row.get("loss", 0.0) + loss
    for region in choice.skipped:
        first = next((row for row in rows if region in operators[row["address"]].regions), None)
        if first is not None:
            first["loss"] = first.get("loss", 0.0) + skips.get(region, 0.0)


def _weight(job: Job, address: str) -> str:
    """The weight that a layer contracts with."""
    program = job.graph.program
    node = next(n for n in program.graph.nodes if n.name in program.origins and program.origins[n.name].address == address)
    weight: Any = node.args[1]
    return program.names[weight.name]


def _width(job: Job, address: str, choice: Choice) -> int:
    """Output channels of a layer under a choice."""
    graph = job.graph
    name = _weight(job, address)
    size = int(graph.program.tensors[name].shape[0])
    for group in graph.groups:
        index = group.slices.get(name, {}).get(0)
        if index is not None:
            size -= index.shape[1] * (group.size - choice.kept[group.name])
    return size
