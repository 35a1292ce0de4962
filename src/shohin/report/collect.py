"""Reads a run folder into the dictionary that the page is made of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shohin.budget import Budget
from shohin.errors import ShohinError
from shohin.report.schema import BudgetRow, CandidateData, Prediction, ReportData, metric, named
from shohin.run import Run, read_json


def collect(run: Run) -> ReportData:
    """The report of a run, finished or interrupted.

    Args:
        run: the folder; only config.json, the journal and ``candidates/*/candidate.json`` are read.

    Returns:
        the data of `shohin.report.render`; see `shohin.report.schema` for the journal's keys.

    Raises:
        RunError: if a candidate's file is damaged.
    """
    result = _last(run, "result")
    profile = _last(run, "profile")
    capture = _last(run, "capture")
    plans = [e["data"] for e in run.entries if e["stage"] == "plan" and isinstance(e["data"], dict)]
    candidates = [_candidate(path) for path in sorted((run.folder / "candidates").glob("*/candidate.json"))]
    config = run.config
    report: ReportData = {
        "title": str(config.get("model") or run.folder.name),
        "version": str(config.get("version", "")),
        "created": max((float(e.get("time", 0.0)) for e in run.entries), default=time.time()),
        "config": dict(config),
        "finished": bool(result),
        "baseline": str(result.get("baseline", "baseline")),
        "front": [str(n) for n in result.get("front", [])],
        "reasons": [str(r) for r in result.get("reasons", [])],
        "candidates": candidates,
        "predictions": _predictions(
            plans, profile, next((c for c in candidates if c.get("name") == result.get("baseline", "baseline")), None)
        ),
        "planning_note": "; ".join(dict.fromkeys(str(plan["note"]) for plan in plans if plan.get("note"))),
        "layers": {**_from_notes(candidates, "layers"), **result.get("layers", {})},
        "steps": {**_from_notes(candidates, "steps"), **result.get("steps", {})},
        "profile": list(profile.get("layers", [])),
        "frozen": list(result.get("frozen", capture.get("frozen", []))),
        "environment": dict(profile.get("environment", {})),
        "quality_name": str(config.get("quality_name", "quality")),
        "lower_is_better": bool(config.get("lower_is_better", False)),
    }
    if result.get("best"):
        report["best"] = str(result["best"])
    for key in ("groups", "regions"):
        if isinstance(capture.get(key), int):
            report[key] = capture[key]
    report["budget"] = budget_rows(report, config.get("budget"))
    return report


def budget_rows(report: ReportData, budget: Any) -> list[BudgetRow]:
    """The bounds of ``budget`` (a sentence or a budget's JSON) against the best candidate; empty if it cannot be read."""
    try:
        limits = (Budget.from_json(dict(budget)) if isinstance(budget, Mapping) else Budget.parse(budget)).limits
    except (ShohinError, KeyError, TypeError):
        return []
    baseline, best = named(report, report.get("baseline")), named(report, report.get("best"))
    sign = 1.0 if report.get("lower_is_better") else -1.0
    rows = []
    for name, limit in limits.items():
        row: BudgetRow = {"metric": name, "text": str(limit)}
        base = metric(baseline, "quality" if name == "drop" else name) if baseline else None
        if base is not None or not limit.relative:
            row["bound"] = limit.absolute(base or 0.0)
        value = metric(best, "quality" if name == "drop" else name) if best else None
        if name == "drop" and value is not None:
            value = None if base is None else sign * (value - base)
        if value is not None:
            row["value"] = value
            if "bound" in row:
                row["met"] = value <= row["bound"] + 1e-12
        rows.append(row)
    return rows


def _predictions(plans: list[dict[str, Any]], profile: dict[str, Any], baseline: CandidateData | None) -> list[Prediction]:
    """What planning expected, brought to the clock of the measurements.

    A machine is not equally fast at all hours: the profile's times and the candidates' were taken at different ones, and the
    original was timed in both, so predictions are compared as ratios to it.
    """
    times, now = profile.get("ms"), metric(baseline, "latency_ms") if baseline else None
    factor = now / float(times[0]) if now and isinstance(times, list) and times and times[0] else 1.0
    found: list[Prediction] = [dict(p) for plan in plans for p in plan.get("predictions", [])]  # type: ignore[misc]
    for p in found:
        if p.get("latency_ms") is not None:
            p["latency_ms"] *= factor
    return found


def _last(run: Run, stage: str) -> dict[str, Any]:
    found = [e["data"] for e in run.entries if e["stage"] == stage and isinstance(e["data"], dict)]
    return found[-1] if found else {}


def _candidate(path: Path) -> CandidateData:
    data: CandidateData = read_json(path)
    return data


def _from_notes(candidates: list[CandidateData], key: str) -> dict[str, Any]:
    return {c["name"]: c["notes"][key] for c in candidates if isinstance(c.get("notes", {}).get(key), list)}
