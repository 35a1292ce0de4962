"""Profile: a latency model from whole-model timings of random plans, kept between runs on the same machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shohin.errors import RunError, TargetError
from shohin.graph import Graph
from shohin.pipeline.formats import MAIN, worthwhile
from shohin.pipeline.job import Job, cache_folder
from shohin.pipeline.ship import lower_for_timing
from shohin.plan import Plan
from shohin.planning.choice import Choice
from shohin.planning.features import Features
from shohin.planning.latency import LatencyModel, random_choices
from shohin.planning.widths import group_counts, plan_of
from shohin.program import Program, fold, with_graph
from shohin.run import read_json, write_json
from shohin.surgery import rewrite
from shohin.targets import Prepared

#: random plans that are timed for each precision
TIMED = 12


def program_of(graph: Graph, plan: Plan) -> Program:
    """The program through a plan, with sliced values."""
    rewritten = rewrite(graph, plan)
    return with_graph(graph.program, rewritten.graph, rewritten.sliced())


def profile(job: Job, tick: Any) -> LatencyModel:
    """The latency model of the job's graph on its target (journaled; timings are cached by machine and conditions)."""
    graph = job.graph
    features = Features(graph.costs, graph.edges)
    options = group_counts(graph, job.target.vector_width)
    kinds = worthwhile(job)
    regions = [r.name for r in graph.regions if r.residual] if "skip" in job.methods else []
    choices = []
    for number, precision in enumerate(kinds):  # one set for all seeds: it is cached
        count = TIMED if precision.name in MAIN else 4
        choices += random_choices(options, count, number, regions=regions, precisions=(precision.int8,))
    data = job.run.once("profile", "", lambda: _profile(job, features, choices, tick))
    if data["choices"] != [c.digest for c in choices]:
        raise RunError(f"{job.run.folder} was profiled by another version of Shohin, or on another kind of processor: use another folder")
    return LatencyModel.fit(features, choices, data["ms"])


def _profile(job: Job, features: Features, choices: Sequence[Choice], tick: Any) -> dict[str, Any]:
    timed = time_choices(job, choices, tick)
    ms = [timed[c.digest]["ms"] for c in choices]
    model = LatencyModel.fit(features, choices, ms)
    spreads = [timed[c.digest]["spread"] for c in choices]
    return {
        "choices": [c.digest for c in choices],
        "ms": ms,
        "fallbacks": int(sum(row.get("fallback", 0.0) for row in timed.values())),
        "sizes": [timed[c.digest]["bytes"] for c in choices],
        "repeatability": float(np.median(spreads)),
        "leave_one_out": {"median": float(np.median(model.errors)), "worst": float(model.errors.max())},
        "layers": layer_rows(job.graph, model, choices[0]),
        "environment": job.target.environment(),
    }


def layer_rows(graph: Graph, model: LatencyModel, whole: Choice) -> list[dict[str, Any]]:
    """The table of layers: MACs, parameters, attributed milliseconds."""
    times = model.operator_ms(whole)
    rows = []
    for op in graph.costs:
        macs, _, weights = op.amounts(whole.kept)
        rows.append(
            {
                "address": op.address,
                "kind": op.kind,
                "macs": macs,
                "params": weights,
                "bytes": 4 * weights,
                "ms_before": times[op.address],
                "format": "float32",
            }
        )
    return rows


def time_choices(job: Job, choices: Sequence[Choice], tick: Any) -> dict[str, dict[str, float]]:
    """Choice digest -> {"ms", "spread", "bytes", "fallback"}, measured in one interleaving, or from the cache.

    The files are narrowed from one export; "fallback" is 1 for a choice that had to be lowered in full.
    """
    key = _cache_key(job, choices)
    cached = cache_folder() / "latency" / f"{key}.json"
    with contextlib.suppress(RunError):  # missing, or damaged: it is only a cache
        found: dict[str, dict[str, float]] = read_json(cached)
        return found
    with tempfile.TemporaryDirectory(prefix="shohin-") as folder:
        files: dict[str, Path] = {}
        fallback = {}
        prepared = None
        for choice in choices:
            path = Path(folder) / f"{choice.digest}.onnx"
            if choice.digest not in files:
                if not files:
                    prepared = _prepare(job)
                plan = plan_of(job.graph, choice)
                program, skips = program_of(job.graph, plan), skipped_nodes(job.graph, plan)
                narrowed = lower_for_timing(job.target, program, choice.int8, path, job.example, job.example_kwargs, prepared, skips)
                files[choice.digest], fallback[choice.digest] = path, float(not narrowed)
            tick()
        timings = job.target.measure(files, job.example, kwargs=job.example_kwargs, seed=job.seed)
        result = {
            d: {"ms": t.value, "spread": t.spread, "bytes": float(files[d].stat().st_size), "fallback": fallback[d]}
            for d, t in timings.items()
        }
    write_json(cached, result)
    return result


def _prepare(job: Job) -> Prepared | None:
    """The folded program, exported once; None if the target or the program does not allow it."""
    try:
        return job.target.prepare(fold(job.graph.program).program, job.example, kwargs=job.example_kwargs)
    except TargetError:
        return None  # lowering each file in full will say what is wrong, or work


def skipped_nodes(graph: Graph, plan: Plan) -> dict[str, str]:
    """Output -> input node name of each region that a plan skips, in the folded program."""
    before = {n.name: n for n in graph.program.graph.nodes}
    folded = {n.name for n in fold(graph.program).program.graph.nodes}

    def name(node: Any) -> str:
        while node.name not in folded:  # a normalization: its values are now those of the layer before it
            node = node.args[0]
        return str(node.name)

    return {name(before[r.output]): name(before[r.input]) for r in map(graph.region, plan.skips)}


def _cache_key(job: Job, choices: Sequence[Choice]) -> str:
    environment = job.target.environment()
    inputs = torch.utils._pytree.tree_leaves((job.example, job.example_kwargs))
    parts = [
        2,  # of this format
        job.graph.program.fingerprint,
        sorted(environment.items(), key=str),
        [c.digest for c in choices],
        [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else repr(x) for x in inputs],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
