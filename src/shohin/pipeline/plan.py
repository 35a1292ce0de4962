"""Plan: loss tables from saliency and views, choices for several budgets, finalists that were timed for real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shohin.candidate import Candidate
from shohin.errors import ShohinError
from shohin.pipeline.job import Job
from shohin.pipeline.timing import group_counts, plan_of, precisions, time_choices
from shohin.planning.choice import Choice
from shohin.planning.features import Features
from shohin.planning.front import Point, Precision, front
from shohin.planning.latency import LatencyModel
from shohin.planning.loss import correct, loss_table
from shohin.planning.options import GroupOptions, RegionOption
from shohin.planning.resources import Costs
from shohin.program import with_graph
from shohin.pruning.layerwise import refit
from shohin.pruning.saliency import group_saliency
from shohin.quantization import quantizable, quantize_program
from shohin.surgery import rewrite, view, view_of

Tick = Callable[[], None]
#: latencies, as shares of the original's in float32, for which plans are made
FRACTIONS = (0.08, 0.12, 0.17, 0.25, 0.35, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Finalist:
    """A choice that will be built.

    Args:
        name: of the candidate.
        choice: what it chooses.
        predicted_ms: by a latency model that had not seen it.
        measured_ms: of the same operations with made-up grids, in the interleaving with the baseline.
        loss: estimated increase of the loss.
        view_loss: divergence of its view from the original, after layer-wise refitting.
        precision: name of the assignment of formats.
    """

    name: str
    choice: Choice
    predicted_ms: float
    measured_ms: float
    loss: float
    view_loss: float
    precision: str

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {**{k: v for k, v in vars(self).items() if k != "choice"}, "choice": self.choice.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Finalist:
        """The inverse of `to_json`."""
        return Finalist(**{**data, "choice": Choice.from_json(data["choice"])})


def saliencies(job: Job, tick: Tick) -> dict[str, list[float]]:
    """Group -> saliency of each unit (journaled)."""
    if "prune" not in job.methods or not job.graph.groups:
        return {g.name: [0.0] * g.size for g in job.graph.groups}
    found: dict[str, list[float]] = job.run.once(
        "saliency",
        "",
        lambda: {n: s.tolist() for n, s in group_saliency(job.graph, job.data, job.calibration, seed=job.seed, tick=tick).items()},
    )
    return found


def tables(job: Job, saliency: Mapping[str, list[float]], tick: Tick) -> tuple[list[GroupOptions], list[RegionOption], list[Precision]]:
    """Options with losses: second-order tables scaled to losses of views that cut one group; regions and formats measured."""
    measured = job.run.once("tables", "", lambda: _measure_tables(job, saliency, tick))
    counts = group_counts(job.graph, job.target.vector_width)
    if "prune" not in job.methods:
        counts = {n: GroupOptions(n, g.size, (g.size,), np.zeros(1)) for n, g in counts.items()}
    options = {n: replace(g, loss=loss_table(saliency[n], g.counts)) for n, g in counts.items()}
    options = correct(options, {(name, int(count)): loss for name, count, loss in measured["groups"]})
    regions = [RegionOption(name, loss) for name, loss in measured["regions"]]
    kinds, losses = precisions(job), dict(measured["precisions"])
    # a float segment costs time: it is planned with only where it saves a third of what int8 everywhere loses
    worth = [n for n, loss in losses.items() if n in ("float32", "int8") or loss < 2 / 3 * losses["int8"]]
    return list(options.values()), regions, [Precision(name, kinds[name], losses[name]) for name in worth]


def _measure_tables(job: Job, saliency: Mapping[str, list[float]], tick: Tick) -> dict[str, Any]:
    graph, groups, regions = job.graph, [], []
    counts = group_counts(graph, job.target.vector_width)
    if "prune" in job.methods:
        for name, options in counts.items():
            if len(options.counts) > 1:
                count = options.nearest(0.5) if options.nearest(0.5) < options.size else options.counts[0]
                choice = Choice({**graph.sizes, name: count})
                groups.append([name, count, job.divergence(view(graph, plan_of(graph, choice, dict(saliency))))])
            tick()
    if "skip" in job.methods:
        for region in graph.regions:
            try:
                loss = job.divergence(view(graph, plan_of(graph, Choice(graph.sizes, frozenset((region.name,))))))
            except ShohinError:
                continue
            regions.append([region.name, loss])
            tick()
    kinds = []
    for name, int8 in precisions(job).items():
        loss = 0.0
        if int8:
            quantized = quantize_program(
                graph.program, set(int8) & set(quantizable(graph.program)), job.calibration, least_scale=job.target.least_scale()
            )
            loss = job.divergence(quantized.view())
        kinds.append([name, loss])
        tick()
    return {"groups": groups, "regions": regions, "precisions": kinds}


def bounds(job: Job, baseline: Candidate, whole_ms: float) -> dict[str, float]:
    """The budget's cost bounds in the units of planning. ``whole_ms``: the baseline's latency in the profile's interleaving."""
    values = baseline.metrics.values()
    out = {}
    for metric, limit in job.budget.limits.items():
        if metric == "latency_ms":
            out[metric] = limit.absolute(whole_ms)
        elif metric == "size_bytes":
            out[metric] = limit.absolute(values["size_bytes"])
    return out


