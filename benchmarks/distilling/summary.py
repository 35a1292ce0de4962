"""Tables and figures from the records of single runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from records import Record, known, mean_and_interval

__all__ = ["FRESH", "OURS", "PLAIN", "Record", "by_seed", "figures", "gain", "mean_and_interval", "table", "text_table"]
#: Shohin's default, the same from random weights, and no distillation at all
OURS, FRESH, PLAIN = "shohin", "shohin, not inherited", "plain"
#: the task with a table of its own
TEXTS = "minilm"


def by_seed(records: Iterable[Record], task: str, student: str, method: str) -> dict[int, float]:
    """Seed -> quality on the test split."""
    return {r["seed"]: r["test"] for r in records if (r["task"], r["student"], r["method"]) == (task, student, method)}


def gain(records: Sequence[Record], task: str, student: str, method: str, over: str = PLAIN) -> tuple[float, float, float]:
    """Mean and 95 % interval of the paired difference (the same seed has the same initial weights and batches)."""
    ours, theirs = by_seed(records, task, student, method), by_seed(records, task, student, over)
    return mean_and_interval([ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())])


def table(records: Sequence[Record], teachers: dict[str, float]) -> str:
    """Markdown: one row for each task, student and method, the best mean first."""
    lines = [
        "| task | student | method | runs | test | 95 % interval | gain over plain | 95 % interval | share of the gap | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = list(dict.fromkeys((r["task"], r["student"]) for r in records if r["task"] != TEXTS))
    for task, student in groups:
        own = [r for r in records if (r["task"], r["student"]) == (task, student)]
        rows = []
        for method in dict.fromkeys(r["method"] for r in own):
            runs = by_seed(own, task, student, method)
            plain = by_seed(own, task, student, PLAIN)
            mean, low, high = mean_and_interval(list(runs.values()))
            cells = [task, student, method, str(len(runs)), f"{mean:.2%}", _range(low, high)]
            if method != PLAIN and runs.keys() & plain.keys():
                more, least, most = gain(own, task, student, method)
                gap = teachers[task] - statistics.fmean(plain.values())
                cells += [f"{100 * more:+.2f}", _range(least, most, signed=True), f"{more / gap:.0%}"]
            else:
                cells += ["", "", ""]
            seconds = statistics.median(r["seconds"] for r in own if r["method"] == method)
            rows.append((-mean, [*cells, f"{seconds:.0f}"]))
        lines += [f"| {' | '.join(cells)} |" for _, cells in sorted(rows)]
    texts = [r for r in records if r["task"] == TEXTS]
    return "\n".join(lines) + "\n" + (f"\n{text_table(texts)}" if texts else "")


def text_table(records: Sequence[Record]) -> str:
    """Markdown: one row for each run on texts."""
    lines = [
        "| student | method | seed | WordSim-353 | Lee | mean | share of the teacher's | 95 % interval | held-out cosine | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        low, high = r["interval"]
        cells = [r["student"], r["method"], str(r["seed"]), *(f"{r[k]:.3f}" for k in ("spearman_wordsim", "spearman_lee", "test"))]
        cosine = f"{r['cosine'][1]:.3f}" if "cosine" in r else ""
        cells += [f"{r['kept_share']:.1%}", _range(low, high), cosine, str(round(r["seconds"]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(low: float, high: float, *, signed: bool = False) -> str:
    if math.isnan(low):
        return ""
    return f"{100 * low:+.2f} to {100 * high:+.2f}" if signed else f"{low:.2%} to {high:.2%}"


def figures(records: Sequence[Record], teachers: dict[str, float]) -> dict[str, Any]:
    """What the project demands of itself."""
    found: dict[str, Any] = {}
    for task, student in dict.fromkeys((r["task"], r["student"]) for r in records):
        own = [r for r in records if (r["task"], r["student"]) == (task, student)]
        methods = dict.fromkeys(r["method"] for r in own)
        if OURS not in methods:
            continue
        peers = [m for m in methods if m not in (OURS, PLAIN, FRESH, "start")]
        entry: dict[str, Any] = {"teacher": teachers[task]}
        if PLAIN in methods:
            more, low, high = gain(own, task, student, OURS)
            gap = teachers[task] - statistics.fmean(by_seed(own, task, student, PLAIN).values())
            entry |= {"gain": known(more, low, high), "share_of_gap": known(more / gap)[0]}
        if peers:
            best = max(peers, key=lambda m: statistics.fmean(by_seed(own, task, student, m).values()))
            entry["best_peer"], entry["gain_over_best_peer"] = best, known(*gain(own, task, student, OURS, over=best))
        found[f"{task} {student}"] = entry
    return found
