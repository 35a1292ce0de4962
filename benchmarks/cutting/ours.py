"""Shohin's methods."""

from __future__ import annotations

import time
from typing import Any

import shohin
from cutting.common import Found, Unreachable, Work
from shohin.errors import ShohinError


def _pruned(work: Work, **options: Any) -> tuple[shohin.Candidate, float]:
    began = time.process_time()
    try:
        found = shohin.prune(work.model, work.data, work.budget, seed=work.seed, **options)
    except (ShohinError, TypeError) as error:  # an option that is not there yet
        raise Unreachable(str(error)) from error
    return found, time.process_time() - began


def prune(work: Work, **options: Any) -> Found:
    """`shohin.prune` with its defaults and these options. Its seconds are of a run without recovery; what recovery adds is apart.

    Raises:
        Unreachable: if it refuses the budget or an option.
    """
    found, seconds = _pruned(work, of="macs", **options)
    bare = seconds if options.get("recover", "") is None else _pruned(work, of="macs", **{**options, "recover": None})[1]
    if found.model is None:
        raise Unreachable("no model was returned")
    return Found(found.model.eval(), bare, 0.0, max(seconds - bare, 0.0), notes={"form": found.notes.get("form", "")})


def distilled(work: Work) -> Found:
    """The same cut, trained with Shohin's own ``recover="distill"`` for the epochs of the short training."""
    start = prune(work)
    after, _ = _pruned(work, of="macs", recover="distill", epochs=work.original.short.epochs)
    return Found(start.model, start.score, start.cut, start.compensate, trained=after.model, notes=start.notes)


def sparse(work: Work, criterion: str, granularity: str) -> Found:
    """Zeros in the weights.

    Raises:
        Unreachable: if the criterion or granularity is not known.
    """
    found, seconds = _pruned(work, criterion=criterion, granularity=granularity)
    if found.model is None:
        raise Unreachable("no model was returned")
    return Found(found.model.eval(), seconds, 0.0)
