"""Hugging Face models: cuts that a configuration can express, so that ``save_pretrained`` and ``from_pretrained`` work.

A configuration gives all layers one width. `uniform` makes plans that respect this, `write_config` writes a cut model's
widths into its configuration and proves that a model built from it computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from shohin.errors import PlanError
from shohin.graph import Graph, UnitGroup
from shohin.integrations import configs
from shohin.plan import Plan
from shohin.program import Place
from shohin.program.provenance import Tagged
from shohin.surgery import CannotRewrite, Cut, Rewritten, prove, rewrite
from shohin.surgery.classes.sources import wanted


def uniform(graph: Graph, model: Any, keep: float, *, of: str | None = None, scores: Mapping[str, Sequence[float]] | None = None) -> Plan:
    """A plan that the model's configuration can express: one share of the units of every kind, in all layers.

    The share is a fraction of the numbers of heads, so that widths that are computed from each other stay what the
    configuration computes. Head dims stay. Where the configuration ties more than can be cut, only what it holds apart is
    cut (the hidden units of feed-forward layers, for instance).

    Args:
        model: a ``PreTrainedModel`` that ``graph`` was made from.
        keep: share in (0, 1].
        of: what ``keep`` is a share of: None (units: the nearest share is taken, at least one unit), "macs" or "params"
            (the largest plan within it).
        scores: group name -> importance of each unit; the best stay. The first ones by default.

    Raises:
        PlanError: if there is no such plan; it names what the configuration cannot express.
    """
    if not 0 < keep <= 1:
        raise PlanError(f"keep must be a share in (0, 1]; got {keep}")
    if of not in (None, "macs", "params"):
        raise PlanError(f"of must be None, 'macs' or 'params'; got {of!r}")
    traced = configs.traced(model)
    dims = _dims(graph)
    reasons: list[str] = []

    def found(groups: Sequence[UnitGroup]) -> Plan | None:
        for share in _shares(groups, keep, of is None):
            plan = _plan(graph, groups, share, scores or {})
            if (share == 1 and keep < 1) or (of is not None and _cost(graph, plan, of) > keep * _cost(graph, None, of)):
                continue
            reason = _expressed(model, traced, graph, plan)
            if not reason:
                return plan
            reasons.append(reason)
        return None

    heads_and_all = [g for g in graph.groups if g.name not in dims]
    inner = [g for g in heads_and_all if not g.normalized]
    for groups in (heads_and_all, inner, [g for g in inner if not _overlaps(g, graph.groups)]):
        plan = found(groups)
        if plan is not None:
            return plan
    kinds: dict[str, list[UnitGroup]] = {}
    for group in heads_and_all:
        kinds.setdefault(re.sub(r"\d+", "*", group.name), []).append(group)
    apart = [g for groups in kinds.values() if not _expressed(model, traced, graph, _halves(graph, groups)) for g in groups]
    plan = found(apart)
    if plan is not None:
        return plan
    why = reasons[0] if reasons else "no group can be cut so far"
    raise PlanError(f"keep={keep} cannot be expressed by {type(model.config).__name__}: {why}")


def _halves(graph: Graph, groups: Sequence[UnitGroup]) -> Plan:
    return _plan(graph, groups, Fraction(1, 2) if all(g.size % 2 == 0 for g in groups) else Fraction(1), {})


def _expressed(model: Any, traced: nn.Module, graph: Graph, plan: Plan) -> str:
    """Why the configuration cannot express a plan; "" if it can."""
    try:
        result = _config(model, traced, graph, rewrite(graph, plan))
    except CannotRewrite as error:
        return str(error)
    return result if isinstance(result, str) else ""


def write_config(made: Cut, model: Any, graph: Graph) -> None:
    """Writes the widths of a cut into the configuration of the cut model, and proves it.

    Args:
        made: the cut of ``model``; its model's configuration (a copy of the original's) is changed.

    Raises:
        PlanError: if the configuration cannot express the cut, with the layers; or if a model built from the configuration
            does not compute the same.
    """
    if made.form != "module":
        raise PlanError(f"a configuration describes the model's own class, but the cut is a program: {made.reason}")
    if made.parts:
        raise PlanError(f"a configuration cannot describe {', '.join(made.parts[:3])}, which run as programs: {made.reason}")
    found = _config(model, configs.traced(model), graph, made.rewritten)
    if isinstance(found, str):
        raise PlanError(f"{type(model.config).__name__} cannot express the cut: {found}")
    config = configs.changed(model.config, found)
    with torch.random.fork_rng(devices=[]):
        again = type(model)(config).to(next(made.model.parameters()).dtype)
    again.load_state_dict(made.model.state_dict())
    proof = prove(graph.program, again, made.model)
    if not proof.holds:
        raise PlanError(f"a model built from the new configuration does not equal the cut: {proof.where}, relative error {proof.error:.1e}")
    for one in {id(c): c for m in made.model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        source = next((m.config for m in again.modules() if type(getattr(m, "config", None)) is type(one)), None)
        for place, value in found.items():
            if source is not None and _has(one, place):
                configs.write(one, {place: value})


def _has(config: Any, place: Place) -> bool:
    for part in place.attribute.split(".")[:-1]:
        config = getattr(config, part, None)
    return config is not None


def _config(model: Any, traced: nn.Module, graph: Graph, rewritten: Rewritten) -> dict[Place, int] | str:
    """The configuration's new values, or what it cannot express."""
    wish = _cut_shapes(model, rewritten)
    solutions = wanted(graph.program, rewritten)
    changes = solutions[0] if not isinstance(solutions, str) else {}
    required = {place: changes.get(place, value) for s in graph.program.sources.values() for place, value in s.factors}
    found = configs.solve(traced, wish, required)
    found |= {Place("", p.attribute.removeprefix("config."), p.index): v for p, v in changes.items() if p.attribute.startswith("config.")}
    attempts, reason = [found], ""
    for values in attempts:
        try:
            built = configs.build(model, configs.changed(model.config, values))
        except Exception as error:  # a configuration may refuse its values in any way
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        given = configs.shapes(built)
        differing = sorted(configs.differing(wish, given))
        wrong = [p for p, value in required.items() if isinstance(held := configs.held(built, p), int) and held != value]
        scales = _other_scales(model, built)
        if not differing and not wrong and not scales:
            return values
        if values is found:
            attempts += _more(traced, found, differing, wrong, required, _ratios(model, wish))
            shown = [f"{n} {wish.get(n)} instead of {given.get(n)}" for n in differing] + [f"{p} {required[p]}" for p in wrong] + scales
            reason = f"{len(shown)} sizes are none that a configuration gives: {', '.join(shown[:4])}"
    return reason


