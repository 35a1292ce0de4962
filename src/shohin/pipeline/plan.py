"""Plan: loss tables from saliency and views, choices for several budgets, finalists that were timed for real."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shohin.candidate import Candidate
from shohin.errors import PlanError
from shohin.pipeline.formats import worthwhile
from shohin.pipeline.job import Job, load_tensors
from shohin.pipeline.timing import time_choices
from shohin.planning.choice import Choice
from shohin.planning.front import Point, Precision, front
from shohin.planning.latency import LatencyModel
from shohin.planning.loss import correct, loss_table
from shohin.planning.options import GroupOptions, RegionOption
from shohin.planning.resources import Costs
from shohin.planning.widths import group_counts, plan_of
from shohin.pruning.criteria import CRITERIA, Inputs
from shohin.pruning.layerwise import refit
from shohin.pruning.sensitivity import of_groups, of_regions
from shohin.surgery import rewrite, view_of

Tick = Callable[[], None]
#: latencies (or sizes), as shares of the original's in float32, for which plans are made
FRACTIONS = (0.08, 0.12, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0)


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
        lambda: {n: s.tolist() for n, s in CRITERIA["taylor"](Inputs(job.graph, job.data, job.calibration, job.seed, tick)).items()},
    )
    return found


def tables(job: Job, saliency: Mapping[str, list[float]], tick: Tick) -> tuple[list[GroupOptions], list[RegionOption]]:
    """Options with losses: second-order tables scaled to losses of views that cut one group; regions measured."""
    measured = job.run.once("tables", "", lambda: _measure_tables(job, saliency, tick))
    counts = group_counts(job.graph, job.target.vector_width)
    if "prune" not in job.methods:
        counts = {n: GroupOptions(n, g.size, (g.size,), np.zeros(1)) for n, g in counts.items()}
    options = {n: replace(g, loss=loss_table(saliency[n], g.counts)) for n, g in counts.items()}
    options = correct(options, {(name, int(count)): loss for name, count, loss in measured["groups"]})
    regions = [RegionOption(name, loss) for name, loss in measured["regions"]]
    return list(options.values()), regions


def _measure_tables(job: Job, saliency: Mapping[str, list[float]], tick: Tick) -> dict[str, Any]:
    counts = group_counts(job.graph, job.target.vector_width)
    residual = [r.name for r in job.graph.regions if r.residual]
    return {
        "groups": of_groups(job.graph, counts, saliency, job.divergence, tick) if "prune" in job.methods else [],
        "regions": of_regions(job.graph, residual, job.divergence, tick) if "skip" in job.methods else [],
    }


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


@dataclass
class _Search:
    """What the rounds of planning have found.

    Args:
        model: latency model, refitted with every favourite that was timed.
        found: planned points of the last round.
        picked: the favourites among them.
        timed: choice digest -> (milliseconds, prediction by a model that had not seen it).
        unmet: what binds, if no plan keeps the cost bounds.
        rounds: for the journal.
    """

    model: LatencyModel
    found: list[Point] = field(default_factory=list)
    picked: list[Point] = field(default_factory=list)
    timed: dict[str, tuple[float, float]] = field(default_factory=dict)
    unmet: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)


def _finalists(
    job: Job, model: LatencyModel, baseline: Candidate, saliency: dict[str, list[float]], tick: Tick, count: int
) -> dict[str, Any]:
    kinds = worthwhile(job)
    search = _search(job, model, baseline, saliency, kinds, tick, count)
    out = []
    for i, p in enumerate(search.picked):
        name = f"c{i + 1}-{'float' if p.precision == 'float32' else 'int8'}"
        out.append(_finalist(job, search, name, p.plan.choice, p.plan.loss, p.precision, saliency))
    plain = next((k for k in kinds if k.name == "int8"), None)
    if plain is not None:  # integers alone are always worth a look, and first: they need no training
        choice = Choice(job.graph.sizes, frozenset(), plain.int8)
        if choice not in [p.plan.choice for p in search.picked]:
            _time(job, search, [choice], tick)
            out.insert(0, _finalist(job, search, "c0-int8-only", choice, plain.loss, plain.name, saliency))
    return {
        "finalists": [f.to_json() for f in out],
        "note": "relinearized",
        "rounds": search.rounds,
        "unmet": search.unmet,
        "predictions": [{"name": f.name, "latency_ms": f.predicted_ms, "loss": f.loss} for f in out],
        "front": [
            {"latency_ms": p.plan.predicted["latency_ms"], "loss": p.plan.loss, "precision": p.precision, "gap": p.plan.gap}
            for p in search.found
        ],
    }


def _finalist(
    job: Job, search: _Search, name: str, choice: Choice, loss: float, precision: str, saliency: dict[str, list[float]]
) -> Finalist:
    measured, predicted = search.timed[choice.digest]
    return Finalist(name, choice, predicted, measured, loss, view_loss(job, choice, saliency), precision)


def _search(
    job: Job,
    model: LatencyModel,
    baseline: Candidate,
    saliency: dict[str, list[float]],
    kinds: list[Precision],
    tick: Tick,
    count: int,
) -> _Search:
    """Plans, times the favourites for real, and plans again with what was learnt, until they keep the bounds (three rounds)."""
    options, regions = tables(job, saliency, tick)
    profile = (job.run.find("profile") or {"data": {}})["data"]
    limits = bounds(job, baseline, profile["ms"][0])
    fixed = _fixed_bytes(model, profile)
    resource = "size_bytes" if "size_bytes" in limits and "latency_ms" not in limits else "latency_ms"
    search = _Search(model)
    for _ in range(3):
        costs = Costs(search.model, fixed_bytes=fixed)
        search.found, failed = front(costs, options, regions, precisions=kinds, fractions=FRACTIONS, budgets=limits, resource=resource)
        if not search.found:  # no plan keeps the cost bounds: what is possible is built and shown, with what binds
            nearest = min(failed, key=lambda p: max(value / bound for value, bound in p.plan.misses.values()))
            search.unmet = [f"by the estimates of planning: {nearest.plan.binding}"]
            search.found = [nearest, *front(costs, options, regions, precisions=kinds, fractions=FRACTIONS, resource=resource)[0]]
        search.picked = _pick(job, search.found, kinds, saliency, count)
        new = [p.plan.choice for p in search.picked if p.plan.choice.digest not in search.timed]
        if not new:
            break
        sizes = _time(job, search, new, tick)
        fixed += max(0.0, *(size - costs.of(c, ["size_bytes"])["size_bytes"] for c, size in zip(new, sizes, strict=True)))
        search.rounds.append({"timed": len(new)})
        slow = [p for p in search.picked if search.timed[p.plan.choice.digest][0] > limits.get("latency_ms", float("inf"))]
        large = [s for s in sizes if s > limits.get("size_bytes", float("inf"))]
        if not slow and not large:
            break
    return search


def _time(job: Job, search: _Search, choices: list[Choice], tick: Tick) -> list[float]:
    """Times choices against the whole model, notes predictions, and refits. Returns the files' sizes in bytes."""
    whole = Choice(job.graph.sizes)
    results = time_choices(job, [whole, *choices], tick)
    scale = (job.run.find("profile") or {"data": {}})["data"]["ms"][0] / results[whole.digest]["ms"]
    times = [results[c.digest]["ms"] * scale for c in choices]
    search.timed |= {c.digest: (t, _unseen(search.model, c)) for c, t in zip(choices, times, strict=True)}
    search.model = search.model.refit(choices, times)
    return [results[c.digest]["bytes"] for c in choices]