def finalists(
    job: Job, model: LatencyModel, baseline: Candidate, saliency: dict[str, list[float]], tick: Tick, count: int
) -> list[Finalist]:
    """The choices to build (journaled): planned, viewed, timed; the latency model is refitted until its favourites fit."""
    data = job.run.once("plan", "", lambda: _finalists(job, model, baseline, saliency, tick, count))
    return [Finalist.from_json(f) for f in data["finalists"]]


def _finalists(
    job: Job, model: LatencyModel, baseline: Candidate, saliency: dict[str, list[float]], tick: Tick, count: int
) -> dict[str, Any]:
    options, regions, kinds = tables(job, saliency, tick)
    profile = (job.run.find("profile") or {"data": {}})["data"]
    whole = Choice(job.graph.sizes)
    limits = bounds(job, baseline, profile["ms"][0])
    fixed = _fixed_bytes(model, profile)
    timed: dict[str, tuple[float, float]] = {}  # digest -> (measured, predicted before it was seen)
    unmet: list[str] = []
    rounds = []
    for number in range(3):
        costs = Costs(model, fixed_bytes=fixed)
        found, failed = front(costs, options, regions, precisions=kinds, fractions=FRACTIONS, budgets=limits)
        if not found:  # no plan keeps the cost bounds: what is possible is built and shown, with what binds
            nearest = min(failed, key=lambda p: max(value / bound for value, bound in p.plan.misses.values()))
            unmet = [nearest.plan.binding]
            found = [nearest, *front(costs, options, regions, precisions=kinds, fractions=FRACTIONS)[0]]
        picked = _pick(job, found, limits, saliency, count)
        new = [p for p in picked if p.plan.choice.digest not in timed]
        if not new:
            break
        results = time_choices(job, [whole, *[p.plan.choice for p in new]], tick)
        scale = profile["ms"][0] / results[whole.digest]["ms"]
        for p in new:
            timed[p.plan.choice.digest] = (results[p.plan.choice.digest]["ms"] * scale, model.predict(p.plan.choice))
        model = model.refit([p.plan.choice for p in new], [timed[p.plan.choice.digest][0] for p in new])
        rounds.append({"round": number, "new": len(new)})
        over = [p for p in picked if timed[p.plan.choice.digest][0] > limits.get("latency_ms", float("inf")) * 1.0]
        if not over:
            break
    picked = _pick(job, found, limits, saliency, count)
    picked = [p for p in picked if p.plan.choice.digest in timed]
    out = []
    for i, p in enumerate(picked):
        measured, predicted = timed[p.plan.choice.digest]
        label = "float" if p.precision == "float32" else "int8"
        out.append(
            Finalist(
                f"c{i + 1}-{label}", p.plan.choice, predicted, measured, p.plan.loss, view_loss(job, p.plan.choice, saliency), p.precision
            ).to_json()
        )
    if "int8" in {k.name for k in kinds} and not any(
        p.plan.choice.kept == whole.kept and p.precision == "int8" and not p.plan.choice.skipped for p in picked
    ):
        choice = Choice(job.graph.sizes, frozenset(), precisions(job)["int8"])
        results = time_choices(job, [whole, choice], tick)
        measured = results[choice.digest]["ms"] * profile["ms"][0] / results[whole.digest]["ms"]
        out.append(
            Finalist(
                "c0-int8-only", choice, model.predict(choice), measured, next(k.loss for k in kinds if k.name == "int8"), 0.0, "int8"
            ).to_json()
        )
    return {
        "finalists": out,
        "note": "relinearized",
        "rounds": rounds,
        "unmet": unmet,
        "predictions": [{"name": f["name"], "latency_ms": f["predicted_ms"], "loss": f["loss"]} for f in out],
        "front": [
            {"latency_ms": p.plan.predicted["latency_ms"], "loss": p.plan.loss, "precision": p.precision, "gap": p.plan.gap} for p in found
        ],
    }