def _other_scales(model: nn.Module, built: nn.Module) -> list[str]:
    """Numbers that modules derived from their sizes when they were built (scales of scores), and that would change."""
    found = []
    others = dict(built.named_modules())
    for path, module in model.named_modules():
        other = vars(others[path]) if path in others else {}
        for key, value in vars(module).items():
            if isinstance(value, float) and isinstance(other.get(key), float) and abs(value - other[key]) > 1e-12 * abs(value):
                found.append(f"{path}.{key} {value:.6g} instead of {other[key]:.6g}")
    return found


def _more(
    traced: nn.Module,
    found: dict[Place, int],
    differing: list[str],
    wrong: list[Place],
    required: Mapping[Place, int],
    ratios: set[Fraction],
) -> list[dict[Place, int]]:
    """Other values to try: an explicit head dim, and counts that the modules with wrong sizes hold, changed as sizes changed.

    Each is only a proposal: shapes, integers and outputs of what is built from it decide.
    """
    dims = {value for place, value in required.items() if place.attribute == "head_dim"}
    explicit = [{**found, Place("", "head_dim"): dim} for dim in dims] if len(dims) == 1 else []
    paths = {p.module for p in wrong} | {n.rpartition(".")[0].rpartition(".")[0] for n in differing}
    places: dict[Place, int] = {}
    for path in sorted(paths):
        for value in vars(traced.get_submodule(path)).values():
            if isinstance(value, Tagged) and len(value.source.factors) == 1:
                places.update(value.source.factors)
    scaled = [{**found, p: int(v * r)} for p, v in places.items() if p not in found for r in sorted(ratios) if (v * r).denominator == 1]
    return [*explicit, *scaled, *({**e, **s} for e in explicit for s in scaled)][:24]


