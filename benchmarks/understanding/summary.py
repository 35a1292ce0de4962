"""The table and the figures of a comparison."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

TOOLS = {"shohin": "Shohin", "torch_pruning": "Torch-Pruning"}
#: parameters outside embeddings that may be left at half width for a model to count as cut
BAR = 0.7


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """By tool: verdicts, models cut, medians of seconds and memory over the models that both cut; Shohin's figures."""
    found: dict[str, Any] = {"models": len(records)}
    both = [r for r in records if all(r[t].get("seconds") and r[t]["verdict"] in ("right", "not checked") for t in TOOLS)]
    found["models_both_finish"] = len(both)
    found["median_labels_seconds_where_both"] = _median(r["shohin"]["seconds"]["labels"] for r in both)
    for tool in TOOLS:
        found[tool] = {
            "verdicts": dict(sorted(Counter(r[tool]["verdict"] for r in records).items())),
            "right_and_at_most_70_percent": sum(r[tool]["verdict"] == "right" and r[tool]["ratio"] <= BAR for r in records),
            "runs_and_at_most_70_percent": sum(r[tool]["verdict"] in ("right", "not checked") and r[tool]["ratio"] <= BAR for r in records),
            "median_ratio_where_both": _median(r[tool]["ratio"] for r in both),
            "median_understand_seconds_where_both": _median(r[tool]["seconds"]["understand"] for r in both),
            "median_all_seconds_where_both": _median(_all(r[tool]) for r in both),
            "median_understand_mb_where_both": _median(r[tool]["peak_mb"].get("understand") for r in both),
            "median_all_mb_where_both": _median(r[tool]["peak_mb"].get("all") for r in both),
        }
    found["median_understand_seconds_shohin_over_torch_pruning"] = _median(
        r["shohin"]["seconds"]["understand"] / r["torch_pruning"]["seconds"]["understand"] for r in both
    )
    found["median_all_seconds_shohin_over_torch_pruning"] = _median(_all(r["shohin"]) / _all(r["torch_pruning"]) for r in both)
    found["figures"] = figures(records)
    return found


def figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the project demands of itself."""
    vision = [r for r in records if r["family"] == "classification" and r["shohin"].get("seconds")]
    ours = [r for r in records if r["shohin"].get("peak_mb", {}).get("understand") is not None]
    over = [r["name"] for r in ours if r["shohin"]["peak_mb"]["understand"] > max(1.5 * r["megabytes"], 64)]
    own = [r["shohin"] for r in vision if r["shohin"].get("form") == "module"]
    ours_timed = [r["shohin"] for r in vision]
    resnet = next((r["shohin"]["seconds"] for r in vision if r["name"] == "torchvision/resnet50"), {})
    return {
        "classification_models": len(vision),
        "own_class": sum(not o["parts"] for o in own),
        "own_class_with_parts_as_programs": sum(bool(o["parts"]) for o in own),
        "median_labels_closure_rewriting_over_export": _median(
            r["shohin"]["seconds"]["labels"] / r["shohin"]["seconds"]["export"] for r in vision
        ),
        "median_the_same_and_cut_over_export": _median(
            (o["seconds"]["labels"] + o["seconds"]["cut"]) / o["seconds"]["export"] for o in ours_timed
        ),
        "resnet50_seconds": resnet,
        "memory_measured": len(ours),
        "memory_over_max_of_1.5_models_and_64_mb": over,
    }


def table(records: list[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "# Understanding: Shohin and Torch-Pruning 1.6.1",
        "",
        "Written by `python benchmarks/understand.py`; how to read it: [README](README.md).",
        "",
        *_overview(summary(records)),
        "",
        "| model | M params | Shohin | left | form | export s | understand s | cut s | MB | Torch-Pruning | left | graph s | understand s | cut s | MB |",
        "|---|--:|---|--:|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    lines += [_row(r) for r in records]
    failures = [r for r in records if any(r[t].get("detail") for t in TOOLS)]
    lines += ["", "## Why", ""]
    lines += [f"- {r['name']}, {TOOLS[t]}: {r[t]['verdict']}: {r[t]['detail']}" for r in failures for t in TOOLS if r[t].get("detail")]
    return "\n".join(lines) + "\n"


def _overview(found: dict[str, Any]) -> list[str]:
    lines = ["| | Shohin | Torch-Pruning |", "|---|--:|--:|"]
    verdicts = sorted({v for t in TOOLS for v in found[t]["verdicts"]})
    for verdict in verdicts:
        lines.append(f"| {verdict} | " + " | ".join(str(found[t]["verdicts"].get(verdict, 0)) for t in TOOLS) + " |")
    for key in found["shohin"]:
        if key != "verdicts":
            lines.append(f"| {key.replace('_', ' ')} | " + " | ".join(_text(found[t][key]) for t in TOOLS) + " |")
    lines += [
        "",
        f"Models: {found['models']}; both tools return a running model that is not known to be wrong: {found['models_both_finish']}.",
    ]
    for key in ("median_understand_seconds_shohin_over_torch_pruning", "median_all_seconds_shohin_over_torch_pruning"):
        lines.append(f"{key.replace('_', ' ').capitalize()}: {_text(found[key])}.")
    lines += [
        f"Median seconds of Shohin's understanding without `torch.export` and capture: {_text(found['median_labels_seconds_where_both'])}."
    ]
    lines += ["", "Shohin's own figures:", ""]
    lines += [f"- {k.replace('_', ' ')}: {v}" for k, v in found["figures"].items()]
    return lines


def _row(record: dict[str, Any]) -> str:
    ours, peer = record["shohin"], record["torch_pruning"]
    name = record["name"] + (f" ({record['note']})" if record["note"] else "")
    cells = [name, f"{record['parameters'] / 1e6:.2f}", ours["verdict"], _text(ours.get("ratio")), ours.get("form", "")]
    cells += [_text(ours.get("seconds", {}).get(k)) for k in ("export", "understand", "cut")]
    cells += [_text(ours.get("peak_mb", {}).get("understand")), peer["verdict"], _text(peer.get("ratio"))]
    cells += [_text(peer.get("seconds", {}).get(k)) for k in ("graph", "understand", "cut")]
    cells += [_text(peer.get("peak_mb", {}).get("understand"))]
    return "| " + " | ".join(cells) + " |"


def _all(tool: dict[str, Any]) -> float:
    return float(tool["seconds"]["understand"] + tool["seconds"]["cut"])


def _median(values: Any) -> float | None:
    found = [v for v in values if v is not None]
    return round(statistics.median(found), 4) if found else None


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
