"""The rows of the page: operations in program order, the axes of their tensors with the groups that own them, and what is frozen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx

from shohin.graph.describe import shape_text
from shohin.graph.labels.core import Labels
from shohin.graph.operators import Extents
from shohin.graph.sizes import Axis, Sizes
from shohin.program import family
from shohin.program.nodes import argument

if TYPE_CHECKING:
    from shohin.graph.graph import Graph

#: operations that are shown with what they belong to, or hold no tensor
_HIDDEN = frozenset(["getitem", "sym_size"])
#: the reason that every model has
OUTPUT = "output of the model"


@dataclass(frozen=True)
class AxisView:
    """One axis of a tensor.

    Args:
        text: its size; "B" is the batch.
        groups: numbers of the unit groups that own indices of it.
        hint: in words.
    """

    text: str
    groups: tuple[int, ...]
    hint: str


@dataclass(frozen=True)
class TensorView:
    """A tensor: its names (equal ones share a line) and axes."""

    names: tuple[str, ...]
    axes: tuple[AxisView, ...]


@dataclass
class Row:
    """One operation.

    Args:
        number: of the row, for links.
        module, family, address: of the operation.
        outputs, weights: its tensors.
        sources: (row number or None for an input of the model, name) of what it reads, where that is not simply the row before.
        frozen: (reason, source line) of what it prevents.
        regions: numbers of the regions that it lies in.
        macs, params: of one sample; elements of its trainable weights.
    """

    number: int
    node: str
    module: str
    family: str
    address: str
    outputs: list[TensorView]
    weights: list[TensorView]
    sources: list[tuple[int | None, str]]
    frozen: list[tuple[str, str]]
    regions: list[int]
    macs: float
    params: int
    groups: tuple[int, ...] = field(default=())


def rows_of(graph: Graph) -> list[Row]:
    """All operations that make tensors, in program order."""
    program, views = graph.program, _Views(graph)
    macs = {op.address: sum(t.at(graph.sizes) for t in op.macs) for op in graph.costs}
    notes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for note in graph.frozen:
        notes[note.address].append((note.reason, note.line))
    ends = {_shown(n) for n in next(n for n in program.graph.nodes if n.op == "output").all_input_nodes}
    number: dict[fx.Node, int] = {}
    busy = Counter(program.origins[n.name].module for n in program.graph.nodes if _has_row(n))
    rows: list[Row] = []
    for node in program.graph.nodes:
        if not _has_row(node):
            continue
        origin = program.origins[node.name]
        own = [program.names[n.name] for n in node.all_input_nodes if n.name in program.names]
        frozen = [*notes.get(origin.address, ()), *(note for name in own for note in notes.get(name, ()))]
        if node in ends:
            frozen += notes.get("output", [(OUTPUT, "")])
        weights, outputs = _joined(views.weights(node, origin.module)), list(views.outputs(node, "; ".join(reason for reason, _ in frozen)))
        row = Row(
            number=len(rows),
            node=node.name,
            module=origin.module,
            family=family(node),
            address=origin.address,
            outputs=outputs,
            weights=weights,
            sources=_sources(graph, node, number, rows, busy),
            frozen=list(dict.fromkeys(frozen)),
            regions=[i for i, region in enumerate(graph.regions) if node.name in region.nodes],
            macs=macs.get(origin.address, 0.0),
            params=sum(program.tensors[n].numel() for n in dict.fromkeys(own) if n in program.trainable),
            groups=tuple(dict.fromkeys(g for t in (*outputs, *weights) for a in t.axes for g in a.groups)),
        )
        number[node] = row.number
        rows.append(row)
    return rows


def _has_row(node: fx.Node) -> bool:
    return node.op == "call_function" and family(node) not in _HIDDEN and any(True for _ in _parts(node))


def _shown(node: fx.Node) -> fx.Node:
    """The operation whose row shows a tensor."""
    while node.op == "call_function" and family(node) == "getitem":
        node = argument(node, 0)
    return node


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that hold the tensors of an operation."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        yield node
    elif isinstance(node.meta.get("val"), (tuple, list)):
        yield from (u for u in node.users if family(u) == "getitem" and isinstance(u.meta.get("val"), torch.Tensor))


def _sources(
    graph: Graph, node: fx.Node, number: dict[fx.Node, int], rows: Sequence[Row], busy: Mapping[str, int]
) -> list[tuple[int | None, str]]:
    """What an operation reads, if that is not simply the row before; an input of the model is always named."""
    program = graph.program
    names = dict(zip(program.inputs, program.input_names, strict=False))
    found: dict[int | None, str] = {}
    for source in map(_shown, node.all_input_nodes):
        if source in number:
            found[number[source]] = _near(rows[number[source]], program.origins[node.name].module, busy)
        elif source.name in names:
            found[None] = names[source.name]
    simple = len(found) == 1 and next(iter(found)) == len(rows) - 1
    return [] if simple else list(found.items())


def _near(row: Row, module: str, busy: Mapping[str, int]) -> str:
    """A short name for a row seen from a module: without what both paths share, and without the operation where a module runs
    only one.
    """
    name = row.module if row.module and busy[row.module] == 1 else row.address
    if module and name.startswith((f"{module}.", f"{module}/")):
        name = name[len(module) :]
    return name.lstrip("./")


def _joined(tensors: Sequence[TensorView]) -> list[TensorView]:
    """Tensors of equal axes as one, such as the four vectors of a normalization."""
    out: dict[tuple[AxisView, ...], list[str]] = {}
    for tensor in tensors:
        out.setdefault(tensor.axes, []).extend(tensor.names)
    return [TensorView(tuple(names), axes) for axes, names in out.items()]


class _Views:
    """Axes of tensors with the groups that own them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.number = {g.name: i for i, g in enumerate(graph.groups)}
        labels = {name: value for name, value in graph.labels.items() if isinstance(value, Labels)}
        self.extents = Extents(graph.groups, graph.label_count)
        self.sizes = Sizes(graph.program, labels, graph.planes, self.extents)
        self._known: dict[tuple[bytes, tuple[int, ...], int], tuple[int, ...]] = {}

    def outputs(self, node: fx.Node, reason: str) -> Iterator[TensorView]:
        """The results of an operation; ``reason`` is why it is frozen, or ""."""
        for part in _parts(node):
            grows = self.sizes.depends_on_batch(part)
            texts = shape_text(self.graph.program, part, grows)
            yield TensorView((), tuple(self._axis(a, t, reason) for a, t in zip(self.sizes.axes(part), texts, strict=True)))

    def weights(self, node: fx.Node, module: str) -> list[TensorView]:
        """The model's tensors that an operation reads."""
        out = []
        for part in node.all_input_nodes:
            name = self.graph.program.names.get(part.name)
            if name is not None:
                short = name.removeprefix(f"{module}.") if module else name
                out.append(TensorView((short,), tuple(self._axis(a, str(a[2])) for a in self.sizes.axes(part))))
        return out

    def _axis(self, axis: Axis, text: str, reason: str = "") -> AxisView:
        groups = self._owners(axis)
        if groups:
            hint = " and ".join(f"{self.graph.groups[g].name} ({self.graph.groups[g].size} units)" for g in groups)
        else:
            hint = "batch" if text.endswith("B") else f"frozen: {reason}" if reason else "no unit group owns this axis"
        return AxisView(text, groups, hint)

    def _owners(self, axis: Axis) -> tuple[int, ...]:
        plane, position, size = axis
        if plane.shape[position] == 1:
            return ()
        key = plane.tobytes(), plane.shape, position
        if key not in self._known:
            products = self.extents.axis(plane, position, size)
            names = dict.fromkeys(n for _, extents in products for e in extents for n in e.per_unit)
            self._known[key] = tuple(sorted(self.number[n] for n in names))
        return self._known[key]
