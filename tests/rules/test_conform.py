# mypy: ignore-errors
"""Every rule, on modules in which it runs on what is prunable: the groups that must be found, and cuts that are right."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from rule_examples import EXAMPLES, FROZEN

from shohin.extend import conform
from shohin.graph.labels.context import Parameter
from shohin.graph.labels.core import Labels
from shohin.graph.labels.rules import RULES
from shohin.program.nodes import flatten


class Watch:
    """Rules that note what they were called with, while the watch is open."""

    def __init__(self):
        self.calls = []

    def __enter__(self):
        self.rules = dict(RULES)
        RULES.update({name: functools.partial(self.call, name) for name in RULES})
        return self

    def __exit__(self, *_):
        RULES.clear()
        RULES.update(self.rules)

    def call(self, name, context, node, args):
        self.calls.append((name, context, [v for v in flatten(list(args)) if isinstance(v, (Labels, Parameter))]))
        return self.rules[name](context, node, args)

    def ran(self, graph):
        """The rules that were called with an argument of which a unit of the graph can go."""
        units = np.concatenate([unit for group in graph.groups for unit in group.units])
        return {
            name
            for name, context, values in self.calls
            if any(np.isin(context.classes.find(plane), units).any() for value in values for plane in value.planes)
        }


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rule(name):
    example = EXAMPLES[name]
    torch.manual_seed(0)
    with Watch() as watch:
        graph = conform(example.build(), example.inputs(), example.groups, plans=2)
    assert set(example.families) <= watch.ran(graph), [n.target for n in graph.program.graph.nodes]


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_mixes_units_is_frozen(name):
    """Only the layer before the one that is mixed can be cut, and that is right."""
    example = FROZEN[name]
    torch.manual_seed(0)
    conform(example.build(), example.inputs(), example.groups, plans=0)


def test_every_rule_has_an_example():
    tried = {family for example in EXAMPLES.values() for family in example.families}
    assert set(RULES) - tried == set(), "rules without an example"
    assert tried - set(RULES) == set(), "examples of families that have no rule"
