"""Memory of a program: which tensors are views of which, and what a tensor holds after one of its views was changed in place.

Every change becomes a new value. A changed view is written back into what it looks at with pieces that move data and
nothing else (a slice becomes a concatenation of what lies before, the new value, and what lies behind), so that later rules
see plain movement; other views of the same memory are taken again from the new value when they are read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shohin.errors import ModelError
from shohin.program.nodes import argument, arguments, run
from shohin.program.refusals import is_user_file

aten = torch.ops.aten

#: views that keep the order of elements: undone by a reshape
_RESHAPING = frozenset(
    ["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel", "_unsafe_view"]
)
#: views that exchange axes: undone by a permutation
_PERMUTING = frozenset(["permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "matrix_H", "adjoint"])
#: results that may be the argument itself
_SAME = frozenset(["alias", "to", "contiguous", "view_as", "expand", "expand_as", "clone", "type_as", "positive", "identity"])


def name_of(node: fx.Node) -> str:
    """The operator's name without its namespace ("add_", "getitem")."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name.split("::")[-1] if schema else getattr(node.target, "__name__", node.target))


def where(node: fx.Node) -> str:
    """The user's line of a node: " (at file:12: text)", or ""."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s+(.*)', node.meta.get("stack_trace") or "")
    users = [f for f in frames if is_user_file(f[0])]
    return f" (at {users[-1][0]}:{users[-1][1]}: {users[-1][2].strip()})" if users else ""


def sizes_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's tensor: ints, and symbolic sizes."""
    return tuple(node.meta["val"].shape)


def fixed(size: Any) -> bool:
    """True if a size is a plain number that holds for every batch."""
    return isinstance(size, int)


class Memory:
    """Present values of the tensors of a graph while it is walked from the first operation to the last.

    Args:
        graph: is changed in place; its original nodes are the keys.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.again: dict[str, str] = {}  # node made again -> the node that it repeats
        self._value: dict[fx.Node, fx.Node] = {}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._given: dict[fx.Node, fx.Node] = {}  # view -> its argument as it was when the view was taken
        self._same: set[fx.Node] = set()  # results of in-place calls: the tensor itself under another name
        self._seen: dict[fx.Node, int] = {}
        self._version: dict[fx.Node, int] = {}
        self._broken: dict[fx.Node, str] = {}

    def base(self, node: fx.Node) -> fx.Node:
        """The tensor that owns the memory that ``node`` looks at."""
        while node in self._parent:
            node = self._parent[node]
        return node

    def is_alone(self, node: fx.Node) -> bool:
        """True if ``node`` looks at nothing and nothing looks at it."""
        while node in self._same:
            node = self._parent[node]
        names = {node} | {n for n in self._same if self.base(n) is node}
        return node not in self._parent and all(n in self._same for n, parent in self._parent.items() if parent in names)

    def add(self, node: fx.Node, present: Mapping[fx.Node, fx.Node]) -> None:
        """Takes up a node, before its arguments are replaced by their present values."""
        mine = _storage(node.meta.get("val"))
        parent = next((a for a in node.all_input_nodes if mine is not None and _storage(a.meta.get("val")) == mine), None)
        if parent is not None and (isinstance(parent.meta["val"], Tensor) or parent in self._parent):
            self._parent[node], self._given[node] = parent, present[parent]
        self._note(node, node)

    def add_same(self, node: fx.Node, target: fx.Node, value: fx.Node) -> None:
        """Takes up the result of an in-place call: another name of ``target``, which now holds ``value``."""
        self._parent[node] = target
        self._same.add(node)
        self._note(node, value)

    def _note(self, node: fx.Node, value: fx.Node) -> None:
        base = self.base(node)
        self._value[node], self._seen[node] = value, self._version.setdefault(base, 0)

    def now(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that holds the present contents of ``node``; made anew in front of ``before`` where a view is out of date.

        Raises:
            ModelError: where the present contents cannot be known.
        """
        base = self.base(node)
        if self._seen[node] == self._version[base]:
            return self._value[node]
        if base in self._broken:
            raise ModelError(self._broken[base])
        made = self.now(self._parent[node], before)
        if node not in self._same:
            fresh, given = made, self._given[node]
            with self.graph.inserting_before(before):
                made = self.graph.node_copy(node, lambda n: fresh if n is given else n)
            self.again[made.name] = node.name
        self._note(node, made)
        return made

    def rename(self, node: fx.Node, value: fx.Node) -> None:
        """Says that a tensor that shares no memory has another shape from now on."""
        self._note(node, value)

    def change(self, node: fx.Node, value: fx.Node, by: fx.Node) -> None:
        """Says that ``node`` now holds ``value``; whatever it looks at is changed with it."""
        base, chain = self.base(node), [node]
        while chain[-1] in self._parent:
            chain.append(self._parent[chain[-1]])
        tensors = [n for n in chain if isinstance(n.meta["val"], Tensor)]
        before = {} if base in self._broken else {n: self.now(n, by) for n in tensors}
        spot = Spot(self.graph, by.next, by)
        self._version[base] += 1
        self._note(node, value)
        for view, parent in itertools.pairwise(tensors):
            if base in self._broken:
                return
            viewing = view if self._parent[view] is parent else self._parent[view]  # a piece of a split
            try:
                value = value if view in self._same else write_back(spot, view, viewing, before[parent], value)
            except NotImplementedError:
                self._broken[base] = (
                    f"a tensor that shares memory with {base.name} is changed in place and read later{where(by)}; "
                    "use the operator without the underscore, or a copy"
                )
                return
            self._note(parent, value)


