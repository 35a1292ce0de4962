"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from shohin.report.words import DASH, Quality, milliseconds, percent, ratio, size
from shohin.run import read_json

if TYPE_CHECKING:
    from rich.table import Table

    from shohin.candidate import Candidate, Measurement
    from shohin.result import Result
    from shohin.targets import TargetRow

FORMS = {"original": "the original", "module": "own class", "graph": "graph"}


def table(columns: Iterable[str], title: str | None = None, left: int = 1) -> Table:
    """An empty table; the first ``left`` columns are texts, the others numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        out.add_column(column, justify="left" if number < left else "right", overflow="fold")
    return out


def front(result: Result) -> Table:
    """Baseline, front by latency, and the best if it is elsewhere: quality, latency, size, form."""
    config = read_json(result.folder / "config.json")
    shown = list({c.name: c for c in (result.baseline, *sorted(result.front, key=_latency), result.best)}.values())
    name = str(config.get("quality_name", "quality"))
    base = result.baseline.metrics.values()
    words = Quality([c.metrics.values()["quality"] for c in shown if "quality" in c.metrics.values()], name)
    out = table(("candidate", name, "latency", "ratio", "size", "format and form"))
    out.columns[-1].justify = "left"
    for column in out.columns[:-1]:
        column.no_wrap = True
    for c in shown:
        v = c.metrics.values()
        changed = "quality" in v and "quality" in base and c is not result.baseline
        form = str(c.notes.get("form", DASH))
        out.add_row(
            c.name + (" *" if c.name == result.best.name else ""),
            words.text(v.get("quality")) + (f"\n{words.change(v['quality'] - base['quality'])}" if changed else ""),
            _time(c.metrics.latency_ms, "\n"),
            _relative(c),
            size(v.get("size_bytes")) + ("" if c is result.baseline else f"\n{ratio(v.get('size_bytes'), base.get('size_bytes'))}"),
            f"{c.notes.get('format', DASH)}\n{FORMS.get(form, form)}",
        )
    out.caption, out.caption_justify = f"* the best{'' if result.met else ', though it does not keep the budget'}", "left"
    return out


def _latency(c: Candidate) -> float:
    return c.metrics.values().get("latency_ms", float("inf"))


def _time(m: Measurement | None, between: str = " ") -> str:
    if m is None:
        return DASH
    return milliseconds(m.value) + ("" if m.spread is None else f"{between}± {percent(m.spread)}")


def _relative(c: Candidate) -> str:
    found = c.notes.get("latency_ratio")
    return f"{found[0]:.3f}×\n{found[1]:.3f} to {found[2]:.3f}" if found else DASH


def candidate(c: Candidate) -> Table:
    """All that is known of one candidate."""
    out = table(("metric", "value", "how"), c.name, left=3)
    words = {"latency_ms": milliseconds, "size_bytes": size, "memory_bytes": size}
    for name in c.metrics.values():
        m: Measurement = getattr(c.metrics, name)
        text = _time(m) if name == "latency_ms" else words.get(name, lambda v: f"{v:,.4g}" if v < 1e4 else f"{v:,.0f}")(m.value)
        out.add_row(name, text, m.how)
    return out


def targets(rows: Iterable[TargetRow]) -> Table:
    """Which runtimes there are, and which can be used here."""
    out = table(("target", "installed", "usable", "accelerates"), left=4)
    for row in rows:
        out.add_row(
            row.name, row.version or ("yes" if row.installed else "no"), "yes" if row.installed and row.supported else "no", row.accelerates
        )
    return out


def checks(found: Mapping[str, Any]) -> Table:
    """Every comparison in what ``verify`` found: each dict with a key "passes", by its path."""
    out = table(("check", "passes", "largest relative difference", "tolerance", "signal-to-noise"), left=2)
    for where, row in comparisons(found):
        out.add_row(
            where,
            "yes" if row["passes"] else "NO",
            DASH if row.get("max_rel") is None else f"{row['max_rel']:.2e}",
            DASH if row.get("tolerance") is None else f"{row['tolerance']:g}",
            DASH if row.get("snr_db") is None else f"{row['snr_db']:.1f} dB",
        )
    return out


def comparisons(found: Mapping[str, Any], where: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """The innermost dicts that say whether they pass, with the path of keys that leads to each."""
    inner = [(k, v) for k, v in found.items() if isinstance(v, Mapping)]
    out = [row for key, value in inner for row in comparisons(value, f"{where} {key}".strip())]
    if "passes" in found and not out:
        out = [(where or "all", found)]
    return out
