"""From a program with values to a verified file: lower, inspect, compare with the view, measure, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shohin.candidate import Candidate, Measurement, Metrics
from shohin.data import Call
from shohin.errors import RunError, TargetError
from shohin.formats import Quantizer
from shohin.pipeline.job import Job
from shohin.plan import Plan
from shohin.program import Program, ProgramModule, fold
from shohin.quantization import Quantized, placeholder, quantizable, simulate
from shohin.run import checksum, read_json, read_tensors, write_json, write_tensors
from shohin.targets import CannotNarrow, Prepared, Target
from shohin.targets.parity import boundaries, parity

#: largest difference between view and file, relative to the largest output: float files, and integer files (a rounding tie
#: in float32 may move a code by one step, and the step grows through the net)
TOLERANCES = {"float32": 1e-4, "int8": 0.05}
#: where rounding alone is between the two, decibels that the view's answers stand above the difference, whatever single outputs do. Ranges of
#: the values at hand amplify ties: a code that differs at the largest value of a tensor moves the codes of all others
LEAST_SNR = {"static": 30.0, "dynamic": 15.0}


def lower_program(
    target: Target, program: Program, path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, folded: bool = True
) -> tuple[nn.Module, list[str]]:
    """Writes a float file. Returns the module it equals, and notes."""
    module = ProgramModule(fold(program).program if folded else program)
    lowered = target.lower(module, args, path, kwargs=kwargs)
    return module, list(lowered.notes)


def lower_quantized(
    target: Target, quantized: Quantized, path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Quantizer], list[str]]:
    """Writes an integer file. Returns the view that it equals, its activation grids by node, and notes."""
    program, grids = quantized.program, quantized.sites.grids
    own = [n for n in quantized.activations if grids[n] == n]  # what only moves takes its source's grid by the target's own rules
    outside = dict(zip(program.inputs, program.input_names, strict=True))
    names = {n: (program.origins[n].address if n in program.origins else outside[n]) for n in own}
    taps = tuple(n for n in own if n in program.origins)
    lowered = target.lower(
        ProgramModule(program, taps=taps),
        args,
        path,
        kwargs=kwargs,
        taps=[names[n] for n in taps],
        activations={names[n]: quantized.activations[n] for n in own},
        weights=quantized.weights,
        dynamic=quantized.dynamic,
    )
    used = {n: lowered.activations[names[grids[n]]] for n in quantized.activations if names[grids[n]] in lowered.activations}
    notes = [f"{name}: {why}" for name, why in lowered.adjusted.items()] + list(lowered.notes)
    return simulate(program, used, quantized.sites.readers, quantized.inputs), used, notes


def lower_for_timing(
    target: Target,
    program: Program,
    int8: frozenset[str],
    path: Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    prepared: Prepared | None = None,
    skips: Mapping[str, str] | None = None,
) -> bool:
    """Writes a file with the right operations and meaningless grids.

    Args:
        prepared: the full folded program, exported once.
        skips: output -> input node name of the regions that ``program`` skips.

    Returns:
        True if the file was narrowed from ``prepared``, False if it was lowered in full.
    """
    layers = int8 & set(quantizable(program))
    quantized = placeholder(program, set(layers)) if layers else None
    if prepared is not None:
        try:
            if quantized is None:
                prepared.variant(fold(program).program, path, skips=skips)
            else:
                own = {n: q for n, q in quantized.activations.items() if quantized.sites.grids[n] == n}  # as in `lower_quantized`
                prepared.variant(quantized.program, path, skips=skips, activations=own, weights=quantized.weights)
            return True
        except CannotNarrow:
            pass
    if quantized is not None:
        lower_quantized(target, quantized, path, args, kwargs)
    else:
        lower_program(target, program, path, args, kwargs)
    return False


def expected_formats(program: Program, quantized: Quantized | None) -> dict[str, str]:
    """Weight name -> "int8", "float32" or the scheme of a weight beside float activations, for every layer."""
    chosen = quantized.weight_formats() if quantized else {}
    weights = {}
    layers = set(quantizable(program))
    for node in program.graph.nodes:
        if node.op == "call_function" and program.origins[node.name].address in layers:
            name = program.names[node.args[1].name]
            weights[name] = chosen.get(name, "float32")
    return weights


def least_snr(quantized: Quantized | None) -> float | None:
    """Of `LEAST_SNR` that of a program; None if it rounds no activation."""
    if quantized is None or not (quantized.activations or quantized.inputs):
        return None
    return LEAST_SNR["dynamic" if quantized.dynamic else "static"]


def verify_file(job: Job, view: nn.Module, path: Path, expected: Mapping[str, str], snr: float | None) -> dict[str, Any]:
    """`verify_export` on the first held-out batches of a job."""
    return verify_export(job.target, view, path, expected, job.held_out[:2], snr=snr)


def verify_export(
    target: Target, view: nn.Module, path: Path, expected: Mapping[str, str], calls: Sequence[Call], *, snr: float | None
) -> dict[str, Any]:
    """Parity at each boundary and the check of what really runs; inputs and the view's answers are stored beside the file.

    Args:
        snr: see `least_snr`.

    Raises:
        TargetError: if the file departs from the view.
    """
    view.eval()
    tolerance = TOLERANCES["float32" if snr is None else "int8"]
    departs = target.check(path, expected)
    found = boundaries(view, path, target, calls, tolerance)
    if not _passes(found["view_runtime"], snr):
        raise TargetError(
            f"{path.name} does not equal the view: relative difference {found['view_runtime']['max_rel']:.2e} on the training batches, "
            f"tolerance {tolerance}; the file is not handed over"
        )
    _store_parity(view, path, target, calls[0], tolerance, snr)
    return {"boundaries": found, "departs": departs, "tolerance": tolerance}


def _store_parity(view: nn.Module, path: Path, target: Target, call: Call, tolerance: float, snr: float | None, samples: int = 16) -> None:
    """What `verify_stored` needs: a few inputs, the view's answers, the tolerance and the file's checksum."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    leaves = [a[:samples] if isinstance(a, torch.Tensor) and a.dim() else a for a in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        outputs = [t for t in pytree.tree_leaves(view(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    tensors = {f"input.{i}": a for i, a in enumerate(leaves) if isinstance(a, torch.Tensor)}
    tensors |= {f"output.{i}": t for i, t in enumerate(outputs)}
    write_tensors(path.with_suffix(".parity.safetensors"), tensors)
    plain = [None if isinstance(a, torch.Tensor) else a for a in leaves]
    facts = {"tolerance": tolerance, "least_snr": snr, "checksum": checksum(path), "call": pytree.treespec_dumps(spec), "plain": plain}
    facts |= {"target": target.name}
    write_json(path.with_suffix(".parity.json"), facts)


