"""The page: one HTML file with its style, its script and the plotting library inside, so that it opens anywhere, offline."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from shohin.report.figures import Figure, pareto, waterfall
from shohin.report.schema import CandidateData, ReportData, metric, named
from shohin.report.tables import budget_table, candidate_table, layer_table, prediction_table
from shohin.report.words import Quality, count, milliseconds, number, size, times
from shohin.run import write_atomic

HERE = Path(__file__).parent


def render(report: Mapping[str, Any], path: Path) -> Path:
    """Writes the page.

    Args:
        report: a `shohin.report.schema.ReportData`, as `collect` gives it; every field may be absent. Text from outside
            (names, reasons, notes) is escaped.
        path: of the HTML file, written atomically.

    Returns:
        ``path``.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    data = cast(ReportData, finite(report))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FileSystemLoader(HERE)
    )
    values = view(data)
    page = environment.get_template("page.html.j2").render(
        **values,
        figures_json=script_json(values["figures"]),
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
        plotly=get_plotlyjs(),
    )
    write_atomic(Path(path), page.encode())
    return Path(path)


def view(report: ReportData) -> dict[str, Any]:
    """What the template needs, as text and rows. Nothing is computed in the template."""
    candidates = report.get("candidates", [])
    qualities = [q for c in candidates if (q := metric(c, "quality")) is not None]
    quality = Quality(qualities, report.get("quality_name", "quality"))
    base, best = named(report, report.get("baseline")), named(report, report.get("best"))
    chosen = best if best is not None and best is not base else None
    steps = report.get("steps", {}).get(report.get("best", ""), [])
    figures: dict[str, Figure | None] = {
        "pareto": pareto(report, quality),
        "waterfall-quality": waterfall(
            steps, "quality", quality, f"{report.get('quality_name', 'quality')}" + (" (%)" if quality.fraction else "")
        ),
        "waterfall-latency": waterfall(steps, "latency_ms", quality, "latency (ms)"),
    }
    layers = report.get("layers", {}).get(report.get("best", "")) or report.get("profile", [])
    return {
        "title": report.get("title", "run"),
        "when": _when(report.get("created")),
        "asked": _asked(report),
        "headline": headline(report, quality),
        "reasons": report.get("reasons", []),
        "won": chosen is not None,
        "tiles": _tiles(report, base, chosen, quality) if base else [],
        "budget": budget_table(report, quality),
        "figures": {k: v for k, v in figures.items() if v is not None},
        "candidates": candidate_table(report, quality),
        "layers": layer_table(layers),
        "layers_of": report.get("best") if report.get("layers", {}).get(report.get("best", "")) else None,
        "predictions": prediction_table(report),
        "planning_note": report.get("planning_note", ""),
        "frozen": report.get("frozen", []),
        "counts": [(k, report[k]) for k in ("groups", "regions") if k in report],
        "environment": [(str(k).replace("_", " "), _flat(v)) for k, v in report.get("environment", {}).items()],
        "plan": json.dumps(chosen.get("plan", {}), indent=1, sort_keys=True) if chosen else "",
        "config": json.dumps(report.get("config", {}), indent=1, sort_keys=True),
        "finished": report.get("finished", True),
        "version": report.get("version", ""),
    }


def headline(report: ReportData, quality: Quality) -> str:
    """One sentence: what was achieved, or that nothing was."""
    base, best = named(report, report.get("baseline")), named(report, report.get("best"))
    if base is None:
        return "The original has not been measured yet."
    if best is None:
        return "No result yet: the run has not finished." if not report.get("finished", True) else "No candidate meets the budget."
    if best is base:
        return "The original stays: no candidate beat it within the budget."
    what = [f"{times(metric(best, m), metric(base, m), good, bad)}" for m, good, bad in WORDS if _both(best, base, m)]
    text = f"{best['name']}: {', '.join(w for w in what if w != 'unchanged') or 'as fast as the original'}"
    if _both(best, base, "quality"):
        change = (metric(best, "quality") or 0.0) - (metric(base, "quality") or 0.0)
        text += f", at {quality.change(change)} of {report.get('quality_name', 'quality')}"
    missed = [row for row in report.get("budget", []) if row.get("met") is False]
    return text + (". It does not meet the whole budget." if missed else ".")


WORDS = (("latency_ms", "faster", "slower"), ("size_bytes", "smaller", "larger"))


def _both(a: CandidateData, b: CandidateData, name: str) -> bool:
    return metric(a, name) is not None and metric(b, name) is not None


TILES: tuple[tuple[str, str, Callable[[float | None], str], str, str], ...] = (
    ("latency_ms", "Latency", milliseconds, "faster", "slower"),
    ("size_bytes", "File", size, "smaller", "larger"),
    ("memory_bytes", "Memory", size, "less", "more"),
    ("energy_mj", "Energy (mJ)", number, "less", "more"),
    ("macs", "Multiply-adds", count, "fewer", "more"),
)


def _tiles(report: ReportData, base: CandidateData, chosen: CandidateData | None, quality: Quality) -> list[dict[str, Any]]:
    """The large numbers: name, value now and before, the change in words, and whether it is one for the worse."""
    shown, tiles = chosen or base, []
    if _both(shown, base, "quality"):
        change = (metric(shown, "quality") or 0.0) - (metric(base, "quality") or 0.0)
        tiles.append(
            {
                "name": report.get("quality_name", "quality").capitalize(),
                "value": quality.text(metric(shown, "quality")),
                "before": quality.text(metric(base, "quality")),
                "change": quality.change(change) if chosen else "",
                "worse": change > 0 if report.get("lower_is_better") else change < 0,
            }
        )
    for name, title, write, better, worse in TILES:
        if _both(shown, base, name):
            tiles.append(
                {
                    "name": title,
                    "value": write(metric(shown, name)),
                    "before": write(metric(base, name)),
                    "change": times(metric(shown, name), metric(base, name), better, worse) if chosen else "",
                    "worse": (metric(shown, name) or 0.0) > (metric(base, name) or 0.0),
                }
            )
    return tiles


def _asked(report: ReportData) -> list[tuple[str, str]]:
    config = report.get("config", {})
    budget = ", ".join(f"{row['metric'].split('_')[0]} ≤ {row['text']}{_unit(row)}" for row in report.get("budget", [])) or config.get(
        "budget"
    )
    rows = [("target", config.get("target")), ("budget", budget), ("time limit", config.get("time_limit")), ("seed", config.get("seed"))]
    return [(k, _flat(v)) for k, v in rows if v not in (None, "", {}, [])]


def _unit(row: Mapping[str, Any]) -> str:
    units = {"latency_ms": " ms", "size_bytes": " B", "memory_bytes": " B", "energy_mj": " mJ"}
    return "" if str(row["text"]).endswith("%") else units.get(str(row["metric"]), "")


def _flat(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(name := value.get("target", value.get("name")), str):
        rest = _flat({k: v for k, v in value.items() if v is not name})
        return f"{name} ({rest})" if rest else name
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_flat(v) for v in value)
    return str(value)


def _when(created: float | None) -> str:
    return "" if created is None else datetime.datetime.fromtimestamp(created).strftime("%Y-%m-%d %H:%M")


def finite(value: Any) -> Any:
    """A copy in which numbers that are not finite are None: they cannot be drawn, and are not JSON."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no character in it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False)
    return (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
