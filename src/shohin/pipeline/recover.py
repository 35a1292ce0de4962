"""Build: cut a finalist, win its accuracy back step by step, quantize, and hand over a verified file."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from shohin.candidate import Candidate
from shohin.data import first_output
from shohin.distillation import FEATURES, LABELS, FeatureTap, Teacher, distill
from shohin.formats import Bits
from shohin.graph import Graph, kept_indices
from shohin.graph.labels.core import Labels
from shohin.pipeline.job import Job, load_tensors, own_tensors
from shohin.pipeline.plan import Finalist
from shohin.pipeline.ship import expected_formats, finish, least_snr, lower_program, lower_quantized, verify_file
from shohin.plan import Plan
from shohin.planning.widths import plan_of
from shohin.program import Program, unfold_state, with_graph
from shohin.pruning.layerwise import refit
from shohin.quantization import Quantized, quantize_program
from shohin.run import read_tensors, write_tensors
from shohin.surgery import Cut, cut_sharing_values
from shohin.training import TrainConfig

#: longest distillation, in epochs
EPOCHS = 30


def build(job: Job, finalist: Finalist, saliency: dict[str, list[float]], seconds: float) -> Candidate:
    """One finalist as a finished candidate (journaled step by step; training resumes from its checkpoint).

    Args:
        seconds: for recovery; the number of epochs is fixed from it once, and journaled.
    """
    graph = job.graph
    plan = plan_of(graph, finalist.choice, saliency)
    shape = Plan(plan.fingerprint, plan.widths, plan.skips)
    made = cut_sharing_values(job.model, graph, shape)
    model = made.model
    steps: list[dict[str, Any]] = []
    if not shape.is_identity:
        steps.append(_step(job, finalist, "prune", model))
        _compensate(job, finalist, made, shape, steps)
        if "distill" in job.methods:
            _distill(job, finalist, made, graph, shape, seconds, steps)
    model.eval()
    names = {name: 0 for name in graph.program.names.values()}
    program = with_graph(graph.program, made.rewritten.graph, {**made.rewritten.sliced(), **own_tensors(model, names)})
    return _ship(job, finalist, plan, made, program, steps)


def _step(job: Job, finalist: Finalist, step: str, model: nn.Module) -> dict[str, Any]:
    """Validation quality of a module after a step (journaled)."""

    def work() -> float:
        model.eval()
        with job.seeded("quality"), torch.no_grad():
            return job.data.quality(model)

    return {"step": step, "quality": job.run.once("step", f"{finalist.name}/{step}", work)}


def _compensate(job: Job, finalist: Finalist, made: Cut, plan: Plan, steps: list[dict[str, Any]]) -> None:
    """Layer-wise refitting, with and without new statistics: what diverges least from the original on held-out batches stays."""
    graph = job.graph
    path = job.run.work(f"{finalist.name}-compensated.safetensors")
    entry = job.run.find("compensate", finalist.name)
    if entry is None or not path.exists():
        start = {**made.rewritten.sliced(), **own_tensors(made.model, {n: 0 for n in graph.program.names.values()})}
        best, losses = start, {"sliced": job.divergence(made.model)}
        for label, weights, statistics in (
            ("recalibrated", False, True),
            ("refitted", True, False),
            ("refitted and recalibrated", True, True),
        ):
            values = refit(graph, plan, made.rewritten, start, job.calibration, weights=weights, statistics=statistics, seed=job.seed)
            load_tensors(made.model, values)
            losses[label] = job.divergence(made.model)
            if losses[label] <= min(losses.values()):
                best = values
        write_tensors(path, best)
        if entry is None:
            job.run.append("compensate", finalist.name, {"losses": losses})
    load_tensors(made.model, read_tensors(path))
    steps.append(_step(job, finalist, "compensate", made.model))


def _distill(job: Job, finalist: Finalist, made: Cut, graph: Graph, plan: Plan, seconds: float, steps: list[dict[str, Any]]) -> None:
    """Distillation from the original: logits, index-aligned features where the class was kept, and labels if there are any."""
    data = job.data
    settings = job.run.once("distill settings", finalist.name, lambda: _settings(job, made.model, seconds))
    if settings["epochs"] < 1:
        return
    taps = aligned_taps(graph, plan) if made.form == "module" else []
    labels = data.has_labels
    path = job.run.work(f"{finalist.name}-distilled.safetensors")
    if job.run.find("distill", finalist.name) is None or not path.exists():
        with job.seeded("distill", finalist.name):
            result = distill(
                made.model,
                job.model,
                data,
                config=TrainConfig(
                    epochs=settings["epochs"], lr=settings["lr"], ema=None, patience=max(5, settings["epochs"] // 3), seed=job.seed
                ),
                loss="kd" if job.divergence.axis is not None else "mse",
                alpha=LABELS if labels else 0.0,
                feature_weight=FEATURES if taps else 0.0,
                taps=taps,
                checkpoint=job.run.work(f"{finalist.name}-training.safetensors"),
                deadline=None,
                progress=job.progress,
            )
        write_tensors(path, {k: v for k, v in made.model.state_dict().items()})
        if job.run.find("distill", finalist.name) is None:
            job.run.append("distill", finalist.name, result.to_json())
    load_tensors(made.model, read_tensors(path))
    steps.append(_step(job, finalist, "distill", made.model))


def _settings(job: Job, model: nn.Module, seconds: float) -> dict[str, Any]:
    """Epochs that fit into the time: one training step of three batches is timed."""
    if job.data.train is None:
        return {"epochs": 0, "lr": 0.0}
    model.eval()
    calls, teacher = job.calibration[:3], Teacher(job.model, cache_bytes=0)
    began = time.monotonic()
    for call in calls:
        teacher(call)
        first_output(model(*call.args, **call.kwargs)).sum().backward()  # type: ignore[no-untyped-call]
    per_batch = (time.monotonic() - began) / max(len(calls), 1)
    model.zero_grad(set_to_none=True)
    try:
        batches = len(job.data.train)  # type: ignore[arg-type]
    except TypeError:
        batches = sum(1 for _ in job.data.calls("train"))
    epochs = int(seconds / max(per_batch * batches * 1.3, 1e-6))
    return {"epochs": max(0, min(EPOCHS, epochs)), "lr": 2e-3, "seconds_per_batch": per_batch, "batches": batches}


def aligned_taps(graph: Graph, plan: Plan) -> list[FeatureTap]:
    """Modules that are skippable regions and stay: their outputs in student and teacher, channel by channel."""
    gone = graph.gone(plan)
    taps = []
    for region in graph.regions:
        labels = graph.labels.get(region.output)
        if region.module is None or region.name in plan.skips or not isinstance(labels, Labels) or len(labels.shape) < 2:
            continue
        varying = labels.varying
        if not varying:
            continue
        axis = varying[0]
        kept = (kept_indices(labels.planes, gone) or {}).get(axis)
        taps.append(FeatureTap(region.module, None if kept is None else tuple(int(i) for i in kept), axis))
    return taps


def _ship(job: Job, finalist: Finalist, plan: Plan, made: Cut, program: Program, steps: list[dict[str, Any]]) -> Candidate:
    folder = job.folder(finalist.name)
    path = folder / "model.onnx"
    layers = set(plan.formats)
    quantized: Quantized | None = None
    extra: dict[str, Any] = {}
    if layers:
        quantized, extra = _quantize(job, program, layers)
        plan = Plan(plan.fingerprint, plan.widths, plan.skips, dict.fromkeys(plan.formats, extra.pop("bits")))
        view, grids, notes = lower_quantized(job.target, quantized, path, job.example, job.example_kwargs)
        values = unfold_state(quantized.folded, quantized.program.tensors, program.tensors)
        load_tensors(made.model, values)
        evidence = Quantized(quantized.folded, grids, quantized.weights, quantized.sites).by_address()
    else:
        view, notes = lower_program(job.target, program, path, job.example, job.example_kwargs)
        evidence = {}
    checked = verify_file(job, view, path, expected_formats(program, quantized), least_snr(quantized))
    facts = {
        "form": made.form,
        "form_reason": made.reason,
        "proof": {"error": made.proof.error, "holds": made.proof.holds},
        "parity": checked,
        "lowering": notes,
        "format": finalist.precision,
        "predicted": {"latency_ms": finalist.predicted_ms},
        "profiled_ms": finalist.measured_ms,
        "steps": steps,
        **extra,
    }
    return finish(job, finalist.name, plan, made.model, view if layers else None, program, evidence, facts, made.removed)


def _quantize(job: Job, program: Program, layers: set[str]) -> tuple[Quantized, dict[str, Any]]:
    """Integers with the target's safe scales; where these are needed, 7-bit weights are tried too and the better ones stay."""
    tried = {}
    rule = job.target.least_scale()
    options = [("int8", rule), ("w7a8", None)] if rule is not None else [("int8", None)]
    for name, scale in options:
        quantized = quantize_program(program, layers, job.calibration, formats=Bits.parse(name), least_scale=scale)
        tried[name] = (job.divergence(quantized.view()), quantized)
    best = min(tried, key=lambda n: tried[n][0])
    label = {"int8": "pair-safe 8-bit" if rule is not None else "8-bit", "w7a8": "7-bit"}
    return tried[best][1], {"bits": best, "weights": label[best], "weights_tried": {label[n]: loss for n, (loss, _) in tried.items()}}
