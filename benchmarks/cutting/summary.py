"""Tables and figures from the records of single runs; a loss is in points of accuracy below the original, on the test split."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from cutting.methods import BUDGETS, CHANNELS, DISTILLED, OURS, is_ours
from records import Record, known, mean_and_interval

#: a peer with this note was trained before its cut, so it doesn't count before training
TRAINED_BEFORE = "steps_before"
#: what the project demands: of the best peer's loss before training, by budget
HALF = {"0.5": 0.5, "0.3": 0.5}
#: and what it hopes to keep of the original's accuracy then
GOALS = {"0.5": 0.95, "0.3": 0.8}
#: points of accuracy that count as equal when latencies are compared, and the ratio demanded
EQUAL, FASTER = 0.01, 0.8
STAGES = ("raw", "recalibrated", "trained")


def losses(records: Iterable[Record], method: str, stage: str, original: float) -> list[float]:
    """Of each seed in order; records are of one model and budget."""
    chosen = sorted((r for r in records if r["method"] == method and stage in r), key=lambda r: r["seed"])
    return [original - r[stage]["test"] for r in chosen]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def before(records: Sequence[Record], method: str, original: float) -> float:
    """Mean loss without training: of a peer the better of its own and with normalization statistics anew; of Shohin what it returns."""
    if any(TRAINED_BEFORE in r.get("notes", {}) for r in records if r["method"] == method):
        return math.nan
    stages = ("raw",) if is_ours(method) else ("raw", "recalibrated")
    return min((_mean(losses(records, method, stage, original)) for stage in stages), key=lambda v: math.inf if math.isnan(v) else v)


def best_peer(values: dict[str, float]) -> tuple[str, float] | None:
    """The peer with the smallest loss."""
    found = [(value, method) for method, value in values.items() if not is_ours(method) and not math.isnan(value)]
    return (min(found)[1], min(found)[0]) if found else None


def grouped(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """By model and budget, in the order of `BUDGETS`."""
    out: dict[tuple[str, str], list[Record]] = {}
    for r in sorted(records, key=lambda r: (r["model"], list(BUDGETS).index(r["budget"]))):
        out.setdefault((r["model"], r["budget"]), []).append(r)
    return out


def figures(records: Sequence[Record], originals: dict[str, Any]) -> dict[str, Any]:
    """What the project demands of itself, by model and budget, and the latencies at equal accuracy by model."""
    found: dict[str, Any] = {}
    for (model, budget), own in grouped(records).items():
        methods, original = dict.fromkeys(r["method"] for r in own), originals[model]["test"]
        entry: dict[str, Any] = {"original": original}
        early = {m: before(own, m, original) for m in methods}
        late = {m: _mean(losses(own, m, "trained", original)) for m in methods}
        if OURS in methods and (peer := best_peer(early)):
            entry["before"] = _against(early[OURS], peer, HALF.get(budget, 1.0))
            if budget in GOALS:
                kept = 1 - early[OURS] / original
                entry["before"] |= {"kept": known(kept)[0], "goal": GOALS[budget], "goal_met": kept >= GOALS[budget]}
        peer = best_peer(late)
        for name, method in (("trained", OURS), ("distilled", DISTILLED)):
            if not math.isnan(late.get(method, math.nan)) and peer:
                entry[name] = _against(late[method], peer, 1.0, strict=budget == "0.25")
        found[f"{model} {budget}"] = entry
    for model in dict.fromkeys(r["model"] for r in records):
        if entry := fastest([r for r in records if r["model"] == model and r["budget"] in _CUT], originals[model]["test"]):
            found[f"{model} latency"] = entry
    return found


_CUT = [budget for budget, (_, methods) in BUDGETS.items() if methods is CHANNELS]


def _against(ours: float, peer: tuple[str, float], share: float, *, strict: bool = False) -> dict[str, Any]:
    name, theirs = peer
    limit = share * theirs if theirs > 0 else theirs
    return {
        "loss": known(100 * ours)[0],
        "best_peer": name,
        "its_loss": 100 * theirs,
        "demanded": 100 * limit,
        "met": ours < limit if strict else ours <= limit,
    }


def fastest(records: Sequence[Record], original: float) -> dict[str, Any]:
    """The smallest measured latency, as a share of the original's, that Shohin and the peers reach within `EQUAL` after training."""
    best: dict[bool, tuple[float, str]] = {}
    for budget, method in dict.fromkeys((r["budget"], r["method"]) for r in records):
        own = [r for r in records if (r["budget"], r["method"]) == (budget, method) and "latency" in r]
        loss = losses(own, method, "trained", original)
        if loss and _mean(loss) <= EQUAL:
            entry = (_mean([r["latency"]["ratio"] for r in own]), f"{method} at {budget}")
            best[is_ours(method)] = min(best.get(is_ours(method), entry), entry)
    if len(best) < 2:
        return {who: best[mine] for mine, who in ((True, "shohin"), (False, "peer")) if mine in best}
    ratio = best[True][0] / best[False][0]
    return {"shohin": best[True], "peer": best[False], "ratio": ratio, "demanded": FASTER, "met": ratio <= FASTER}


