"""The integers of a user's class that a plan changes: each constant of the program is solved for the attribute it came from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from shohin.program import Place, Program, Source
from shohin.program.nodes import flatten
from shohin.surgery.rewritten import Rewritten

Constraint = tuple[Source, int, tuple[str, int]]


def wanted(program: Program, rewritten: Rewritten, outside: frozenset[str] = frozenset()) -> list[dict[Place, int]] | str:
    """Place -> new value, in the order in which these should be tried, or why there is none: a source asked for two values.

    A constant without a source may follow by itself (it was read off a shape): the proof decides. Every position that a
    source reaches is a constraint, also those that do not change. In a product with plain integers these may follow by
    themselves too (``shape[1] * self.repeats``), so that such a product is not always a constraint. A configuration object
    that several modules hold may give each of them another value: then every module that reads it gets a place, and a copy
    of the object, of its own.

    Args:
        outside: names of operations that the user's class will not run (their module is replaced).
    """
    constraints = list(_constraints(program, rewritten, outside))
    pure = [c for c in constraints if c[0].multiply == c[0].divide == 1]
    found: list[dict[Place, int]] = []
    reason = ""
    for known in (constraints, pure):
        for tried in (known, [(_own(program, key, source), value, key) for source, value, key in known]):
            solved = _solve(program, rewritten, tried)
            if isinstance(solved, str):
                reason = reason or solved
            elif solved not in found:
                found.append(solved)
                break
    return found or reason


def _constraints(program: Program, rewritten: Rewritten, outside: frozenset[str]) -> Iterator[Constraint]:
    changes = {(c.node, c.position): c.new for c in rewritten.changes}
    nodes = {n.name: n for n in program.graph.nodes}
    left = {n.name for n in rewritten.graph.nodes} - outside
    for key, source in program.sources.items():
        if key[0] not in left or key[0] not in nodes:
            continue
        value = changes.get(key)
        if value is None:
            arguments = flatten(nodes[key[0]].args)
            value = arguments[key[1]] if key[1] < len(arguments) else None
        if isinstance(value, int):
            yield source, value, key


def _solve(program: Program, rewritten: Rewritten, constraints: list[Constraint]) -> dict[Place, int] | str:
    """Sources with one factor first, then products with one unknown factor; sources without plain integers before others."""
    changed = {(c.node, c.position) for c in rewritten.changes}
    known: dict[Place, int] = {}
    for source, value, key in sorted(constraints, key=lambda c: (len(c[0].factors), c[0].multiply != 1 or c[0].divide != 1)):
        solved = source.solve(value, known)
        if isinstance(solved, tuple):
            known[solved[0]] = solved[1]
        elif solved or source.multiply != 1 or source.divide != 1:
            continue
        elif key in changed or all(place in known for place, _ in source.factors):
            return f"{source} is asked for two values or a fraction (at {where(program, key[0])})"
    current = {place: value for source, _, _ in constraints for place, value in source.factors}
    return {place: value for place, value in known.items() if value != current[place]}


#: between the module that reads an object and the place of the object: such a place is not shared with other modules
READER = "@"


def _own(program: Program, key: tuple[str, int], source: Source) -> Source:
    """The source with the places inside held objects told apart by the module that reads them."""
    if key[0] not in program.origins:
        return source
    reader = program.origins[key[0]].module
    return replace(
        source,
        factors=tuple(
            (replace(place, module=f"{reader}{READER}{place.module}") if "." in place.attribute else place, value)
            for place, value in source.factors
        ),
    )


def assign(model: nn.Module, values: dict[Place, int]) -> str:
    """Writes the values into the model; returns why it could not, or "".

    A place that is told apart by its reader gets a shallow copy of the object that holds it, in that module only.
    """
    objects = {place: _held(model, place) for place in values}  # before anything is copied
    private: dict[tuple[str, int], Any] = {}
    for place, value in values.items():
        reader, apart, _ = place.module.partition(READER)
        leaf = place.attribute.rpartition(".")[2]
        owner: Any = objects[place]
        if apart:
            module = model.get_submodule(reader)
            name = next((key for key, held in vars(module).items() if held is owner), None)
            if (reader, id(owner)) not in private:
                if name is None:
                    return f"{place.attribute} is read by {reader or 'the model'}, which does not hold the object itself"
                private[reader, id(owner)] = copy.copy(owner)
                setattr(module, name, private[reader, id(owner)])
            owner = private[reader, id(owner)]
        if place.index is None:
            setattr(owner, leaf, value)
        else:
            old = getattr(owner, leaf)
            new = list(old)
            new[place.index] = value
            setattr(owner, leaf, type(old)(new))
    return ""


def _held(model: nn.Module, place: Place) -> Any:
    """The module or object whose attribute the place is."""
    owner: Any = model.get_submodule(place.module.rpartition(READER)[2])
    for part in place.attribute.split(".")[:-1]:
        owner = getattr(owner, part)
    return owner


def where(program: Program, node: str) -> str:
    """Address and source line of an operation."""
    origin = program.origins.get(node)
    return f"{origin.address}: {origin.line}" if origin else node
