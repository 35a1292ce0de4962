"""The page: one HTML file with its style and script inside. It can be read without the script, and asks nothing of a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shohin.graph.describe import frozen_rows, group_rows, region_rows
from shohin.graph.html.rows import OUTPUT, AxisView, Row, rows_of
from shohin.graph.html.tree import Block, tree_of
from shohin.graph.memory import memory

if TYPE_CHECKING:
    from shohin.graph.graph import Graph

HERE = Path(__file__).parent
#: degrees between the hues of neighbouring groups: the golden angle keeps any number of them apart
TURN = 137.508


def to_html(graph: Graph, title: str = "model") -> str:
    """The model as one self-contained HTML page: operations in program order, nested by module, every axis in the colour of the
    unit group that owns it, regions as brackets, and what is frozen in grey with the reason.

    Args:
        title: shown in the head of the page.

    Returns:
        The text of the page; every name in it is escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FileSystemLoader(HERE)
    )
    environment.filters.update(amount=amount, size=size)
    environment.globals.update(chip=chip, hue=hue, dots=dots, notes=notes)
    return environment.get_template("page.html.j2").render(
        **view(graph), title=title, style=(HERE / "page.css").read_text(), script=(HERE / "page.js").read_text()
    )


def view(graph: Graph) -> dict[str, Any]:
    """What the template needs."""
    rows = rows_of(graph)
    root = tree_of(rows, _kinds(graph), len(graph.regions))
    groups = group_rows(graph)
    most = max((g["params"] * g["units"] for g in groups), default=0) or 1
    total = sum(r.macs for r in rows) or 1.0
    tensors = {id(t): t for n, t in graph.program.tensors.items() if n in graph.program.trainable}
    use = memory(graph, reuse=True)
    return {
        "root": root,
        "groups": [{**g, "share": 100 * g["params"] * g["units"] / most} for g in groups],
        "regions": region_rows(graph),
        "frozen": frozen_rows(graph),
        "lanes": 1 + max((b.lane for b in _all_brackets(root)), default=-1),
        "strip": [(r, 100 * r.macs / total, _main_group(r)) for r in rows if r.macs / total > 0.001],
        "macs": total if total > 1 else 0.0,
        "params": sum(t.numel() for t in tensors.values()),
        "memory": use,
        "operations": len(rows),
    }


def _kinds(graph: Graph) -> dict[str, str]:
    """Module path -> class name, as export noted them."""
    out: dict[str, str] = {}
    for node in graph.program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
            out.setdefault(path.split("@")[0], name.rsplit(".", 1)[-1])
    return out


def _all_brackets(block: Block) -> list[Any]:
    return [b for i in block.items for b in (*i.brackets, *(_all_brackets(i) if isinstance(i, Block) else ()))]


def _main_group(row: Row) -> int | None:
    """The group of the last axis that has one, of the first result: its channels or features."""
    return next((a.groups[0] for t in row.outputs for a in t.axes if a.groups), None)


def hue(number: int) -> str:
    """The hue of a group, in degrees."""
    return f"{(165 + TURN * number) % 360:.0f}"


def chip(axis: AxisView) -> dict[str, str]:
    """Class, style and numbers of an axis."""
    if not axis.groups:
        return {"kind": "b" if axis.text.endswith("B") else "f", "style": "", "groups": ""}
    second = f";--k:{hue(axis.groups[1])}" if len(axis.groups) > 1 else ""
    kind = "g two" if len(axis.groups) > 1 else "g"
    return {"kind": kind, "style": f"--h:{hue(axis.groups[0])}{second}", "groups": " ".join(map(str, axis.groups))}


def dots(block: Block, most: int = 14) -> tuple[list[int], int]:
    """(first groups inside a block, how many more there are)."""
    groups = list(dict.fromkeys(g for row in block.rows() for g in row.groups))
    return groups[:most], max(0, len(groups) - most)


def notes(block: Block) -> dict[str, Any]:
    """What a closed block hides: regions that lie wholly inside it, and operations that freeze something, with the reasons."""
    rows = list(block.rows())
    outside = {b.region for b in block.brackets}
    reasons = [reason for r in rows for reason, _ in r.frozen if reason != OUTPUT]
    return {
        "regions": len({region for r in rows for region in r.regions} - outside),
        "frozen": sum(any(reason != OUTPUT for reason, _ in r.frozen) for r in rows),
        "why": "; ".join(dict.fromkeys(reasons)),
    }


def amount(value: float) -> str:
    """``13.2 M``, ``254 k``; a dash for nothing."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:.0f}" if value else "–"


def size(value: float) -> str:
    """Bytes in units of 1024."""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:.0f} B"