def table(records: Sequence[Record], originals: dict[str, Any]) -> str:
    """Markdown: for each model and budget one row for each method, the smallest loss before training first, and what is met."""
    lines = []
    found = figures(records, originals)
    for (model, budget), own in grouped(records).items():
        original = originals[model]["test"]
        lines += [f"## {model}, {budget} (original {original:.2%})", "", *_rows(own, original), "", *_met(found[f"{model} {budget}"]), ""]
    for name, entry in found.items():
        if name.endswith(" latency") and "ratio" in entry:
            said = f"{entry['shohin'][1]} {entry['shohin'][0]:.3f}, {entry['peer'][1]} {entry['peer'][0]:.3f}"
            verdict = f"{entry['ratio']:.2f}x, demanded {entry['demanded']}x: {_said(entry['met'])}"
            lines += [f"{name.removesuffix(' latency')}, latency within 1 point after training: {said}; {verdict}", ""]
    return "\n".join(lines)


HEADER = (
    "| method | runs | left | parameters | loss, raw | recalibrated | after training | 95 % interval | latency | score + cut s | more s |"
)


def _rows(own: Sequence[Record], original: float) -> list[str]:
    rows = []
    for method in dict.fromkeys(r["method"] for r in own):
        runs = [r for r in own if r["method"] == method and "raw" in r]
        if not runs:
            reason = next(r["unreachable"] for r in own if r["method"] == method)
            rows.append((math.inf, [method, "0", f"not reached: {' '.join(reason.split())[:80]}".replace("|", "/"), *[""] * 8]))
            continue
        left = _mean([r["macs"] if "macs" in r else r["nonzero"] for r in runs])
        stages = [_mean(losses(runs, method, stage, original)) for stage in STAGES]
        _, low, high = mean_and_interval(losses(runs, method, "trained", original))
        latency = _mean([r["latency"]["ratio"] for r in runs if "latency" in r])
        seconds = [statistics.median(sum(r["seconds"][k] for k in keys) for r in runs) for keys in (("score", "cut"), ("compensate",))]
        rank = min(stages[:2]) if not is_ours(method) else stages[0]
        cells = [method, str(len(runs)), f"{left:.3f}", f"{_mean([r['params'] for r in runs]):.3f}", *map(_points, stages)]
        cells += ["" if math.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}", f"{latency:.3f}", *(f"{s:.2f}" for s in seconds)]
        rows.append((rank, cells))
    ordered = sorted(rows, key=lambda row: row[0])
    return [HEADER, "|---" * (HEADER.count("|") - 1) + "|", *(f"| {' | '.join(cells)} |" for _, cells in ordered)]


def _points(loss: float) -> str:
    return "" if math.isnan(loss) else f"{100 * loss:.2f}"


def _said(met: bool) -> str:
    return "met" if met else "not met"


def _met(entry: dict[str, Any]) -> list[str]:
    lines = []
    for name, what in (("before", "before training"), ("trained", "after the short training"), ("distilled", "after distillation")):
        if name in entry:
            e = entry[name]
            text = f"- {what}: {e['loss']:.2f} points lost; best peer {e['best_peer']} {e['its_loss']:.2f}, demanded {e['demanded']:.2f}"
            lines.append(f"{text}: {_said(e['met'])}")
            if "goal" in e:
                lines.append(f"- goal {e['goal']:.0%} of the original's accuracy, kept {e['kept']:.1%}: {_said(e['goal_met'])}")
    return lines
