"""Latency of a choice, predicted by a non-negative regression fitted to a few whole-model timings.

Tables of single operations mislead: layout conversions surround each one and fusions are missing. Whole-model timings of
random plans with features per class of operation predict a plan's latency to a few percent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shohin.errors import PlanError
from shohin.planning.choice import Choice
from shohin.planning.features import ELEMENTS_SCALE, MACS_SCALE, Features
from shohin.planning.options import GroupOptions

Floats = npt.NDArray[np.float64]
VERSION = 1


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicted milliseconds: features times non-negative coefficients.

    Args:
        features: of the model's operations.
        coefficients: milliseconds per feature; shape (len(features.names),).
        choices: that were timed.
        measured_ms: their timings; shape (len(choices),).
        ridge: of the fit.
    """

    features: Features
    coefficients: Floats
    choices: tuple[Choice, ...]
    measured_ms: Floats
    ridge: float

    @staticmethod
    def fit(features: Features, choices: Sequence[Choice], measured_ms: Sequence[float] | Floats, ridge: float = 1e-3) -> LatencyModel:
        """Relative least squares, non-negative, with a small ridge on columns scaled to their mean share of the time.

        Classes that always grow together cannot be told apart; the ridge shares the time between them, which changes no
        prediction on similar plans. 12 to 24 timings are enough for one precision.

        Raises:
            PlanError: if there are no timings, their number does not match, or one is not positive and finite.
        """
        times = np.asarray(measured_ms, dtype=np.float64)
        if len(choices) == 0 or times.shape != (len(choices),):
            raise PlanError(f"the latency fit needs one timing for each choice; got {len(choices)} choices and timings {times.shape}")
        if not (np.isfinite(times).all() and (times > 0).all()):
            bad = int(np.flatnonzero(~(np.isfinite(times) & (times > 0)))[0])
            raise PlanError(f"timing {bad} is {times[bad]} ms; timings must be positive: measure again")
        coefficients = fit_nonnegative(features.matrix(choices), times, ridge)
        return LatencyModel(features, coefficients, tuple(choices), times, ridge)

    def refit(self, choices: Sequence[Choice], measured_ms: Sequence[float] | Floats) -> LatencyModel:
        """A model fitted to the old and the new timings together (the search seeks the model's errors, so time its finalists)."""
        times = np.concatenate([self.measured_ms, np.asarray(measured_ms, dtype=np.float64)])
        return LatencyModel.fit(self.features, [*self.choices, *choices], times, self.ridge)

    def predict(self, choice: Choice) -> float:
        """Milliseconds. Raises PlanError if the choice uses a class of operation in a precision that was never timed."""
        return float(self.predict_many(*self.features.rows([choice]), choice.int8)[0])

    def predict_many(self, kept: npt.ArrayLike, skipped: npt.NDArray[np.bool_], int8: Collection[str]) -> Floats:
        """Milliseconds of many widths (batch, groups) and skips (batch, regions) in one assignment of precisions."""
        return self._times(self.features.table(kept, skipped, int8))

    def _times(self, table: Floats) -> Floats:
        unknown = np.flatnonzero(~self.timed & (table > 0).any(0))
        if len(unknown):
            name = self.features.names[int(unknown[0])]
            raise PlanError(f"latency of {name!r} is unknown: no timed plan contains it; time a few plans that do and refit")
        return table @ self.coefficients

    @cached_property
    def timed(self) -> npt.NDArray[np.bool_]:
        """Which features occur in the timed choices."""
        return np.asarray((self.features.matrix(self.choices) > 0).any(0))

    @cached_property
    def errors(self) -> Floats:
        """Absolute relative error of each timing when it is left out of the fit; shape (len(choices),)."""
        table, times = self.features.matrix(self.choices), self.measured_ms
        out = np.zeros(len(times))
        for i in range(len(times)):
            rest = np.arange(len(times)) != i
            if rest.any():
                out[i] = abs(table[i] @ fit_nonnegative(table[rest], times[rest], self.ridge) / times[i] - 1)
        return out

    def errors_on(self, choices: Sequence[Choice], measured_ms: Sequence[float] | Floats) -> Floats:
        """Absolute relative errors on timings that were not used in the fit."""
        times = np.asarray(measured_ms, dtype=np.float64)
        return np.abs(self._times(self.features.matrix(choices)) / times - 1)

    def rates(self, int8: Collection[str]) -> tuple[Floats, Floats, Floats, Floats]:
        """Milliseconds per MAC, per element and per start of each operator (operators,), and per element of each edge (edges,)."""
        fixed, first = self.features.columns(int8)
        c = self.coefficients
        edges = self.features.crossing(int8) * (c[-1] / ELEMENTS_SCALE) if self.features.edges else np.zeros(0)
        return c[first] / MACS_SCALE, c[first + 1] / ELEMENTS_SCALE, c[fixed] / len(self.features.operators), edges

    def operator_ms(self, choice: Choice) -> dict[str, float]:
        """Attributed milliseconds by operation address; they sum to the prediction.

        The fixed cost is shared equally; a change of precision counts for the operation that receives (or, at the model's
        end, sends) the tensor. Skipped operations have 0.
        """
        macs, elements, _, alive, edges = self.features.amounts(*self.features.rows([choice]))
        per_mac, per_element, per_start, per_edge = self.rates(choice.int8)
        times = (macs * per_mac + elements * per_element + alive * per_start)[0]
        for i, edge in enumerate(self.features.edges):
            end = edge.target or edge.source
            if end:
                times[self.features.position[end]] += edges[0, i] * per_edge[i]
        return {op.address: float(t) for op, t in zip(self.features.operators, times, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary: coefficients by name and the timings; the operators are not part of it."""
        return {
            "version": VERSION,
            "coefficients": dict(zip(self.features.names, self.coefficients.tolist(), strict=True)),
            "ridge": self.ridge,
            "samples": [{**c.to_json(), "ms": float(t)} for c, t in zip(self.choices, self.measured_ms, strict=True)],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], features: Features) -> LatencyModel:
        """The inverse of `to_json`. Raises PlanError if the classes of operation differ or the JSON is damaged."""
        if data.get("version") != VERSION:
            raise PlanError(f"latency model version {data.get('version')!r} is not supported (this Shohin reads version {VERSION})")
        try:
            by_name, samples, ridge = data["coefficients"], data["samples"], float(data["ridge"])
            if set(by_name) != set(features.names):
                raise PlanError("the latency model was fitted for another model: its classes of operation differ; time the model again")
            times = np.array([float(s["ms"]) for s in samples])
            coefficients = np.array([float(by_name[name]) for name in features.names])
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the latency model's JSON is damaged: {error!r}") from None
        return LatencyModel(features, coefficients, tuple(Choice.from_json(s) for s in samples), times, ridge)


def fit_nonnegative(table: Floats, times: Floats, ridge: float) -> Floats:
    """Non-negative coefficients with the least squared relative error; the ridge is on columns scaled to their mean share of the time."""
    import scipy.optimize  # here, because it takes a third of a second

    relative = table / times[:, None]
    scale = np.maximum(np.abs(relative).mean(0), 1e-9)
    left = np.concatenate([relative / scale, ridge**0.5 * np.eye(table.shape[1])])
    right = np.concatenate([np.ones(len(times)), np.zeros(table.shape[1])])
    return np.asarray(scipy.optimize.nnls(left, right)[0] / scale, dtype=np.float64)


def random_choices(
    groups: Mapping[str, GroupOptions],
    n: int,
    seed: int,
    *,
    regions: Sequence[str] = (),
    conflicts: Mapping[str, Collection[str]] | None = None,
    precisions: Sequence[frozenset[str]] = (frozenset(),),
    lowest: float = 0.15,
) -> list[Choice]:
    """Choices to time: for each precision the full model, the smallest one and ``n`` random ones, all of allowed widths.

    Half of the random ones draw each width by itself (lopsided plans), half draw all widths near one level (small and large
    plans). Half of each kind skip each region with probability 1/4, which separates the cost of starting an operation.

    Args:
        groups: by name.
        n: random choices for each precision, at least 1.
        seed: of the draws.
        regions: that may be skipped.
        conflicts: regions that must not be skipped together.
        precisions: sets of int8 addresses; the empty set is float32.
        lowest: smallest fraction to keep.
    """
    if n < 1 or not 0 <= lowest < 1:
        raise PlanError(f"the latency fit needs at least one random plan and lowest in [0, 1); got n={n}, lowest={lowest}")
    random = np.random.default_rng(seed)
    out: list[Choice] = []
    for int8 in precisions:
        out.append(Choice({name: g.size for name, g in groups.items()}, frozenset(), int8))
        out.append(Choice({name: g.counts[0] for name, g in groups.items()}, frozenset(), int8))
        for i in range(n):
            level = random.uniform(lowest, 1)
            kept = {}
            for name, g in sorted(groups.items()):
                alone = random.uniform(lowest, 1)
                kept[name] = g.nearest(alone if i % 2 else float(np.clip(level + (alone - 0.575) / 2, lowest, 1)))
            skipped: set[str] = set()
            for region in regions:
                if random.uniform() < 0.25 and i % 4 >= 2 and not skipped & set((conflicts or {}).get(region, ())):
                    skipped.add(region)
            out.append(Choice(kept, frozenset(skipped), int8))
    return out