def verify_stored(path: Path) -> dict[str, Any]:
    """Runs a file on the inputs stored beside it and compares with the view's stored answers.

    Raises:
        RunError: if nothing is stored beside the file, or the file is not the one that was stored.
    """
    from shohin.targets import get_target

    facts = read_json(path.with_suffix(".parity.json"))
    if checksum(path) != facts["checksum"]:
        raise RunError(f"{path} is damaged or was replaced: its checksum is not the stored one")
    tensors = read_tensors(path.with_suffix(".parity.safetensors"))
    leaves = [tensors.get(f"input.{i}", value) for i, value in enumerate(facts["plain"])]
    args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(facts["call"]))
    outputs = [tensors[f"output.{i}"] for i in range(sum(k.startswith("output.") for k in tensors))]
    runner = get_target(facts.get("target", "onnxruntime")).runner(path)
    found = parity(lambda *a, **k: outputs, runner, [Call(args, kwargs, None, None)], facts["tolerance"])
    return {**found, "passes": _passes(found, facts.get("least_snr", LEAST_SNR["static"] if facts.get("integer") else None))}


def _passes(found: Mapping[str, Any], snr: float | None) -> bool:
    """Integer files: single outputs may differ by several steps while the signal-to-noise ratio shows rounding only."""
    return bool(found["passes"]) or (snr is not None and found["snr_db"] is not None and found["snr_db"] >= snr)


