"""Shohin on one model: understood, cut to half width, compared with the zeroed original."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from shohin.data import Call
from shohin.graph import understand_program
from shohin.plan import Plan
from shohin.program import capture
from shohin.surgery import Cut, confirm, cut
from shohin.surgery.oracle import oracle, unspoken
from sweep.check import half_plan
from sweep.entry import Entry
from sweep.numbers import TOLERANCE, Exact, against, casts, doubled, embedding_tables
from understanding.models import build, runs, short, sizes


def timed(model: nn.Module, entry: Entry) -> dict[str, Any]:
    """Seconds of one pass: export, understand (capture without export, labels, closure, confirmation), cut with proof."""
    seconds: dict[str, Any] = {}
    example = Call(*entry.arguments(2, 0), None, None)
    started = time.process_time()
    with _timing_export(seconds):
        program = capture(model, example)
    captured = time.process_time()
    graph = confirm(understand_program(program))
    understood = time.process_time()
    cut(model, graph, half_plan(graph))
    seconds.update(
        captured=captured - started,
        labels=understood - captured,
        understand=understood - started,
        cut=time.process_time() - understood,
    )
    return seconds


def steps(model: nn.Module, entry: Entry) -> Callable[[Callable[[str], None]], None]:
    """The same for measuring memory."""

    def go(note: Callable[[str], None]) -> None:
        graph = confirm(understand_program(capture(model, Call(*entry.arguments(2, 0), None, None))))
        note("understand")
        cut(model, graph, half_plan(graph))
        note("all")

    return go


def judged(entry: Entry) -> dict[str, Any]:
    """Form, proof, parameters left, and whether the cut equals the oracle, outputs and gradients, in float64."""
    try:
        return _judged(entry)
    except Exception as error:
        return {"verdict": "raised", "detail": short(error)}


def _judged(entry: Entry) -> dict[str, Any]:
    model = build(entry).double()
    whole, _ = sizes(model)
    tables = embedding_tables(model)
    example = Call(*doubled(entry.arguments(2, 0)), None, None)
    program = capture(model, example)
    with Exact() if casts(program) else nullcontext():
        graph = confirm(understand_program(capture(model, example) if casts(program) else program))
        plan = half_plan(graph)
        made = cut(model, graph, plan)
        left = sizes(made.model, tables)[0]
        found: dict[str, Any] = {
            "form": made.form,
            "parts": list(made.parts),
            "reason": made.reason,
            "proof": made.proof.error,
            "groups": len(graph.groups),
            "ratio": round(left / max(whole, 1), 4),
        }
        broken = runs(made.model, entry, double=True)
        if broken or not made.proof.holds:
            return {**found, "verdict": "does not run" if broken else "wrong", "detail": broken or made.proof.where}
        silent = unspoken(model, graph)
        if silent:  # the oracle does not speak for these groups: they stay whole in what is compared
            plan = Plan(plan.fingerprint, {k: v for k, v in plan.widths.items() if k not in silent})
            made = cut(model, graph, plan)
        error, where = _error(entry, made, oracle(model, graph, plan))
    found.update(error=error, groups_outside_oracle=len(silent))
    right = "nothing pruned" if left == whole else "right"
    return {**found, "verdict": right if error <= TOLERANCE else "wrong", "detail": "" if error <= TOLERANCE else f"{where}, {error:.1e}"}


def _error(entry: Entry, made: Cut, zeroed: nn.Module) -> tuple[float, str]:
    """The largest relative difference of outputs and gradients."""
    found = against(zeroed, made.model, made.rewritten, doubled(entry.arguments(2, 9)))
    return max(found, key=lambda f: f[0] if f[0] == f[0] else float("inf"))


class _timing_export:
    """The time of torch.export itself, in ``seconds["export"]``."""

    def __init__(self, seconds: dict[str, Any]) -> None:
        self.seconds, self.original = seconds, torch.export.export

    def __enter__(self) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return self.original(*args, **kwargs)
            finally:
                self.seconds["export"] = self.seconds.get("export", 0.0) + time.process_time() - started

        torch.export.export = call

    def __exit__(self, *_: Any) -> None:
        torch.export.export = self.original
