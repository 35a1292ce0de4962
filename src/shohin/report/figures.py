"""Plotly figures as JSON-able dictionaries. Colours are names of style variables; the page fills them in for light and dark."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from shohin.report.schema import CandidateData, Prediction, ReportData, StepRow, metric, named
from shohin.report.words import Quality, milliseconds, number, size

Figure = dict[str, Any]

STEP_NAMES = {
    "start": "original",
    "prune": "prune",
    "compensate": "compensate",
    "recalibrate": "recalibrate",
    "distill": "distil",
    "quantize": "quantize",
}

#: steps that change weights only
SAME_LATENCY = ("compensate", "recalibrate", "distill")


def pareto(report: ReportData, quality: Quality) -> Figure | None:
    """Latency against quality: baseline, front, other candidates, predictions as hollow marks, bounds as lines.

    Returns:
        the figure, or None if no candidate has both numbers.
    """
    scale = 100.0 if quality.fraction else 1.0
    points = [c for c in report.get("candidates", []) if metric(c, "latency_ms") is not None and metric(c, "quality") is not None]
    if not points:
        return None
    front_names, base = set(report.get("front", [])), report.get("baseline", "")
    best = report.get("best", "")
    front = sorted((c for c in points if c["name"] in front_names), key=lambda c: metric(c, "latency_ms") or 0.0)
    traces = [
        _marks(
            "other candidates", [c for c in points if c["name"] not in front_names | {base, best}], scale, quality, "muted", "circle", 8
        ),
        _predicted(report, scale),
        _marks("front", front, scale, quality, "accent", "circle", 11, line=True),
        _marks("original", [c for c in points if c["name"] == base], scale, quality, "baseline", "diamond", 13),
        _marks("chosen", [c for c in points if c["name"] == best and best != base], scale, quality, "good", "star", 17),
    ]
    shapes, notes = _bounds(report, scale)
    unit = " (%)" if quality.fraction else ""
    return {
        "data": [t for t in traces if t is not None],
        "layout": {
            "xaxis": {"title": {"text": "latency (ms)"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": report.get("quality_name", "quality") + unit}},
            "shapes": shapes,
            "annotations": notes,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "height": 460,
        },
    }


def _marks(
    name: str, points: list[CandidateData], scale: float, quality: Quality, color: str, symbol: str, width: int, line: bool = False
) -> Figure | None:
    if not points:
        return None
    return {
        "type": "scatter",
        "mode": "lines+markers" if line else "markers",
        "name": name,
        "x": [metric(c, "latency_ms") for c in points],
        "y": [(metric(c, "quality") or 0.0) * scale for c in points],
        "error_x": {"type": "data", "array": [_spread(c) for c in points], "thickness": 1, "width": 3, "color": f"var:{color}"},
        "text": [
            f"<b>{plain(c['name'])}</b><br>{milliseconds(metric(c, 'latency_ms'))}<br>{quality.text(metric(c, 'quality'))}"
            f"<br>{size(metric(c, 'size_bytes'))}"
            for c in points
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": f"var:{color}", "width": 2, "shape": "hv"},
        "marker": {"color": f"var:{color}", "symbol": symbol, "size": width, "line": {"color": "var:surface", "width": 1.5}},
    }


def _spread(c: CandidateData) -> float:
    found = c.get("metrics", {}).get("latency_ms", {})
    return (found.get("spread") or 0.0) * found.get("value", 0.0)


def _predicted(report: ReportData, scale: float) -> Figure | None:
    shown = []
    for p in predictions(report):
        made = named(report, p.get("name"))
        q = p.get("quality", metric(made, "quality") if made else None)
        if q is not None and p.get("latency_ms") is not None:
            shown.append((p["latency_ms"], q * scale, plain(p.get("name", "not built"))))
    if not shown:
        return None
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "predicted latency",
        "x": [s[0] for s in shown],
        "y": [s[1] for s in shown],
        "text": [f"<b>{s[2]}</b><br>predicted {milliseconds(s[0])}" for s in shown],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": "var:predicted", "symbol": "circle-open", "size": 10, "line": {"width": 1.5}},
    }


def predictions(report: ReportData) -> list[Prediction]:
    """Planned predictions and those in the candidates' notes; one per candidate, the last one counts."""
    out: dict[str, Prediction] = {}
    for i, p in enumerate(report.get("predictions", [])):
        out[p.get("name") or f"#{i}"] = p
    for c in report.get("candidates", []):
        noted = c.get("notes", {}).get("predicted")
        if isinstance(noted, dict) and "latency_ms" in noted:
            out[c["name"]] = {**noted, "name": c["name"]}  # type: ignore[typeddict-item]
    return list(out.values())


