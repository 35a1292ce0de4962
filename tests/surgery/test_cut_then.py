"""The class that a cut returns, understood again, has groups of the same names with the units in the order that the plan left."""

from __future__ import annotations

import random

import pytest

from shohin.plan import Plan
from shohin.surgery import cut, understand, view
from surgery_cases import CASES
from surgery_checks import answers, close, random_plan, understood

#: for these the user's own forward does not hold every plan; `test_cut_shares` has their like
MODULES = [name for name, case in CASES.items() if case.form == "module"]


@pytest.mark.parametrize("name", MODULES)
def test_then_composes_with_the_cut_class(name: str) -> None:
    model, graph = understood(name)
    first = random_plan(CASES[name], graph, 5)
    made = cut(model, graph, first)
    assert made.form == "module" and not made.parts, made.reason
    call = CASES[name].call(2, 0)
    narrow = understand(made.model, call)
    everything = first.then(Plan(narrow.program.fingerprint, {g: tuple(range(n)) for g, n in narrow.sizes.items()}))
    assert first.widths.items() <= everything.widths.items() and everything.widths.keys() <= graph.sizes.keys()
    r = random.Random(name)
    second = Plan(narrow.program.fingerprint, {g: tuple(sorted(r.sample(range(n), (n + 1) // 2))) for g, n in narrow.sizes.items()})
    both = first.then(second)
    close(answers(view(graph, both), call), answers(cut(made.model, narrow, second).model, call), (first, second))
    close(answers(cut(model, graph, both).model, call), answers(view(graph, both), call), both)
