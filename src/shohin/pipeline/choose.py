"""Choose: the front and the best of the finished candidates, with the reasons."""

from __future__ import annotations

from typing import Any

from shohin.budget import QUANTITIES, Budget
from shohin.candidate import Candidate, pareto


def choose(candidates: dict[str, Candidate], budget: Budget, lower_is_better: bool) -> dict[str, Any]:
    """``{"best", "front", "reasons", "unmet"}`` by names.

    The best keeps every constraint. Where only the drop is bounded it is the fastest; otherwise it has the best quality (the
    fastest of equals). None is slower than the original, which is always a candidate. If nothing keeps the budget, the one that misses by the smallest fraction is named, with what it misses.
    """
    baseline = candidates["baseline"]
    base = baseline.metrics.values()
    sign = -1.0 if lower_is_better else 1.0
    measured = [c for c in candidates.values() if "latency_ms" in c.metrics.values()]
    reasons: list[str] = []

    def quality(c: Candidate) -> float:
        return sign * c.metrics.values()["quality"]

    def latency(c: Candidate) -> float:
        return c.metrics.values()["latency_ms"]

    front = pareto(measured, latency, quality)
    slower = [c for c in measured if c is not baseline and _slower(c, base.get("size_bytes", float("inf")))]
    for c in slower:
        reasons.append(f"{c.name} is not faster than the original ({_ratio(c)}); it was refused")
    violations = {c.name: budget.violations(c.metrics.values(), base, lower_is_better=lower_is_better) for c in measured}
    fits = [c for c in measured if not violations[c.name] and c not in slower]
    costs = [m for m in budget.limits if m != "drop"]
    unmet: list[str] = []
    if fits:
        best = (
            max(fits, key=lambda c: (quality(c), -latency(c)))
            if costs or not budget.limits
            else min(fits, key=lambda c: (latency(c), -quality(c)))
        )
        if best is baseline and len(measured) > 1:
            reasons.append("the original is the best: " + _why_not(measured, violations, slower))
    else:
        usable = [c for c in measured if c not in slower]
        best = min(usable, key=lambda c: (_excess(violations[c.name]), -quality(c)))
        names = {metric: quantity for quantity, (metric, _) in QUANTITIES.items()}
        for metric, (value, bound) in violations[best.name].items():
            unmet.append(f"{names[metric]} <= {bound:.4g} cannot be met: the nearest candidate, {best.name}, has {value:.4g}")
        reasons.extend(unmet)
    return {"best": best.name, "baseline": "baseline", "front": [c.name for c in front], "reasons": reasons, "unmet": unmet}


def _slower(c: Candidate, size: float) -> bool:
    """Slower than the original; or as fast, as far as five processes can tell, and not smaller either."""
    ratio = c.notes.get("latency_ratio")
    if ratio is None:
        return False
    return bool(ratio[0] > 1.0 or (ratio[2] >= 1.0 and c.metrics.values().get("size_bytes", 0.0) >= size))


def _ratio(c: Candidate) -> str:
    ratio = c.notes["latency_ratio"]
    return f"{ratio[0]:.3f} of its time, {ratio[1]:.3f} to {ratio[2]:.3f} over processes"


def _excess(violations: dict[str, tuple[float, float]]) -> float:
    return max(((value - bound) / max(abs(bound), 1e-9) if value == value else float("inf")) for value, bound in violations.values())


def _why_not(measured: list[Candidate], violations: dict[str, dict[str, tuple[float, float]]], slower: list[Candidate]) -> str:
    parts = []
    for c in measured:
        if c.name == "baseline":
            continue
        if c in slower:
            parts.append(f"{c.name} is slower")
        elif violations[c.name]:
            metric, (value, bound) = next(iter(violations[c.name].items()))
            parts.append(f"{c.name} has {metric} {value:.4g}, allowed {bound:.4g}")
        else:
            parts.append(f"{c.name} has lower quality")
    return "; ".join(parts)