def _bounds(report: ReportData, scale: float) -> tuple[list[Figure], list[Figure]]:
    shapes: list[Figure] = []
    notes: list[Figure] = []
    base = named(report, report.get("baseline"))
    quality = metric(base, "quality") if base else None
    for row in report.get("budget", []):
        if "bound" not in row:
            continue
        line = {"type": "line", "line": {"color": "var:bound", "width": 1.5, "dash": "dot"}}
        note: Figure = {"showarrow": False, "font": {"size": 11, "color": "var:bound"}}
        if row["metric"] == "latency_ms":
            x = row["bound"]
            shapes.append({**line, "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1})
            notes.append({**note, "x": x, "yref": "paper", "y": 0, "yanchor": "bottom", "xanchor": "left", "text": " latency bound"})
        elif row["metric"] == "drop" and quality is not None:
            y = (quality + (1.0 if report.get("lower_is_better") else -1.0) * row["bound"]) * scale
            shapes.append({**line, "y0": y, "y1": y, "xref": "paper", "x0": 0, "x1": 1})
            notes.append({**note, "y": y, "xref": "paper", "x": 1, "xanchor": "right", "yanchor": "top", "text": "lowest quality allowed"})
    return shapes, notes


def waterfall(steps: list[StepRow], what: str, quality: Quality, title: str) -> Figure | None:
    """Where ``what`` ("quality" or "latency_ms") went, step by step; None with fewer than two known values."""
    scale = 100.0 if what == "quality" and quality.fraction else 1.0
    known: list[tuple[str, float]] = []
    since: list[str] = []  # steps without a number are told with the next one that has one
    for step in steps:
        name = step.get("step", "")
        if what == "quality" or name not in SAME_LATENCY:
            since.append(STEP_NAMES.get(name, name))
        value = step.get("quality") if what == "quality" else step.get("latency_ms")
        if value is not None:
            known.append((" + ".join(since) or STEP_NAMES.get(name, name), float(value) * scale))
            since = []
    if len(known) < 2:
        return None
    values = [v for _, v in known]
    changes = [b - a for a, b in pairwise(values)]
    better_up = what == "quality"
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    lowest = max(0.0, low - 0.6 * room) if low >= 0 and what == "quality" else min(0.0, low)
    text = [
        number(values[0], 3 if not better_up else 4),
        *(f"{'+' if c > 0 else '−' if c < 0 else '±'}{number(abs(c), 3)}" for c in changes),
        number(values[-1], 3 if not better_up else 4),
    ]
    good, bad = ("good", "bad") if better_up else ("bad", "good")
    return {
        "data": [
            {
                "type": "waterfall",
                "measure": ["absolute", *("relative" for _ in changes), "total"],
                "x": [plain(known[0][0]), *(plain(n) for n, _ in known[1:]), "shipped"],
                "y": [values[0], *changes, 0],
                "text": text,
                "textposition": "outside",
                "hoverinfo": "x+text",
                "connector": {"line": {"color": "var:grid", "width": 1}},
                "increasing": {"marker": {"color": f"var:{good}"}},
                "decreasing": {"marker": {"color": f"var:{bad}"}},
                "totals": {"marker": {"color": "var:accent"}},
            }
        ],
        "layout": {
            "title": {"text": plain(title), "font": {"size": 14}, "x": 0, "xref": "paper", "xanchor": "left"},
            "yaxis": {"range": [lowest, high + 0.25 * (high - lowest)]},
            "xaxis": {"type": "category"},
            "showlegend": False,
            "height": 320,
        },
    }


def plain(text: Any) -> str:
    """Text that the plotting library takes literally: it reads a few HTML tags in labels, so their marks are escaped."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
