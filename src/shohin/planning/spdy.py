"""Coefficients that repair additive loss tables, found by scoring real views (SPDY, Frantar and Alistarh 2022).

Losses of single groups do not add up. Each group's loss is multiplied by a coefficient; every set of coefficients gives one
choice by the solver, which is scored by its real loss. Random sets first, then a local search around the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shohin.errors import DataError, PlanError
from shohin.planning.choice import Choice
from shohin.planning.options import GroupOptions


@dataclass(frozen=True)
class Corrected:
    """The best choice that was found.

    Args:
        choice: with the least real loss.
        loss: its real loss.
        coefficients: group -> factor of its loss table.
        evaluations: number of different choices that were scored.
        log: real loss of the best after each proposal.
    """

    choice: Choice
    loss: float
    coefficients: Mapping[str, float]
    evaluations: int
    log: tuple[float, ...]


def search_coefficients(
    options: Sequence[GroupOptions],
    plan: Callable[[Sequence[GroupOptions]], Choice | None],
    evaluate: Callable[[Choice], float],
    *,
    evaluations: int = 40,
    seed: int = 0,
    cache: MutableMapping[str, float] | None = None,
) -> Corrected:
    """Random search (half of the evaluations), then local search: 10 % of the coefficients are drawn anew.

    Args:
        options: with the additive losses; coefficients 1 are tried first, so the result is never worse than the tables' own.
        plan: solves for scaled options; None if nothing fits.
        evaluate: real loss of a choice (calibration loss of its view); the expensive part.
        evaluations: number of different choices to score, at least 1.
        seed: of the draws.
        cache: ``Choice.digest`` -> real loss. It is filled as the search goes on; a search with the same arguments and a
            filled cache takes the same path without evaluating anything twice, so a stopped search resumes exactly.

    Raises:
        PlanError: if no coefficients give a choice.
        DataError: if a real loss is NaN.
    """
    known: MutableMapping[str, float] = {} if cache is None else cache
    seen: set[str] = set()
    random = np.random.default_rng(seed)
    n = len(options)
    best: tuple[float, Choice, np.ndarray] | None = None
    log: list[float] = []
    # Different coefficients often give the same choice: proposals are bounded too.
    for step in range(10 * evaluations):
        if len(seen) >= evaluations:
            break
        if step == 0 or best is None:
            coefficients = np.ones(n) if step == 0 else random.uniform(0, 1, n)
        elif len(seen) < (evaluations + 1) // 2:
            coefficients = random.uniform(0, 1, n)
        else:
            fresh = random.permutation(n)[: max(1, round(n / 10))]
            coefficients = best[2].copy()
            coefficients[fresh] = random.uniform(0, 1, len(fresh))
        choice = plan([replace(g, loss=g.loss * c) for g, c in zip(options, coefficients, strict=True)])
        if choice is None:
            continue
        key = choice.digest
        seen.add(key)
        if key not in known:
            known[key] = float(evaluate(choice))
        if np.isnan(known[key]):
            raise DataError(f"the real loss of a planned view is NaN (choice {key}); look for NaN in the data or the weights")
        if best is None or known[key] < best[0]:
            best = (known[key], choice, coefficients)
        log.append(best[0])
    if best is None:
        raise PlanError("no choice fits the budget for any coefficients; relax the budget")
    names = [g.name for g in options]
    return Corrected(best[1], best[0], dict(zip(names, map(float, best[2]), strict=True)), len(seen), tuple(log))
