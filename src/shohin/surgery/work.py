"""What a rewriting works with: the graph, what is gone, the new nodes, and how an argument is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from shohin.graph import Graph, kept_indices
from shohin.graph.labels.core import Array, Labels
from shohin.program.nodes import argument, arguments, flatten
from shohin.surgery.rewritten import CannotRewrite, Change
from shohin.surgery.scales import Scaling


@dataclass
class Work:
    """State of one rewriting.

    Args:
        gone: boolean over labels.
        new: original node -> its copy.
        parts: constant node -> what stays of it, for readers that are not constants themselves.
        scalings: of attention whose default scale follows the head dim.
    """

    graph: Graph
    gone: np.ndarray
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    parts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    scalings: list[Scaling] = field(default_factory=list)
    _kept: dict[int, dict[int, Array]] = field(default_factory=dict)

    def kept(self, labels: Labels) -> dict[int, Array]:
        """Kept indices of the axes that shrink."""
        if not labels.planes:
            return {}
        key = id(labels)
        if key not in self._kept:
            found = kept_indices(labels.planes, self.gone)
            if found is None:
                raise CannotRewrite("what stays of a tensor is not rectangular, or empty")
            self._kept[key] = found
        return self._kept[key]

    def shape(self, labels: Labels) -> tuple[int, ...]:
        """The shape that stays."""
        kept = self.kept(labels)
        return tuple(len(kept[d]) if d in kept else n for d, n in enumerate(labels.shape))

    def of(self, node: Any) -> Labels | None:
        """Labels of a node with one tensor; of a model tensor those of its planes."""
        if not isinstance(node, fx.Node):
            return None
        name = self.graph.program.names.get(node.name)
        if name is not None:
            return Labels(self.graph.planes[name], tuple(node.meta["val"].shape)) if name in self.graph.planes else None
        value = self.graph.labels.get(node.name)
        return value if isinstance(value, Labels) else None

    def stays(self, node: fx.Node) -> dict[int, Array]:
        """Kept indices of the axes of a node's tensor that shrink."""
        labels = self.of(node)
        if labels is None:
            return {}
        return (kept_indices(labels.planes, self.gone) or {}) if node.name in self.graph.program.names else self.kept(labels)

    def reading(self, reader: fx.Node) -> Callable[[fx.Node], fx.Node]:
        """What a reader reads now, for each original node."""
        return lambda node: self.use(node, reader)

    def use(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """What a reader of an original node reads now."""
        if node in self.parts and reader.name not in self.graph.constants:
            return self.parts[node]
        return self.new[node]


def set_argument(work: Work, node: fx.Node, copy: fx.Node, place: int, value: Any) -> None:
    """Replaces one argument and logs which integers changed."""
    old = arguments(node)[place]
    start = len(flatten(arguments(node)[:place]))
    args = list(copy.args)
    args[place] = value
    copy.args = tuple(args)
    olds = list(old) if isinstance(old, (list, tuple)) else [old]
    news = list(value) if isinstance(value, (list, tuple)) else [value]
    for i, (a, b) in enumerate(zip(olds, news, strict=True)):
        if isinstance(a, int) and isinstance(b, int) and a != b:
            work.changes.append(Change(node.name, start + i, a, b))


def set_sizes(work: Work, node: fx.Node, copy: fx.Node, place: int, wanted: Sequence[int], before: Sequence[int]) -> None:
    """Rewrites a list of sizes so that it gives ``wanted`` where it gave ``before``."""
    sizes, new = list(arguments(node)[place]), list(arguments(copy)[place])
    for i, size in enumerate(sizes):
        if wanted[i] == before[i] or (isinstance(size, int) and size == -1):
            continue
        if isinstance(size, int):
            new[i] = wanted[i]
        else:
            new[i] = _scaled(work, node, size, wanted[i], before[i])
    set_argument(work, node, copy, place, new)


def _scaled(work: Work, node: fx.Node, size: Any, wanted: int, before: int) -> fx.Node:
    """A symbolic size times constants, with one of these changed: that of an axis that shrinks, if there is one."""
    shrunk = {len_before for n in node.all_input_nodes for len_before in _shrunk(work, n)}
    places = sorted(_constants(size), key=lambda place: place[2] not in shrunk)
    for factor, position, constant in places:
        if constant * wanted % before == 0:
            work.changes.append(Change(factor.name, position, constant, constant * wanted // before))
            return _rebuilt(work, size, factor, position, constant * wanted // before)
    raise CannotRewrite(f"a computed size would have to become {wanted} instead of {before}")


def _shrunk(work: Work, node: fx.Node) -> list[int]:
    labels = work.of(node)
    return [] if labels is None else [labels.shape[axis] for axis in work.stays(node)]


def _constants(size: Any) -> list[tuple[fx.Node, int, int]]:
    """(multiplication, position, constant) of every constant factor of a product."""
    if not isinstance(size, fx.Node) or getattr(size.target, "__name__", "") != "mul":
        return []
    found = [(size, i, value) for i, value in enumerate(size.args) if isinstance(value, int)]
    return [*found, *(place for value in arguments(size) for place in _constants(value))]


def _rebuilt(work: Work, size: fx.Node, factor: fx.Node, position: int, value: int) -> fx.Node:
    """The product again, with another constant in one of its multiplications."""
    args: list[Any] = [
        value
        if size is factor and i == position
        else _rebuilt(work, a, factor, position, value)
        if _holds(a, factor)
        else work.new.get(a, a)
        for i, a in enumerate(arguments(size))
    ]
    last = max((work.new[size], *(a for a in args if isinstance(a, fx.Node))), key=lambda n: n._sort_key)
    with last.graph.inserting_after(last):
        return last.graph.create_node("call_function", size.target, tuple(args), {})


def _holds(size: Any, factor: fx.Node) -> bool:
    return any(place[0] is factor for place in _constants(size))


def axis_of(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    value: Any = argument(node, position, node.kwargs.get("dim", default))
    return int(value) % rank