def _fixed_bytes(model: LatencyModel, profile: Mapping[str, Any]) -> float:
    """Bytes of a file that are not weights, from the files that were timed: of the precision that has more of them."""
    costs = Costs(model)
    rests: dict[bool, list[float]] = {}
    for choice, size in zip(model.choices, profile["sizes"], strict=False):
        rests.setdefault(bool(choice.int8), []).append(size - costs.of(choice, ["size_bytes"])["size_bytes"])
    return max(float(np.median(r)) for r in rests.values())


def _pick(job: Job, found: list[Point], limits: Mapping[str, float], saliency: dict[str, list[float]], count: int) -> list[Point]:
    """The planned points to go on with, best first: the least loss within the budget, then others spread over faster ones.

    Only points that no other beats on latency and estimated loss are looked at; their views decide.
    """
    front_points: list[Point] = []
    for p in sorted(found, key=lambda p: (p.plan.predicted["latency_ms"], p.plan.loss)):
        if not front_points or p.plan.loss < front_points[-1].plan.loss:
            front_points.append(p)
    if not front_points:
        return []
    candidates = front_points[::-1][: 3 * count + 1]
    losses = {p.plan.choice.digest: view_loss(job, p.plan.choice, saliency) + _offset(job, p.precision) for p in candidates}
    best = min(candidates, key=lambda p: losses[p.plan.choice.digest])
    picked = [best]
    for share in (0.7, 0.45, 0.3, 0.2)[: count - 1]:
        target = best.plan.predicted["latency_ms"] * share
        near = [p for p in candidates if p not in picked and p.plan.predicted["latency_ms"] < best.plan.predicted["latency_ms"]]
        if near:
            picked.append(min(near, key=lambda p: (abs(p.plan.predicted["latency_ms"] - target), losses[p.plan.choice.digest])))
    return picked


def _offset(job: Job, precision: str) -> float:
    entry = job.run.find("tables")
    return next((float(loss) for name, loss in entry["data"]["precisions"] if name == precision), 0.0) if entry else 0.0


def view_loss(job: Job, choice: Choice, saliency: dict[str, list[float]]) -> float:
    """Divergence of the float view of a choice after layer-wise refitting (journaled by choice)."""
    widths = Choice(choice.kept, choice.skipped)
    return float(job.run.once("view", widths.digest, lambda: _view_loss(job, widths, saliency)))


def _view_loss(job: Job, choice: Choice, saliency: dict[str, list[float]]) -> float:
    plan = plan_of(job.graph, choice, saliency)
    if plan.is_identity:
        return 0.0
    rewritten = rewrite(job.graph, plan)
    start = {n: rewritten.slice(n, t.detach()) for n, t in job.graph.program.tensors.items()}
    values = refit(job.graph, plan, rewritten, start, job.calibration, seed=job.seed)
    module = view_of(job.graph, rewritten)
    from shohin.pipeline.job import load_tensors

    load_tensors(module, values)
    return job.divergence(module)


__all__ = ["Features", "Finalist", "finalists", "saliencies", "tables", "view_loss", "with_graph"]