def _storage(value: Any) -> int | None:
    if isinstance(value, (tuple, list)):
        return next((_storage(v) for v in value), None)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) and torch._C._has_storage(value) else None


@dataclass(frozen=True)
class Spot:
    """Where new operations go: in front of ``before``, with the origin of ``by``."""

    graph: fx.Graph
    before: fx.Node
    by: fx.Node

    def emit(self, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        """A new operation, with the example value of its result: that of ``like``, if given."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args)
        node.meta.update({k: self.by.meta[k] for k in ("stack_trace", "nn_module_stack") if k in self.by.meta})
        node.meta["val"] = example_value(node) if like is None else like.meta["val"]
        return node


def example_value(node: fx.Node) -> Any:
    """The result of an operation on the example values of its arguments: no data is touched, no symbolic size is settled."""
    values: Any = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = next((n.meta["val"].fake_mode for n in node.all_input_nodes if hasattr(n.meta.get("val"), "fake_mode")), None)
    with torch.no_grad():
        if mode is None:
            return run(node, *values)
        with mode, mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext():
            return run(node, *values)


def write_back(spot: Spot, view: fx.Node, viewing: fx.Node, old: fx.Node, value: fx.Node) -> fx.Node:
    """What ``old`` holds after its view ``view`` (made by the operation ``viewing``) got ``value``.

    Raises:
        NotImplementedError: if the view cannot be undone.
    """
    name, rank = name_of(viewing), len(sizes_of(old))
    if (
        name in _SAME
        and list(map(str, sizes_of(view))) == list(map(str, sizes_of(old)))
        and view.meta["val"].dtype == old.meta["val"].dtype
    ):
        return value
    if name in _RESHAPING:
        return spot.emit(aten.reshape.default, value, reshaped(spot, old), like=old)
    if name in _PERMUTING:
        order = _order(viewing, rank)
        return spot.emit(aten.permute.default, value, [order.index(d) for d in range(rank)])
    if name in ("slice", "narrow"):
        return _into_slice(spot, viewing, old, value)
    if name == "select":
        axis, index = int(arguments(viewing)[1]) % rank, arguments(viewing)[2]
        if not fixed(index):
            raise NotImplementedError
        return _into_index(spot, old, value, axis, index)
    if name in ("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk"):
        return _into_piece(spot, view, viewing, old, value)
    if name == "diagonal":
        return spot.emit(aten.diagonal_scatter.default, old, value, *arguments(viewing)[1:], like=old)
    raise NotImplementedError


def reshaped(spot: Spot, like: fx.Node) -> list[Any]:
    """Sizes for a reshape into the shape of ``like``: -1 for the only symbolic one."""
    sizes = sizes_of(like)
    symbolic = [d for d, n in enumerate(sizes) if not fixed(n)]
    if len(symbolic) <= 1 and not (symbolic and 0 in sizes):
        return [n if fixed(n) else -1 for n in sizes]
    return [n if fixed(n) else spot.emit(aten.sym_size.int, like, d) for d, n in enumerate(sizes)]


def _order(viewing: fx.Node, rank: int) -> list[int]:
    """Axis d of the result is axis ``order[d]`` of the argument."""
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    moved: Any = viewing.target
    return [n - 2 for n in moved(probe, *arguments(viewing)[1:], **viewing.kwargs).shape]


def _into_slice(spot: Spot, viewing: fx.Node, old: fx.Node, value: fx.Node) -> fx.Node:
    axis, start, end, step = (argument(viewing, i, d) for i, d in ((1, 0), (2, None), (3, None), (4, 1)))
    axis %= len(sizes_of(old))
    if name_of(viewing) == "narrow":
        end = start + end if fixed(start) and fixed(end) else None
        if end is None:
            raise NotImplementedError
    size = sizes_of(old)[axis]
    if not fixed(size) or step != 1 or not all(b is None or fixed(b) for b in (start, end)):
        if start in (None, 0) and end in (None, 2**63 - 1) and step == 1:
            return value
        return spot.emit(aten.slice_scatter.default, old, value, axis, start, end, step, like=old)
    first, last, _ = slice(start, end).indices(size)
    return _between(spot, old, value, axis, first, max(first, last))


def _into_index(spot: Spot, old: fx.Node, value: fx.Node, axis: int, index: int) -> fx.Node:
    size = sizes_of(old)[axis]
    if not fixed(size):
        return spot.emit(aten.select_scatter.default, old, value, axis, index, like=old)
    return _between(spot, old, spot.emit(aten.unsqueeze.default, value, axis), axis, index % size, index % size + 1)


def _into_piece(spot: Spot, view: fx.Node, viewing: fx.Node, old: fx.Node, value: fx.Node) -> fx.Node:
    index, rank = int(arguments(view)[1]), len(sizes_of(old))
    pieces = viewing.meta["val"]
    if name_of(viewing) == "unbind":
        return _into_index(spot, old, value, int(argument(viewing, 1, viewing.kwargs.get("dim", 0))) % rank, index)
    axis = int(argument(viewing, 2, viewing.kwargs.get("dim", 0))) % rank
    bounds = [p.shape[axis] for p in pieces]
    if not all(map(fixed, bounds)) or not fixed(sizes_of(old)[axis]):
        raise NotImplementedError
    start = sum(bounds[:index])
    return _between(spot, old, value, axis, start, start + bounds[index])


def _between(spot: Spot, old: fx.Node, value: fx.Node, axis: int, first: int, last: int) -> fx.Node:
    """``old`` with ``value`` at [first, last) of an axis."""
    size = sizes_of(old)[axis]
    parts: list[fx.Node] = [value] if last > first else []
    if first > 0:
        parts.insert(0, spot.emit(aten.slice.Tensor, old, axis, 0, first))
    if last < size:
        parts.append(spot.emit(aten.slice.Tensor, old, axis, last, size))
    return parts[0] if len(parts) == 1 else spot.emit(aten.cat.default, parts, axis, like=old)


def spread(spot: Spot, value: fx.Node, like: fx.Node) -> fx.Node:
    """A value with the type and, by broadcasting, the shape of ``like``."""
    if value.meta["val"].dtype != like.meta["val"].dtype:
        value = spot.emit(aten.to.dtype, value, like.meta["val"].dtype)
    have, want = sizes_of(value), sizes_of(like)
    if len(have) > len(want):  # leading axes of one
        value = spot.emit(aten.reshape.default, value, reshaped(spot, like), like=like)
        have = sizes_of(value)
    if list(map(str, have)) == list(map(str, want)):
        return value
    return spot.emit(aten.expand.default, value, _expanded(spot, have, want, like), like=like)


def _expanded(spot: Spot, have: Sequence[Any], want: Sequence[Any], like: fx.Node) -> list[Any]:
    missing = len(want) - len(have)
    out: list[Any] = []
    for d, n in enumerate(want):
        if d >= missing and str(have[d - missing]) == str(n):
            out.append(-1 if not fixed(n) else n)
        else:
            out.append(n if fixed(n) else spot.emit(aten.sym_size.int, like, d))
    return out