def _ratios(model: nn.Module, wish: configs.Shapes) -> set[Fraction]:
    old = configs.shapes(model)
    return {Fraction(a, b) for name, shape in wish.items() for a, b in zip(shape, old[name], strict=True) if a != b}


def _cut_shapes(model: nn.Module, rewritten: Rewritten) -> configs.Shapes:
    found = configs.shapes(model)
    for name, axes in rewritten.kept.items():
        if name in found:
            found[name] = tuple(len(axes[d]) if d in axes else n for d, n in enumerate(found[name]))
    return found


def _dims(graph: Graph) -> set[str]:
    """Groups of head dims: their rows are not neighbours, and they share an axis with heads or have rows in many heads everywhere."""
    apart = [g for g in graph.groups if not _adjacent(g)]
    strided = {g.name for g in apart if all(i.shape[1] > 1 for axes in g.slices.values() for i in axes.values())}
    return strided | {g.name for g in apart if _overlaps(g, graph.groups)}


def _overlaps(group: UnitGroup, groups: Sequence[UnitGroup]) -> bool:
    """True if another group chooses among the same indices of an axis."""
    for name, axes in group.slices.items():
        for axis, indices in axes.items():
            mine = set(indices.reshape(-1).tolist())
            for other in groups:
                if other is not group and axis in other.slices.get(name, {}) and mine & set(other.slices[name][axis].reshape(-1).tolist()):
                    return True
    return False


def _adjacent(group: UnitGroup) -> bool:
    several = [i for axes in group.slices.values() for i in axes.values() if i.shape[1] > 1]
    return bool(several) and all((i[:, 1] - i[:, 0] == 1).all() for i in several)


def _shares(groups: Sequence[UnitGroup], keep: float, nearest: bool) -> list[Fraction]:
    """Shares that leave every group a whole number of units, in the order in which they should be tried."""
    if not groups:
        return []
    sizes = {g.size for g in groups}
    found = sorted({Fraction(k, n) for n in sizes for k in range(1, n + 1)})
    whole = [s for s in found if all((s * n).denominator == 1 for n in sizes)] or [Fraction(1)]
    return sorted(whole, key=lambda s: abs(s - keep)) if nearest else sorted(whole, reverse=True)


def _plan(graph: Graph, groups: Sequence[UnitGroup], share: Fraction, scores: Mapping[str, Sequence[float]]) -> Plan:
    widths = {}
    for group in groups:
        count = int(share * group.size)
        if count < group.size:
            worth = np.asarray(scores.get(group.name, np.zeros(group.size)), np.float64)
            widths[group.name] = tuple(sorted(np.argsort(-worth, kind="stable")[:count].tolist()))
    return Plan(graph.program.fingerprint, widths)


def _cost(graph: Graph, plan: Plan | None, of: str) -> float:
    if of == "macs":
        return graph.macs(plan)
    own = {id(t): n for n, t in graph.program.tensors.items() if n in graph.program.trainable}
    kept = rewrite(graph, plan).kept if plan is not None else {}
    total = 0.0
    for name in own.values():
        size = graph.program.tensors[name].numel()
        for axis, indices in kept.get(name, {}).items():
            size = size // graph.program.tensors[name].shape[axis] * len(indices)
        total += size
    return total
