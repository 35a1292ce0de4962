"""The model card: what the shipped file is, in plain Markdown that people and hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from shohin.report.page import finite, headline
from shohin.report.schema import ReportData, metric, named
from shohin.report.tables import candidate_table, prediction_table
from shohin.report.words import Quality
from shohin.run import write_atomic


def model_card(report: Mapping[str, Any], path: Path) -> Path:
    """Writes the card of the chosen candidate (of the original, if it stays).

    Args:
        report: a `shohin.report.schema.ReportData`.
        path: of the Markdown file, written atomically.

    Returns:
        ``path``.
    """
    write_atomic(Path(path), card_text(cast(ReportData, finite(report))).encode())
    return Path(path)


def card_text(report: ReportData) -> str:
    """The card as Markdown."""
    values = [q for c in report.get("candidates", []) if (q := metric(c, "quality")) is not None]
    quality = Quality(values, report.get("quality_name", "quality"))
    shown = {report.get("baseline"), report.get("best")}
    rows = [r for r in candidate_table(report, quality) if r["name"] in shown]
    lines = [f"# {_cell(report.get('title', 'model'))}", "", _cell(headline(report, quality)), ""]
    lines += [f"- {_cell(r)}" for r in report.get("reasons", [])]
    config = report.get("config", {})
    lines += ["", f"Target: {_cell(config.get('target', 'not stated'))}. Budget: {_cell(config.get('budget', 'none'))}.", ""]
    head = ("candidate", "quality", "test", "latency", "ratio", "file", "memory", "MACs", "parameters", "format")
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = (r["name"], r["quality"], r["test"], r["latency"], r["ratio"], r["size"], r["memory"], r["macs"], r["params"], r["format"])
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    lines += ["", "## How it was measured", ""]
    lines += [f"- {_cell(r['name'])}: {_cell(r['how'] or 'not stated')}" for r in rows]
    if summary := prediction_table(report)["summary"]:
        lines.append(f"- predicted against measured latency: {summary}")
    lines += [f"- {_cell(k)}: {_cell(v)}" for k, v in report.get("environment", {}).items()]
    best = named(report, report.get("best")) or named(report, report.get("baseline"))
    if best and best.get("checksums"):
        lines += ["", "## Files", ""] + [f"- `{_cell(name)}` sha256 `{_cell(value)}`" for name, value in best["checksums"].items()]
    lines += ["", "Quality is that of the validation data, against which the choice was made; test data was not used to choose.", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """One line that neither ends a table cell nor opens HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