def _unseen(model: LatencyModel, choice: Choice) -> float:
    """Prediction by a fit that has not seen the choice (the whole model in integers is always among those that were timed)."""
    others = [i for i, c in enumerate(model.choices) if c != choice]
    if others and len(others) < len(model.choices):
        rest = LatencyModel.fit(model.features, [model.choices[i] for i in others], model.measured_ms[others], model.ridge)
        with contextlib.suppress(PlanError):  # nothing else ran its operations: then it cannot be foretold without it
            return rest.predict(choice)
    return model.predict(choice)


def _fixed_bytes(model: LatencyModel, profile: Mapping[str, Any]) -> float:
    """Bytes of a file that are not weights, from the files that were timed: of the precision that has more of them."""
    costs = Costs(model)
    rests: dict[bool, list[float]] = {}
    for choice, size in zip(model.choices, profile["sizes"], strict=False):
        rests.setdefault(bool(choice.int8), []).append(size - costs.of(choice, ["size_bytes"])["size_bytes"])
    return max(float(np.median(r)) for r in rests.values())


def _pick(job: Job, found: list[Point], kinds: list[Precision], saliency: dict[str, list[float]], count: int) -> list[Point]:
    """The planned points to go on with, best first: the least loss within the budget, then others spread over faster ones.

    Only points that no other beats on latency and estimated loss are looked at; their views decide.
    """
    front_points: list[Point] = []
    found = [p for p in found if not plan_of(job.graph, p.plan.choice).is_identity]  # the original is a candidate already
    original = (job.run.find("profile") or {"data": {}})["data"]["ms"][0]
    found = [p for p in found if p.plan.predicted["latency_ms"] < original] or found  # what is slower would be refused
    for p in sorted(found, key=lambda p: (p.plan.predicted["latency_ms"], p.plan.loss)):
        if not front_points or p.plan.loss < front_points[-1].plan.loss:
            front_points.append(p)
    if not front_points:
        return []
    offset = {k.name: k.loss for k in kinds}
    candidates = front_points[::-1][: 2 * count + 2]
    losses = {p.plan.choice.digest: view_loss(job, p.plan.choice, saliency) + offset[p.precision] for p in candidates}
    best = min(candidates, key=lambda p: losses[p.plan.choice.digest])
    picked = [best]
    for share in (0.7, 0.45, 0.3, 0.2)[: count - 1]:
        target = best.plan.predicted["latency_ms"] * share
        near = [p for p in candidates if p not in picked and p.plan.predicted["latency_ms"] < best.plan.predicted["latency_ms"]]
        if near:
            picked.append(min(near, key=lambda p: (abs(p.plan.predicted["latency_ms"] - target), losses[p.plan.choice.digest])))
    return picked


def view_loss(job: Job, choice: Choice, saliency: dict[str, list[float]]) -> float:
    """Divergence of the float view of a choice after layer-wise refitting (journaled by choice)."""
    widths = Choice(choice.kept, choice.skipped)
    return float(job.run.once("view", widths.digest, lambda: _view_loss(job, widths, saliency)))


def _view_loss(job: Job, choice: Choice, saliency: dict[str, list[float]]) -> float:
    plan = plan_of(job.graph, choice, saliency)
    if plan.is_identity:
        return 0.0
    rewritten = rewrite(job.graph, plan)
    start = rewritten.sliced()
    values = refit(job.graph, plan, rewritten, start, job.calibration, rows=2048, samples=max(job.view_samples, 64), seed=job.seed)
    module = view_of(job.graph, rewritten)
    load_tensors(module, values)
    return job.divergence(module)
