"""The shape of a report: one JSON-able dictionary, so that a page can be made again from a run folder.

Every field may be absent; the page leaves out what it does not know. What `shohin.report.collect` reads from the journal:

========== =====================================================================================================
stage      data
========== =====================================================================================================
capture    ``{"frozen": [FrozenRow], "groups": n, "regions": n}``
profile    ``{"layers": [LayerRow], "environment": {...}, "ms": [the original's, ...]}``
plan       ``{"predictions": [Prediction], "note": "relinearized"}``; may be journaled several times (one per budget)
result     ``{"best": name, "baseline": name, "front": [name], "reasons": [text], "steps": {name: [StepRow]},
           "layers": {name: [LayerRow]}, "frozen": [FrozenRow]}``; the last one counts
========== =====================================================================================================

``config.json`` may hold ``model, target, budget, seed, time_limit, methods, quality_name, lower_is_better``;
``candidates/<name>/candidate.json`` holds ``{"name", "plan", "metrics", "notes", "checksums"}``. Of the notes the page reads
``predicted`` (``{"latency_ms": x}``), ``form`` ("module" or "graph"), ``test`` (``{"quality": x, "right": n, "of": n}``) and
``steps``, ``layers`` as in the result.
"""

from __future__ import annotations

from typing import Any, TypedDict


class MeasurementData(TypedDict, total=False):
    """A number with how it was obtained (`shohin.candidate.Measurement` as JSON)."""

    value: float
    how: str
    conditions: dict[str, Any]
    spread: float | None


class CandidateData(TypedDict, total=False):
    """A ``candidate.json``. Metrics by the names of `shohin.candidate.METRICS`."""

    name: str
    plan: dict[str, Any]
    metrics: dict[str, MeasurementData]
    notes: dict[str, Any]
    checksums: dict[str, str]


class Prediction(TypedDict, total=False):
    """What planning expected. ``name`` is that of the candidate that was made of it, if one was made."""

    name: str
    latency_ms: float
    quality: float
    loss: float


class LayerRow(TypedDict, total=False):
    """One layer before and after. ``loss`` is the loss attributed to what was done to it; ``macs`` of one sample."""

    address: str
    kind: str
    width_before: int
    width_after: int
    format: str
    ms_before: float
    ms_after: float
    macs: float
    params: float
    loss: float


class StepRow(TypedDict, total=False):
    """The state after one step (``start``, ``prune``, ``compensate``, ``recalibrate``, ``distill``, ``quantize``)."""

    step: str
    quality: float
    latency_ms: float


class FrozenRow(TypedDict, total=False):
    """Something that planning may not touch, and why."""

    address: str
    reason: str


class BudgetRow(TypedDict, total=False):
    """One bound, in the metric's own unit (``drop``: in that of quality), with what the best candidate reached."""

    metric: str
    text: str
    bound: float
    value: float
    met: bool


class ReportData(TypedDict, total=False):
    """Everything that the page and the card show."""

    title: str
    version: str
    created: float
    config: dict[str, Any]
    finished: bool
    baseline: str
    best: str
    front: list[str]
    reasons: list[str]
    candidates: list[CandidateData]
    predictions: list[Prediction]
    planning_note: str
    budget: list[BudgetRow]
    layers: dict[str, list[LayerRow]]
    profile: list[LayerRow]
    steps: dict[str, list[StepRow]]
    frozen: list[FrozenRow]
    groups: int
    regions: int
    environment: dict[str, Any]
    quality_name: str
    lower_is_better: bool


def metric(candidate: CandidateData, name: str) -> float | None:
    """The value of a metric, or None if it is not known."""
    found = candidate.get("metrics", {}).get(name)
    return None if found is None else found.get("value")


def named(report: ReportData, name: str | None) -> CandidateData | None:
    """The candidate of that name, or None."""
    return next((c for c in report.get("candidates", []) if c.get("name") == name), None)
