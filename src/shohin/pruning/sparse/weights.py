"""Which weights of a program can be sparse, and which cannot and why."""

from __future__ import annotations

from collections.abc import Mapping

from shohin.errors import PlanError, closest
from shohin.evidence.layers import LayerWeight, layer_weights
from shohin.graph import Graph
from shohin.pruning.sparse.patterns import Pattern


def misfit(weight: LayerWeight, pattern: Pattern) -> str:
    """Why the weight cannot have the pattern, or ""."""
    if weight.kind == "depthwise" and pattern.kind != "unstructured":
        return "a depthwise convolution can only be unstructured"
    if (weight.shape[0] // weight.groups) % pattern.height:
        return f"the {weight.shape[0] // weight.groups} outputs of a group are not divisible into blocks of {pattern.height}"
    return pattern.misfit(weight.shape)


def sparse_weights(graph: Graph) -> dict[str, LayerWeight]:
    """Name -> weight, for every weight that only linear layers and convolutions read, in the program's order."""
    return {w.name: w for w in layer_weights(graph.program)[0]}


def dense_weights(graph: Graph) -> dict[str, str]:
    """Name -> why it stays dense, for every other parameter with two dimensions or more."""
    return layer_weights(graph.program)[1]


def patterns_for(graph: Graph, pattern: Pattern | str) -> tuple[dict[str, Pattern], dict[str, str]]:
    """One pattern wherever it fits, and for each weight that stays dense the reason.

    An input axis that N:M does not divide, or a matrix that blocks do not, leaves the whole layer dense: a remainder that no
    runtime could use is not made.
    """
    pattern = Pattern.parse(pattern)
    chosen, left = {}, dense_weights(graph)
    for name, weight in sparse_weights(graph).items():
        why = misfit(weight, pattern)
        if why:
            left[name] = why
        else:
            chosen[name] = pattern
    return chosen, left


def chosen_weights(graph: Graph, patterns: Mapping[str, Pattern | str]) -> dict[str, tuple[LayerWeight, Pattern]]:
    """Weight and pattern of each name (any of a tied weight's names), in the program's order.

    Raises:
        PlanError: if a name is unknown or cannot be sparse, a pattern does not fit, or a tied weight is chosen twice, differently.
    """
    known = sparse_weights(graph)
    by_name = {alias: w for w in known.values() for alias in w.names}
    found: dict[str, tuple[LayerWeight, Pattern]] = {}
    for name, text in patterns.items():
        pattern = Pattern.parse(text)
        if name not in by_name:
            why = dense_weights(graph).get(name)
            raise PlanError(f"{name} cannot be sparse: {why}" if why else f"the model has no weight {name!r}{closest(name, by_name)}")
        weight = by_name[name]
        why = misfit(weight, pattern)
        if why:
            raise PlanError(f"{name} {weight.shape} cannot be {str(pattern)!r}: {why}; leave it dense or choose another pattern")
        if found.get(weight.name, (weight, pattern))[1] != pattern:
            raise PlanError(f"{name} is one tensor with {weight.name}, which has another pattern")
        found[weight.name] = (weight, pattern)
    return {name: found[name] for name in known if name in found}
