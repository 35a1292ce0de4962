"""What a rewriting works with: the graph, what is gone, the new nodes, and how an argument is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx

from shohin.graph import Graph, kept_indices
from shohin.graph.labels.core import Array, Labels
from shohin.program.nodes import argument, arguments, flatten
from shohin.surgery.rewritten import CannotRewrite, Change


@dataclass
class Work:
    """State of one rewriting.

    Args:
        gone: boolean over labels.
        new: original node -> its copy.
        parts: constant node -> what stays of it, for readers that are not constants themselves.
        scaled: see `Rewritten`.
    """

    graph: Graph
    gone: np.ndarray
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    parts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    scaled: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
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
            new[i] = _scaled(work, size, wanted[i], before[i])
    set_argument(work, node, copy, place, new)


def _scaled(work: Work, size: Any, wanted: int, before: int) -> fx.Node:
    """A symbolic size times a constant, with the constant changed."""
    if isinstance(size, fx.Node) and getattr(size.target, "__name__", "") == "mul":
        for i, constant in enumerate(size.args):
            if isinstance(constant, int) and constant * wanted % before == 0:
                copy = work.new[size]
                with copy.graph.inserting_after(copy):
                    args = list(copy.args)
                    args[i] = constant * wanted // before
                    scaled = copy.graph.create_node("call_function", copy.target, tuple(args), {})
                work.changes.append(Change(size.name, i, constant, constant * wanted // before))
                return scaled
    raise CannotRewrite(f"a computed size would have to become {wanted} instead of {before}")


def axis_of(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    value: Any = argument(node, position, node.kwargs.get("dim", default))
    return int(value) % rank