def finish(
    job: Job,
    name: str,
    plan: Plan,
    model: nn.Module,
    view: nn.Module | None,
    program: Program,
    evidence: Mapping[str, Quantizer],
    notes: Mapping[str, Any],
    removed: dict[str, dict[int, list[int]]],
) -> Candidate:
    """Measures quality, size and static costs on the file that ``model.onnx`` in the candidate's folder is, and saves all."""
    folder = job.folder(name)
    path = folder / "model.onnx"
    runner = job.target.runner(path)
    quality = job.data.quality(runner)
    metrics = Metrics(
        quality=Measurement(quality, "measured: the metric over the shipped file, on validation", job.target.conditions),
        size_bytes=Measurement(float(path.stat().st_size), "measured: bytes of the file"),
        macs=Measurement(job.graph.macs(plan), "estimated: counted from shapes, one sample"),
        params=Measurement(
            float(sum(program.tensors[n].numel() for n in program.trainable if n in program.tensors)), "estimated: counted from shapes"
        ),
    )
    candidate = Candidate(name, plan, model, view, dict(evidence), path, metrics, dict(notes), removed)
    save(job, candidate)
    return candidate


def save(job: Job, candidate: Candidate) -> None:
    """Writes a candidate's folder; candidate.json last, so that a candidate without one is unfinished."""
    folder = job.folder(candidate.name)
    if candidate.model is not None and not (folder / "model.safetensors").exists():
        write_tensors(folder / "model.safetensors", {k: v for k, v in candidate.model.state_dict().items() if isinstance(v, torch.Tensor)})
    write_json(folder / "candidate.json", candidate_json(candidate))


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """All but tensors and the file."""
    folder = candidate.artifact.parent if candidate.artifact else None
    files = ("model.onnx", "model.safetensors")
    return {
        "name": candidate.name,
        "plan": candidate.plan.to_json(),
        "metrics": candidate.metrics.to_json(),
        "notes": candidate.notes,
        "evidence": {name: q.to_json() for name, q in candidate.evidence.items()},
        "removed": {name: {str(axis): gone for axis, gone in axes.items()} for name, axes in candidate.removed.items()},
        "checksums": {f: checksum(folder / f) for f in files if folder and (folder / f).exists()},
    }


def baseline(job: Job) -> Candidate:
    """The unchanged model as a candidate: exported as it is, verified, measured."""
    path = job.folder("baseline") / "model.onnx"
    view, notes = lower_program(job.target, job.graph.program, path, job.example, job.example_kwargs, folded=False)
    checked = verify_file(job, view, path, expected_formats(job.graph.program, None), None)
    plan = Plan(job.graph.program.fingerprint)
    facts = {"form": "original", "parity": checked, "lowering": notes, "format": "float32"}
    return finish(job, "baseline", plan, job.model, None, job.graph.program, {}, facts, {})


def with_latency(job: Job, names: list[str]) -> None:
    """Measures the named candidates against each other: latency over five processes in one interleaving each, and peak memory."""
    chosen = {name: job.candidates[name] for name in names}
    files = {name: c.artifact for name, c in chosen.items() if c.artifact}
    entry = job.run.once("measure", ",".join(names), lambda: _measure(job, files))
    for name, c in chosen.items():
        row = entry[name]
        timing = row["timing"]
        conditions = {**timing["conditions"], "ratio": row["ratio"], "ratio_low": row["low"], "ratio_high": row["high"]}
        c.metrics = replace(
            c.metrics,
            latency_ms=Measurement(timing["value"], f"measured: {timing['how']}", conditions, timing["spread"]),
            memory_bytes=Measurement.from_json(row["memory"]),
        )
        c.notes["latency_ratio"] = [row["ratio"], row["low"], row["high"]]
        save(job, c)


def _measure(job: Job, files: Mapping[str, Path]) -> dict[str, Any]:
    ratios = job.target.compare(files, job.example, kwargs=job.example_kwargs, reference="baseline", seed=job.seed)
    return {
        name: {**ratio.to_json(), "memory": job.target.memory(files[name], job.example, kwargs=job.example_kwargs).to_json()}
        for name, ratio in ratios.items()
    }
