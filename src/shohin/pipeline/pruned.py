"""One model pruned: scores, a choice, the cut or the zeros, recovery."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shohin.data import Call, Data
from shohin.distillation import LABELS, distill
from shohin.errors import DataError, ModelError, PlanError, closest
from shohin.evidence import Divergence
from shohin.evidence.divergence import answers
from shohin.graph import Graph
from shohin.graph.kinds import kind
from shohin.pipeline.compensate import compensate
from shohin.pipeline.job import load_tensors
from shohin.pipeline.share import uniform_cut
from shohin.pipeline.units import ALLOCATIONS, Share, choose_blocks, choose_units, share_left
from shohin.plan import Plan
from shohin.planning.widths import plan_of
from shohin.pruning import sparse
from shohin.pruning.criteria import CRITERIA, Inputs
from shohin.pruning.criteria.blocks import BLOCK_CRITERIA
from shohin.pruning.normalization import WAYS, normalize
from shohin.surgery import cut_sharing_values, view
from shohin.training import TrainConfig


@dataclass(frozen=True)
class Wish:
    """What is asked of `shohin.prune`; see there.

    Args:
        kinds: of units, and "depth"; empty for zeros.
        pattern: of zeros; None for units.
    """

    keep: float
    of: str
    criterion: str | None
    kinds: tuple[str, ...]
    pattern: sparse.Pattern | None
    allocation: str | None
    normalization: str | None
    align: int
    uniform: bool
    epochs: int
    seed: int

    @property
    def units(self) -> tuple[str, ...]:
        """The kinds of units that may go."""
        return tuple(k for k in self.kinds if k != "depth")

    @property
    def blocks(self) -> bool:
        """True if regions and layers may go."""
        return "depth" in self.kinds

    @property
    def scored_by(self) -> str:
        """The criterion."""
        default = "auto" if self.pattern is not None else "taylor" if self.units else "divergence"
        return self.criterion or default

    def check(self, has_batches: bool) -> None:
        """Raises PlanError for what is not known or does not go together, DataError if batches are needed and there are none."""
        criteria: Collection[str] = sparse.CRITERIA if self.pattern is not None else CRITERIA if self.units else BLOCK_CRITERIA
        allocations = sparse.ALLOCATIONS if self.pattern is not None else ALLOCATIONS
        for name, value, allowed in (
            ("criterion", self.scored_by, criteria),
            ("allocation", self.allocation, allocations),
            ("normalization", self.normalization, WAYS),
        ):
            if value is not None and (not isinstance(value, str) or value not in allowed):
                known = f"one of {', '.join(map(repr, allowed))}"
                other = self._elsewhere(value) if name == "criterion" else ""
                raise PlanError(f"{name}={value!r} {other or 'is not known'}; {known}{'' if other else closest(str(value), allowed)}")
        if self.normalization is not None and self.allocation != "global":
            raise PlanError("normalization= says which units compete, for allocation='global'")
        if self.pattern is not None and self.pattern.kind == "n:m" and self.allocation not in (None, "uniform"):
            raise PlanError(f"{self.pattern} leaves the same share in every weight: allocation={self.allocation!r} has nothing to decide")
        if self.blocks and self.units and self.allocation in ("uniform", "global"):
            raise PlanError(f"units and depth together are planned by losses: allocation={self.allocation!r} cannot weigh them")
        if self.uniform and (self.pattern is not None or self.blocks or self.allocation is not None):
            raise PlanError("uniform=True gives all layers the same share of units: granularity and allocation have nothing to decide")
        free = self.scored_by in sparse.DATA_FREE if self.pattern is not None else self._needs_weights_alone()
        if not has_batches and not (free and self.allocation != "sensitivity"):
            what = f"criterion={self.scored_by!r}" if not free else "allocation='sensitivity'"
            raise DataError(f"{what} needs batches: give Data(train=loader), or criterion='magnitude'")

    def _elsewhere(self, criterion: object) -> str:
        """What a criterion of another granularity is for, or ""."""
        families = (
            (sparse.CRITERIA, "decides about zeros (granularity='unstructured', '2:4'...)"),
            (CRITERIA, "decides about units (granularity='channel', 'neuron', 'head', 'width')"),
            (BLOCK_CRITERIA, "decides about depth (granularity='depth')"),
        )
        asked = "zeros" if self.pattern is not None else "units" if self.units else "depth"
        found = next((why for names, why in families if isinstance(criterion, str) and criterion in names), "")
        return f"{found}, not about {asked}" if found else ""

    def _needs_weights_alone(self) -> bool:
        return bool(self.units) and not self.blocks and CRITERIA[self.scored_by].needs == "weights"


@dataclass
class Pruned:
    """What is left.

    Args:
        plan: what was chosen.
        model: smaller, or with zeros.
        notes: how, JSON-able.
        removed: see `shohin.candidate.Candidate`.
    """

    plan: Plan
    model: nn.Module
    notes: dict[str, Any]
    removed: dict[str, dict[int, list[int]]] = field(default_factory=dict)


def prune_units(model: nn.Module, graph: Graph, data: Data, calls: Sequence[Call], wish: Wish, recover: str | None) -> Pruned:
    """A cut model. Errors as for `shohin.prune`."""
    clock = _Clock()
    made = None
    if wish.uniform:
        with clock.step("score"):
            scores = _unit_scores(graph, data, calls, wish)
        with clock.step("cut"):
            plan, left, made = uniform_cut(model, graph, wish.keep, wish.of, scores)
    else:
        plan = _planned(graph, data, calls, wish, clock)
        left = share_left(graph, plan, wish.of)
        with clock.step("cut"):
            made = cut_sharing_values(model, graph, plan)
    notes = {"form": made.form, "form_reason": made.reason, "proof": made.proof.error, "left": left, "criterion": wish.scored_by}
    if recover is not None and not plan.is_identity:
        with clock.step("compensate"):
            compensate(made, graph, plan, calls, wish.seed)
    if recover == "distill" and not plan.is_identity:
        with clock.step("distill"):
            notes["training"] = _distilled(made.model, model, data, wish)
    return Pruned(plan, made.model, {**notes, "seconds": clock.seconds}, made.removed)


def _planned(graph: Graph, data: Data, calls: Sequence[Call], wish: Wish, clock: _Clock) -> Plan:
    share, whole = Share(wish.keep, wish.of), Plan(graph.program.fingerprint)
    if wish.units and "channel" not in wish.units:
        kinds = {g.name: kind(graph, g) for g in graph.groups}
        chosen = [name for name, k in kinds.items() if k in wish.units]
        if not chosen:
            raise PlanError(
                f"the model has no {' or '.join(wish.units)} to remove; it has: {', '.join(sorted(set(kinds.values()))) or 'none'}"
            )
        graph = graph.only(chosen)
    if wish.keep >= 1:
        return whole
    if not (graph.groups and wish.units) and not (graph.skippable and wish.blocks):
        frozen = ", ".join(f"{f.address} ({f.reason})" for f in graph.frozen[:4])
        raise PlanError(f"the model has no {' or '.join(wish.kinds)} to remove" + (f"; frozen: {frozen}" if frozen else ""))
    divergence = Divergence(view(graph, whole), calls) if calls and (wish.blocks or wish.allocation == "sensitivity") else None
    if not wish.units:
        with clock.step("score"):
            found = BLOCK_CRITERIA[wish.scored_by](Inputs(graph, data, calls, wish.seed))
            if not found.scores:
                raise DataError("no block has a score: " + "; ".join(f"{n}: {why}" for n, why in list(found.left_out.items())[:4]))
        with clock.step("plan"):
            again = divergence if wish.scored_by == "divergence" else None
            return Plan(graph.program.fingerprint, {}, choose_blocks(graph, share, found.scores, again))
    with clock.step("score"):
        scores = _unit_scores(graph, data, calls, wish)
    with clock.step("plan"):
        ranked = normalize(graph, {n: s for n, s in scores.items()}, wish.normalization or "global")
        choice = choose_units(
            graph,
            {n: s.tolist() for n, s in (ranked.scores if wish.allocation == "global" else scores).items()},
            share,
            wish.align,
            wish.allocation or "planned",
            classes=ranked.classes,
            divergence=divergence,
            blocks=wish.blocks,
        )
        return plan_of(graph, choice, {n: s.tolist() for n, s in scores.items()})


def _unit_scores(graph: Graph, data: Data, calls: Sequence[Call], wish: Wish) -> dict[str, Tensor]:
    with _answers_are_finite(graph, calls):
        return CRITERIA[wish.scored_by](Inputs(graph, data, calls, wish.seed))


@contextmanager
def _answers_are_finite(graph: Graph, calls: Sequence[Call]) -> Iterator[None]:
    """Raises DataError in place of what answers with NaN lead to: nothing can be drawn from them."""
    try:
        yield
    except RuntimeError as error:
        if calls and not all(bool(a.isfinite().all()) for a in answers(view(graph, Plan(graph.program.fingerprint)), calls)):
            raise DataError("the model's answers on the calibration batches hold NaN or Inf: look for them in the data") from error
        raise


def prune_weights(model: nn.Module, graph: Graph, data: Data, calls: Sequence[Call], wish: Wish, recover: str | None) -> Pruned:
    """A model of the same shapes with zeros in its weights. Errors as for `shohin.prune`."""
    if wish.pattern is None:
        raise PlanError("sparse weights need a pattern of zeros")
    clock = _Clock()
    with clock.step("plan"):
        patterns, dense = sparse.patterns_for(graph, wish.pattern)
        if not patterns:
            why = "; ".join(f"{n}: {why}" for n, why in list(dense.items())[:4]) or "the model has no weights"
            raise PlanError(f"no weight can be {wish.pattern}: {why}")
        if wish.pattern.zeros:
            patterns = sparse.allocated(graph, calls, patterns, wish.allocation or "uniform", seed=wish.seed)
        able = list(patterns)
        dense |= {n: "all of it stays by the allocation" for n, p in patterns.items() if not p.zeros}
        patterns = {n: p for n, p in patterns.items() if p.zeros}
    with clock.step("sparsify"), _answers_are_finite(graph, calls):
        update = recover is not None
        values = sparse.sparsify(graph, calls, patterns, criterion=wish.scored_by, update=update, data=data, seed=wish.seed)
    made = _copied(model)
    load_tensors(made, values)
    plan = Plan(graph.program.fingerprint, sparsity={name: str(pattern) for name, pattern in patterns.items()})
    notes: dict[str, Any] = {"left": _density(made, able), "criterion": wish.scored_by, "dense": dense}
    if recover == "distill" and patterns:
        with clock.step("distill"), sparse.masked(made, plan):
            notes["training"] = _distilled(made, model, data, wish)
    return Pruned(plan, made, {**notes, "seconds": clock.seconds})


def _copied(model: nn.Module) -> nn.Module:
    """A copy. Raises ModelError for a model that cannot be copied."""
    try:
        return deepcopy(model)
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be copied ({str(error).splitlines()[0]}); after torch.nn.utils.prune call prune.remove(module, name) first"
        ) from error


def _density(model: nn.Module, names: Collection[str]) -> float:
    """Share of the elements of these weights that is not zero."""
    weights = [p for n, p in model.named_parameters(remove_duplicate=False) if n in names]
    return sum(int(w.count_nonzero()) for w in weights) / max(sum(w.numel() for w in weights), 1)


class _Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Inside, the time counts for this step."""
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 3)


def _distilled(student: nn.Module, teacher: nn.Module, data: Data, wish: Wish) -> dict[str, Any]:
    config = TrainConfig(epochs=wish.epochs, lr=2e-3, seed=wish.seed)
    return distill(student, teacher, data, config=config, alpha=LABELS if data.has_labels else 0.0).to_json()
