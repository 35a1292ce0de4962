"""A profile as tables of text: layers, unit groups, regions, and what is frozen and why. They fit 100 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shohin.graph.describe import frozen_rows, group_rows, region_rows
from shohin.report.words import DASH, count, milliseconds, number, percent, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from shohin.graph import Graph
    from shohin.graph.memory import Memory

WIDTH = 100


class Profiled(Protocol):
    """What is known of a profiled model; see `shohin.verbs.Profile`."""

    @property
    def rows(self) -> list[dict[str, Any]]: ...
    @property
    def total_ms(self) -> float: ...
    @property
    def error(self) -> float: ...
    @property
    def repeatability(self) -> float: ...
    @property
    def graph(self) -> Graph: ...
    @property
    def memory(self) -> Memory | None: ...


def profile_parts(profile: Profiled) -> list[RenderableType]:
    """What `shohin profile` prints: a summary, and the tables that are not empty."""
    parts: list[RenderableType] = [summary(profile), layer_table(profile.rows)]
    parts += [make(profile.graph) for make in (group_table, region_table, frozen_table)]
    return [p for p in parts if isinstance(p, str) or p.row_count]  # type: ignore[union-attr]


def profile_text(profile: Profiled, width: int = WIDTH) -> str:
    """The same as plain text."""
    import io

    from rich.console import Console

    out = io.StringIO()
    screen = Console(file=out, width=width, highlight=False, markup=False, color_system=None)
    screen.print(*profile_parts(profile), sep="\n")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def summary(profile: Profiled) -> str:
    """Totals in sentences."""
    rows, program = profile.rows, profile.graph.program
    params = sum(t.numel() for t in {id(t): t for n, t in program.tensors.items() if n in program.trainable}.values())
    lines = [
        f"total {milliseconds(profile.total_ms)} measured for the whole model (repeatable to {percent(profile.repeatability)}); "
        f"attributed to operations by a regression with a median error of {percent(profile.error)}",
        f"{count(sum(r['macs'] for r in rows))} MACs and {size(sum(r.get('moved', 0.0) for r in rows))} moved for one sample in float32; "
        f"{count(params)} parameters",
    ]
    if profile.memory is not None:
        m = profile.memory
        lines.append(
            f"activations: {size(m.peak_bytes)} at {m.address} (one sample, float32, program order, elementwise operations in place); "
            f"{size(m.arena_bytes)} as one block"
        )
    return "\n".join(lines) + "\n"


def layer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each operation that costs time."""
    out = table(("operation", "kind", "output", "MACs", "params", "moved", "MAC/byte", "ms"), left=3)
    for r in rows:
        out.add_row(
            folded(r["address"], 34),
            folded(r["kind"], 13),
            folded(str(r.get("output", "")), 16),
            count(r["macs"]) if r["macs"] else DASH,
            count(r["params"]) if r["params"] else DASH,
            size(r["moved"]) if "moved" in r else DASH,
            number(r["intensity"], 2) if r.get("intensity") else DASH,
            f"{r['ms_before']:.4f}",
        )
    return out


def group_table(graph: Graph) -> Table:
    """Unit groups: what can be made narrower."""
    out = table(
        ("unit group", "units", "params each", "MACs each", "kept in", "normalized", "places"), "Unit groups: widths that can be chosen"
    )
    for r in group_rows(graph):
        out.add_row(
            folded(r["name"], 42),
            str(r["units"]),
            count(r["params"]),
            count(r["macs"]),
            f"{r['multiple']}s" if r["multiple"] else "any",
            "yes" if r["normalized"] else "no",
            str(len(r["places"])),
        )
    return out


def region_table(graph: Graph) -> Table:
    """Regions: what can be skipped."""
    out = table(("region", "operations", "MACs", "params", "residual"), "Regions: what can be skipped")
    for r in region_rows(graph):
        row = (str(r["operations"]), count(r["macs"]), count(r["params"]), "yes" if r["residual"] else "no")
        out.add_row(folded(r["name"], 56), *row)
    return out


def frozen_table(graph: Graph) -> Table:
    """What cannot be chosen, and why."""
    out = table(("frozen at", "why, and where"), "Frozen: what cannot be chosen", left=2)
    for r in frozen_rows(graph):
        out.add_row(folded(r["address"], 36), r["reason"] + (f"\n  {r['line']}" if r["line"] else ""))
    return out


def table(columns: Iterable[str], title: str | None = None, left: int = 1) -> Table:
    """An empty table of narrow gaps; the first ``left`` columns are texts, the others numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for position, column in enumerate(columns):
        out.add_column(column, justify="left" if position < left else "right", overflow="fold", no_wrap=position >= left)
    return out


def folded(name: str, width: int) -> str:
    """A long name on several lines, broken behind dots, slashes and crosses."""
    lines = [""]
    for piece in re.split(r"(?<=[./×])", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)
