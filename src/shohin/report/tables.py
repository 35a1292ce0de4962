"""Rows of the page's tables, as text."""

from __future__ import annotations

from statistics import median
from typing import Any

from shohin.report.figures import predictions
from shohin.report.schema import CandidateData, LayerRow, ReportData, metric, named
from shohin.report.words import DASH, Quality, count, milliseconds, number, percent, ratio, size

METRIC_NAMES = {
    "latency_ms": "latency",
    "size_bytes": "file size",
    "memory_bytes": "peak memory",
    "energy_mj": "energy",
    "drop": "drop of quality",
}


def candidate_table(report: ReportData, quality: Quality) -> list[dict[str, Any]]:
    """One row per candidate, the original first, then by latency."""
    base_name, best, front = report.get("baseline", ""), report.get("best", ""), set(report.get("front", []))
    base = named(report, base_name) or {}
    ordered = sorted(report.get("candidates", []), key=lambda c: (c.get("name") != base_name, metric(c, "latency_ms") or float("inf")))
    rows = []
    for c in ordered:
        name = c.get("name", "")
        roles = [
            r
            for r, is_it in (("original", name == base_name), ("chosen", name == best and best != base_name), ("front", name in front))
            if is_it
        ]
        latency = c.get("metrics", {}).get("latency_ms", {})
        quality_value, base_quality = metric(c, "quality"), metric(base, "quality")
        change = None if quality_value is None or base_quality is None or name == base_name else quality_value - base_quality
        rows.append(
            {
                "name": name,
                "roles": roles,
                "quality": quality.text(quality_value),
                "change": "" if change is None else quality.change(change),
                "test": _test(c, quality),
                "latency": milliseconds(metric(c, "latency_ms")),
                "ratio": ratio(metric(c, "latency_ms"), metric(base, "latency_ms")),
                "spread": "" if latency.get("spread") is None else f"± {percent(latency.get('spread'))}",
                "size": size(metric(c, "size_bytes")),
                "size_ratio": ratio(metric(c, "size_bytes"), metric(base, "size_bytes")),
                "memory": size(metric(c, "memory_bytes")),
                "macs": count(metric(c, "macs")),
                "params": count(metric(c, "params")),
                "format": formats(c),
                "how": _how(c),
            }
        )
    return rows


def formats(c: CandidateData) -> str:
    """The formats of a plan with the number of operations, ``int8 ×12``; ``float32`` if it has none."""
    chosen: dict[str, int] = {}
    for name in (c.get("plan", {}).get("formats") or {}).values():
        chosen[str(name)] = chosen.get(str(name), 0) + 1
    return ", ".join(f"{name} ×{n}" for name, n in sorted(chosen.items())) or "float32"


def _test(c: CandidateData, quality: Quality) -> str:
    test = c.get("notes", {}).get("test")
    if not isinstance(test, dict) or test.get("quality") is None:
        return ""
    counted = f" ({test['right']}/{test['of']})" if "right" in test and "of" in test else ""
    return quality.text(float(test["quality"])) + counted


def _how(c: CandidateData) -> str:
    said = [f"{name.split('_')[0]}: {m.get('how', '')}" for name, m in c.get("metrics", {}).items() if m.get("how")]
    conditions = c.get("metrics", {}).get("latency_ms", {}).get("conditions", {})
    return "; ".join(said) + (f" ({', '.join(f'{k} {v}' for k, v in conditions.items())})" if conditions else "")


def layer_table(layers: list[LayerRow]) -> list[dict[str, Any]]:
    """One row per layer, with the share of the slowest layer's time for its bar."""
    slowest = max((max(x.get("ms_before") or 0.0, x.get("ms_after") or 0.0) for x in layers), default=0.0) or 1.0
    worst = max((abs(x.get("loss") or 0.0) for x in layers), default=0.0) or 1.0
    write = _microseconds if slowest < 1.0 else milliseconds  # one unit in the whole column
    rows = []
    for x in layers:
        before, after = x.get("width_before"), x.get("width_after")
        rows.append(
            {
                "address": x.get("address", ""),
                "kind": x.get("kind", ""),
                "width": DASH if before is None else f"{before}" if after in (None, before) else f"{before} → {after}",
                "format": x.get("format") or "",
                "changed": after not in (None, before) or (x.get("format") or "float32") not in ("float32", "fp32"),
                "macs": count(x.get("macs")) if x.get("macs") is not None else "",
                "before": write(x.get("ms_before")),
                "after": write(x.get("ms_after")) if "ms_after" in x else "",
                "bar_before": round(100 * (x.get("ms_before") or 0.0) / slowest, 1),
                "bar_after": round(100 * (x.get("ms_after") or 0.0) / slowest, 1),
                "loss": number(x.get("loss"), 3) if x.get("loss") is not None else "",
                "bar_loss": round(100 * abs(x.get("loss") or 0.0) / worst, 1),
            }
        )
    return rows


def _microseconds(value: float | None) -> str:
    return DASH if value is None else f"{value * 1e3:.1f} µs"


def prediction_table(report: ReportData) -> dict[str, Any]:
    """Predicted against measured latency of every candidate that has both; median and worst relative error."""
    rows, errors = [], []
    for p in predictions(report):
        made = named(report, p.get("name"))
        measured, predicted = metric(made, "latency_ms") if made else None, p.get("latency_ms")
        if not measured or predicted is None:
            continue
        error = predicted / measured - 1
        errors.append(abs(error))
        rows.append(
            {
                "name": p.get("name", ""),
                "predicted": milliseconds(predicted),
                "measured": milliseconds(measured),
                "error": f"{error:+.1%}".replace("%", " %"),
            }
        )
    summary = f"median error {percent(median(errors))}, worst {percent(max(errors))}" if errors else ""
    return {"rows": rows, "summary": summary}


def budget_table(report: ReportData, quality: Quality) -> list[dict[str, Any]]:
    """One row per bound: what was asked, what was reached, whether it holds."""
    rows = []
    for row in report.get("budget", []):
        name = row.get("metric", "")
        write = {"latency_ms": milliseconds, "size_bytes": size, "memory_bytes": size}.get(name, number)
        if name == "drop" and quality.fraction:
            write = _points
        rows.append(
            {
                "name": METRIC_NAMES.get(name, name),
                "bound": write(row.get("bound")) + (f" ({row['text']})" if str(row.get("text", "")).endswith("%") else ""),
                "value": write(row.get("value")),
                "met": row.get("met"),
            }
        )
    return rows


def _points(value: float | None) -> str:
    return DASH if value is None else f"{value * 100:.2f} points"
