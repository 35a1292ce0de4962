"""What a choice costs in every resource that a budget can bound, for many widths at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shohin.errors import BudgetError, closest
from shohin.graph.costs import Term
from shohin.planning.choice import Choice
from shohin.planning.features import Features
from shohin.planning.latency import LatencyModel
from shohin.planning.options import homes
from shohin.planning.polynomials import Polynomials

Floats = npt.NDArray[np.float64]
RESOURCES = ("latency_ms", "size_bytes", "memory_bytes", "macs", "params")


@dataclass(frozen=True)
class Piece:
    """A part of a cost: ``rate * sum(terms)`` while no region of it is skipped."""

    rate: float
    terms: tuple[Term, ...]
    regions: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs of choices.

    Args:
        model: predicts the latency and holds the operators.
        memory: bytes that are alive at each step of the execution, as polynomials of the widths; the peak is their maximum,
            so a bound of ``memory_bytes`` bounds each of them. Groups that live inside a skipped region count as width 0.
        fixed_bytes: size of the file beside the weights, and the weights that no choice changes.
    """

    model: LatencyModel
    memory: Sequence[tuple[Term, ...]] = ()
    fixed_bytes: float = 0.0

    @property
    def features(self) -> Features:
        """Of the model's operators."""
        return self.model.features

    @cached_property
    def _memory(self) -> Polynomials:
        return Polynomials(self.memory, self.features.groups)

    @cached_property
    def _private(self) -> npt.NDArray[np.bool_]:
        """(regions, groups): which groups live inside which region."""
        features, home = self.features, homes(self.features.operators)
        inside = [[r in home.get(g, ()) for g in features.groups] for r in features.regions]
        return np.array(inside, dtype=bool).reshape(len(features.regions), len(features.groups))

    def table(
        self, kept: npt.ArrayLike, skipped: npt.NDArray[np.bool_], int8: Collection[str], resources: Iterable[str]
    ) -> dict[str, Floats]:
        """Resource -> values of shape (batch,). ``memory_bytes@i`` is step i; the peak is ``memory_bytes``."""
        wanted = list(resources)
        out: dict[str, Floats] = {}
        if "latency_ms" in wanted:
            out["latency_ms"] = self.model.predict_many(kept, skipped, int8)
        if {"size_bytes", "macs", "params"} & set(wanted):
            macs, _, weights, _, _ = self.features.amounts(kept, skipped)
            out["macs"], out["params"] = macs.sum(1), weights.sum(1)
            out["size_bytes"] = weights @ np.where(self.features.is_int8(int8), 1.0, 4.0) + self.fixed_bytes
        if any(r.startswith("memory_bytes") for r in wanted):
            steps = self._memory.at(np.asarray(kept) * ~(skipped @ self._private))
            out["memory_bytes"] = steps.max(1) if self.memory else np.zeros(len(steps))
            out |= {f"memory_bytes@{i}": steps[:, i] for i in range(len(self.memory))}
        return {r: out[r] for r in wanted}

    def of(self, choice: Choice, resources: Iterable[str] = RESOURCES) -> dict[str, float]:
        """Resource -> value of one choice."""
        return {r: float(v[0]) for r, v in self.table(*self.features.rows([choice]), choice.int8, resources).items()}

    def rows_of(self, budgets: Mapping[str, float]) -> dict[str, float]:
        """The bounds as rows that are sums of costs: the memory peak becomes one bound for each step that could exceed it.

        Raises:
            BudgetError: if a resource is unknown, or memory is bounded but no steps are known.
        """
        out = {}
        for resource, bound in budgets.items():
            if resource not in RESOURCES:
                raise BudgetError(f"planning cannot bound {resource!r}; known: {', '.join(RESOURCES)}{closest(resource, RESOURCES)}")
            if resource != "memory_bytes":
                out[resource] = bound
            elif not self.memory:
                raise BudgetError("the memory of a plan is not known (no lifetimes of tensors were given), so it cannot be bounded")
            else:
                out |= {f"memory_bytes@{i}": bound for i in range(len(self.memory))}
        return out

    def pieces(self, resource: str, int8: Collection[str]) -> list[Piece]:
        """A row of `rows_of` as a sum of polynomials, each tied to its regions."""
        ops = self.features.operators
        one = (Term(1.0, ()),)
        if resource.startswith("memory_bytes@"):
            return [Piece(1.0, self.memory[int(resource.partition("@")[2])])]
        if resource == "macs":
            return [Piece(1.0, op.macs, frozenset(op.regions)) for op in ops]
        if resource == "params":
            return [Piece(1.0, op.weights, frozenset(op.regions)) for op in ops]
        if resource == "size_bytes":
            width = [1.0 if op.address in int8 else 4.0 for op in ops]
            weights = [Piece(w, op.weights, frozenset(op.regions)) for w, op in zip(width, ops, strict=True)]
            return [Piece(self.fixed_bytes, one), *weights]
        per_mac, per_element, per_start, per_edge = self.model.rates(int8)
        out = []
        for op, mac, element, start in zip(ops, per_mac, per_element, per_start, strict=True):
            regions = frozenset(op.regions)
            out += [Piece(mac, op.macs, regions), Piece(element, op.elements, regions), Piece(start, one, regions)]
        inside = {op.address: frozenset(op.regions) for op in ops} | {"": frozenset[str]()}
        for edge, rate in zip(self.features.edges, per_edge, strict=True):
            out.append(Piece(rate, edge.elements, inside[edge.source] | inside[edge.target]))
        return out
