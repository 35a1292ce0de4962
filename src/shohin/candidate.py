"""Candidates: a plan with its model, its artefact and what was measured, and the Pareto set of several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from shohin.formats import Quantizer
from shohin.plan import Plan

METRICS = ("quality", "latency_ms", "size_bytes", "memory_bytes", "energy_mj", "macs", "params")


@dataclass(frozen=True)
class Measurement:
    """A number with how it was obtained.

    Args:
        value: in the metric's unit.
        how: "measured" or "estimated", followed by the method ("measured: thread CPU time, minimum of 400 slices").
        conditions: batch, threads, instruction set, runtime version...
        spread: relative repeatability (0.01 is 1 %), where it is known.
    """

    value: float
    how: str
    conditions: Mapping[str, Any] = field(default_factory=dict)
    spread: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {"value": self.value, "how": self.how, "conditions": dict(self.conditions), "spread": self.spread}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_json`."""
        return Measurement(float(data["value"]), str(data["how"]), dict(data["conditions"]), data["spread"])


@dataclass(frozen=True)
class Metrics:
    """What is known of a candidate, each a `Measurement` or None. Units are in the names; quality is the user's metric."""

    quality: Measurement | None = None
    latency_ms: Measurement | None = None
    size_bytes: Measurement | None = None
    memory_bytes: Measurement | None = None
    energy_mj: Measurement | None = None
    macs: Measurement | None = None
    params: Measurement | None = None

    def values(self) -> dict[str, float]:
        """Metric name -> value, of those that are known."""
        return {name: m.value for name in METRICS if (m := getattr(self, name)) is not None}

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {name: m.to_json() for name in METRICS if (m := getattr(self, name)) is not None}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Metrics:
        """The inverse of `to_json`."""
        return Metrics(**{name: Measurement.from_json(data[name]) for name in METRICS if name in data})


@dataclass
class Candidate:
    """One way to run the user's model.

    Args:
        name: unique in its run ("baseline", "c01-int8"...).
        plan: every choice.
        model: the cut module (the user's own class where it could be repaired, a graph module otherwise), or None if it
            has not been loaded; its weights are snapped to the grid if the plan has formats.
        view: the module that simulates all bits, or None if the plan has no formats.
        evidence: activation and weight quantizers by address.
        artifact: path of the file that ships.
        metrics: what was measured.
        notes: facts for the report (form of the cut, recovery steps and the loss each won back, parity...); JSON-able.
        removed: parameter or buffer name -> {dimension: removed indices}.
    """

    name: str
    plan: Plan
    model: nn.Module | None = None
    view: nn.Module | None = None
    evidence: dict[str, Quantizer] = field(default_factory=dict)
    artifact: Path | None = None
    metrics: Metrics = field(default_factory=Metrics)
    notes: dict[str, Any] = field(default_factory=dict)
    removed: dict[str, dict[int, list[int]]] = field(default_factory=dict)


def pareto(candidates: Iterable[Candidate], cost: Callable[[Candidate], float], quality: Callable[[Candidate], float]) -> list[Candidate]:
    """The candidates that no other beats on both, cheapest first. ``quality``: larger is better."""
    best = float("-inf")
    front = []
    for c in sorted(candidates, key=lambda c: (cost(c), -quality(c))):
        if quality(c) > best:
            front.append(c)
            best = quality(c)
    return front
