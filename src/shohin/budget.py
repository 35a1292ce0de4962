"""Budgets: what the user can afford, parsed from a sentence or given by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from shohin.errors import BudgetError, closest

#: quantity -> (metric name, unit -> factor to the metric's unit)
QUANTITIES: dict[str, tuple[str, dict[str, float]]] = {
    "latency": ("latency_ms", {"us": 1e-3, "ms": 1.0, "s": 1e3}),
    "size": ("size_bytes", {"b": 1.0, "kb": 1024.0, "mb": 1024.0**2}),
    "memory": ("memory_bytes", {"b": 1.0, "kb": 1024.0, "mb": 1024.0**2}),
    "energy": ("energy_mj", {"mj": 1.0, "j": 1e3}),
    "drop": ("drop", {}),
}
EXAMPLE = 'for example "latency <= 2 ms, size <= 300 kb, drop <= 0.5 %"'


@dataclass(frozen=True)
class Limit:
    """An upper bound. ``relative`` means a fraction of the baseline's value (``50 %`` or ``0.5x`` is 0.5)."""

    value: float
    relative: bool = False

    def absolute(self, baseline: float) -> float:
        """The bound in the metric's own unit, given the baseline's value."""
        return self.value * abs(baseline) if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value * 100:.15g} %" if self.relative else f"{self.value:.15g}"


class Budget:
    """Constraints on a candidate.

    Args:
        latency_ms, size_kb, memory_kb, energy_mj, drop: upper bounds. A number is absolute; a string may be relative to
            the baseline (``"50 %"``, ``"0.5x"``) or carry a unit. A ``drop`` in ``%`` is relative to the baseline's
            quality; a bare number is in the metric's own unit.

    Raises:
        BudgetError: if a bound does not parse or is not positive (``drop`` may be zero).
    """

    def __init__(
        self,
        *,
        latency_ms: float | str | None = None,
        size_kb: float | str | None = None,
        memory_kb: float | str | None = None,
        energy_mj: float | str | None = None,
        drop: float | str | None = None,
    ) -> None:
        given = {
            "latency": (latency_ms, "ms"),
            "size": (size_kb, "kb"),
            "memory": (memory_kb, "kb"),
            "energy": (energy_mj, "mj"),
            "drop": (drop, ""),
        }
        limits = {}
        for quantity, (value, unit) in given.items():
            if value is not None:
                text = value if isinstance(value, str) else f"{value!r} {unit}"
                limits[QUANTITIES[quantity][0]] = _limit(quantity, text, default_unit=unit)
        self.limits: dict[str, Limit] = limits

    @staticmethod
    def parse(text: str | Budget | None) -> Budget:
        """Reads ``"latency <= 2 ms, drop <= 0.5 %"``. An empty text is no constraint.

        Raises:
            BudgetError: if a part does not parse, or two parts bound the same quantity.
        """
        if isinstance(text, Budget):
            return text
        if text is not None and not isinstance(text, str):
            raise BudgetError(f"a budget is a sentence or a Budget, not {type(text).__name__}: {EXAMPLE}")
        budget = Budget()
        for part in (p.strip() for p in (text or "").split(",")):
            if not part:
                continue
            found = re.fullmatch(r"([A-Za-z_]+)\s*(<=|<|=<|>=|>|=)\s*(.+)", part)
            if not found:
                raise BudgetError(f"cannot read {part!r} in the budget {text!r}: expected '<quantity> <= <number> <unit>', {EXAMPLE}")
            quantity, sign, value = found.group(1).lower(), found.group(2), found.group(3)
            if quantity not in QUANTITIES:
                raise BudgetError(
                    f"unknown quantity {quantity!r} in the budget; known: {', '.join(QUANTITIES)}{closest(quantity, QUANTITIES)}"
                )
            if sign not in ("<=", "<", "=<"):
                raise BudgetError(f"{part!r}: a budget is an upper bound, write '{quantity} <= ...'")
            metric = QUANTITIES[quantity][0]
            if metric in budget.limits:
                raise BudgetError(f"the budget bounds {quantity} twice ({budget.limits[metric]} and {value}); keep one of them")
            budget.limits[metric] = _limit(quantity, value)
        return budget

    def __repr__(self) -> str:
        return f"Budget({str(self)!r})"

    def __str__(self) -> str:
        names = {metric: quantity for quantity, (metric, _) in QUANTITIES.items()}
        units = {"latency_ms": " ms", "size_bytes": " b", "memory_bytes": " b", "energy_mj": " mj", "drop": ""}
        return ", ".join(f"{names[m]} <= {x}{'' if x.relative else units[m]}" for m, x in self.limits.items())

    def violations(
        self, metrics: dict[str, float], baseline: dict[str, float], *, lower_is_better: bool = False
    ) -> dict[str, tuple[float, float]]:
        """The constraints that do not hold: metric -> (value, bound). A metric that was not measured counts as violated.

        Args:
            metrics, baseline: values by metric name; ``quality`` is needed if ``drop`` is bounded.
        """
        out = {}
        for metric, limit in self.limits.items():
            if metric == "drop":
                sign = 1.0 if lower_is_better else -1.0
                value = sign * (metrics.get("quality", float("nan")) - baseline["quality"])
                bound = limit.absolute(baseline["quality"])
            else:
                value, bound = metrics.get(metric, float("nan")), limit.absolute(baseline.get(metric, float("nan")))
            if not value <= bound + 1e-12:
                out[metric] = (value, bound)
        return out

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {metric: {"value": x.value, "relative": x.relative} for metric, x in self.limits.items()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Budget:
        """The inverse of `to_json`."""
        budget = Budget()
        budget.limits.update({metric: Limit(x["value"], x["relative"]) for metric, x in data.items()})
        return budget


def _limit(quantity: str, text: str, default_unit: str | None = None) -> Limit:
    """One bound: number and unit."""
    found = re.fullmatch(r"([-+0-9.eE]+)\s*([A-Za-z%]*)", text.strip())
    units = QUANTITIES[quantity][1]
    try:
        number = float(found.group(1)) if found else float("nan")
    except ValueError:
        number = float("nan")
    if not found or not math.isfinite(number):
        raise BudgetError(f"{quantity} <= {text}: {text.strip()!r} is not a number with a unit, {EXAMPLE}")
    unit = found.group(2).lower()
    if unit in ("%", "x"):
        limit = Limit(number / 100 if unit == "%" else number, relative=True)
    elif quantity == "drop":
        if unit not in ("", "points", "point"):
            raise BudgetError(f"drop <= {text}: give a bare number in the metric's own unit, or a percentage of the baseline's quality")
        limit = Limit(number)
    else:
        unit = unit or (default_unit or "")
        if unit not in units:
            raise BudgetError(f"{quantity} <= {text}: give a unit, one of {', '.join(units)}, % or x")
        limit = Limit(number * units[unit])
    if limit.value < 0 or (limit.value == 0 and quantity != "drop"):
        raise BudgetError(f"{quantity} <= {text}: the bound must be positive")
    return limit
