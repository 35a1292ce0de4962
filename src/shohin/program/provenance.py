"""Provenance: which attribute of which module an integer came from.

During the one export every int that a module (or its private copy of a configuration object) holds is a `Tagged` int; a
function mode notes which argument of which call it reaches, through products and quotients. Two attributes with equal
values are never confused, because values are not compared to find a source.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shohin.program.nodes import arguments, flatten


@dataclass(frozen=True)
class Place:
    """An integer that a module or its configuration holds.

    Args:
        module: path of the module, "" for the model itself.
        attribute: dotted path from the module (``num_heads``, ``config.hidden_size``).
        index: position in a tuple or list attribute, or None.
    """

    module: str
    attribute: str
    index: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.attribute}" if self.module else self.attribute
        return path + (f"[{self.index}]" if self.index is not None else "")


@dataclass(frozen=True)
class Source:
    """An integer's origin as a product: ``multiply * product of places // divide`` (the division leaves no rest).

    Args:
        factors: (place, its value at capture), one for each factor.
    """

    factors: tuple[tuple[Place, int], ...]
    multiply: int = 1
    divide: int = 1

    def __str__(self) -> str:
        return " * ".join(str(place) for place, _ in self.factors)

    def solve(self, wanted: int, known: Mapping[Place, int]) -> tuple[Place, int] | bool:
        """What the only unknown factor must be for the integer to be ``wanted``.

        Returns:
            (place, value); True if all factors are known and agree; False if there is no solution or more than one unknown.
        """
        unknown = [place for place, _ in self.factors if place not in known]
        product = self.multiply * math.prod(known[place] for place, _ in self.factors if place in known)
        if not unknown:
            return product == wanted * self.divide
        if len(unknown) > 1 or not product or wanted * self.divide % product:
            return False
        return unknown[0], wanted * self.divide // product


class Tagged(int):
    """An int that remembers its `Source`."""

    source: Source

    def __new__(cls, value: int, source: Source) -> Tagged:
        tagged = super().__new__(cls, value)
        tagged.source = source
        return tagged

    def __deepcopy__(self, memo: dict[int, Any]) -> Tagged:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __mul__(self, other: Any) -> Any:
        product = int(self) * (int(other) if isinstance(other, int) else other)
        if isinstance(other, bool) or not isinstance(other, int) or other <= 0:
            return product
        s = self.source
        if isinstance(other, Tagged):
            o = other.source
            return Tagged(product, Source(s.factors + o.factors, s.multiply * o.multiply, s.divide * o.divide))
        return Tagged(product, Source(s.factors, s.multiply * other, s.divide))

    def __rmul__(self, other: Any) -> Any:
        return self.__mul__(other)

    def __floordiv__(self, other: Any) -> Any:
        if type(other) is int and other > 0 and int(self) % other == 0:
            return Tagged(int(self) // other, Source(self.source.factors, self.source.multiply, self.source.divide * other))
        return int(self) // other

    __hash__ = int.__hash__


def _plain(function: Any, *, reflected: bool = False) -> Any:
    """An operator that forgets the source. Symbolic sizes know plain ints only, so none may be left to `int` itself."""

    def method(self: Tagged, other: Any) -> Any:
        mine, theirs = int(self), int(other) if type(other) is Tagged else other
        return function(theirs, mine) if reflected else function(mine, theirs)

    return method


for _name in ("add", "sub", "mod", "truediv", "pow", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tagged, f"__{_name}__", _plain(getattr(operator, _name)))
for _name in ("add", "sub", "mod", "truediv", "pow", "floordiv"):
    setattr(Tagged, f"__r{_name}__", _plain(getattr(operator, _name), reflected=True))


def tag(model: nn.Module) -> None:
    """Replaces the ints that the modules of ``model`` hold by tagged ones, in place (the model must be a private copy)."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        _tag_object(vars(module), path, "", seen, 2)


def _tag_object(attributes: dict[str, Any], path: str, prefix: str, seen: set[int], depth: int) -> None:
    for key, value in list(attributes.items()):
        if key.startswith("_") and not prefix:
            continue
        name = prefix + key
        if type(value) is int:
            attributes[key] = Tagged(value, Source(((Place(path, name), value),)))
        elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
            attributes[key] = type(value)(Tagged(v, Source(((Place(path, name, i), v),))) for i, v in enumerate(value))
        elif (
            depth
            and hasattr(value, "__dict__")
            and not isinstance(value, (Tensor, nn.Module, type, torch.Generator))
            and not callable(value)
            and type(value).__module__.split(".")[0] not in ("torch", "builtins", "numpy")
            and id(value) not in seen
        ):
            seen.add(id(value))
            _tag_object(vars(value), path, name + ".", seen, depth - 1)


class Recorder(TorchFunctionMode):
    """Notes which nodes each torch call creates while a graph is traced, and the tagged ints among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[tuple[str, str]], list[Any], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _holds_tagged(args) and not (kwargs and _holds_tagged(kwargs.values())):  # nearly every call
            return func(*args, **kwargs)
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        if str(getattr(func, "__name__", "")).startswith("sym_"):  # arithmetic on symbolic sizes, which know plain ints only
            return func(*(int(a) if type(a) is Tagged else a for a in args), **kwargs)
        mode = get_proxy_mode()
        if mode is None:
            return func(*args, **kwargs)
        flat = flatten(args)
        nodes = mode.tracer.graph.nodes
        before = len(nodes)
        result = func(*args, **kwargs)
        created: list[tuple[str, str]] = []
        for node in reversed(nodes):
            if len(created) >= len(nodes) - before:
                break
            created.append((node.name, str(node.target)))
        self.calls.append((created, flat, kwargs))
        return result


def _holds_tagged(values: Iterable[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is Tagged or ((kind is tuple or kind is list) and _holds_tagged(value)):
            return True
    return False


def locate(calls: list[Any], nodes: Mapping[str, torch.fx.Node]) -> dict[tuple[str, int], Source]:
    """(node name, flattened argument position) -> source, for every tagged int that reached an operation in place.

    Arguments are aligned by position and, for keywords, by the operator's schema. A call that creates several operations
    is aligned with each of them that has as many leading arguments.

    Args:
        nodes: name while tracing -> node; results have the node's own name.
    """
    found: dict[tuple[str, int], Source] = {}
    for created, flat, kwargs in calls:
        for name, target in created:
            node = nodes.get(name)
            if node is None or node.op != "call_function" or str(node.target) != target or not hasattr(node.target, "_schema"):
                continue
            arguments = flatten(node.args)
            for position, value in enumerate(flat[: len(arguments)]):
                if type(value) is Tagged and type(arguments[position]) in (int, Tagged) and int(arguments[position]) == int(value):
                    found[node.name, position] = value.source
            for position, key in _positions(node, kwargs):
                if type(kwargs[key]) is Tagged and position < len(arguments):
                    found[node.name, position] = kwargs[key].source
    return found


def _positions(node: torch.fx.Node, kwargs: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Flattened positions of keyword arguments in the node's positional arguments."""
    position = 0
    target: Any = node.target
    for argument, value in zip(target._schema.arguments, arguments(node), strict=False):
        if argument.name in kwargs:
            yield position, argument.name
        position += len(flatten(value))
