"""What can be chosen in a program: unit groups, regions, sites, costs, and what is frozen and why. Read-only."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shohin.errors import closest
from shohin.graph.costs import Edge, Operator
from shohin.graph.labels.context import Frozen, Parameter
from shohin.graph.labels.core import Array, Labels, compress
from shohin.graph.labels.walk import propagate
from shohin.graph.memory import Memory, memory
from shohin.graph.operators import Extents, edges, macs_of, operators
from shohin.graph.regions import Region, find_layers, find_regions, outermost
from shohin.graph.units import Structure, UnitGroup, find_groups
from shohin.plan import Plan
from shohin.program import Program


@dataclass(frozen=True, eq=False)
class Graph:
    """The choices of one program.

    Args:
        program: what was captured.
        labels: operation node name -> settled labels of its tensor (tuples of labels for operators with several results).
        planes: tensor name -> settled label planes.
        constants: node names of tensors that the forward makes from no input and no weight; these are sliced where they are used.
        label_count: labels are below this number.
        groups: width decisions.
        regions: what can be skipped: the smallest regions, among which a planner chooses.
        layers: larger ones that are modules (a whole layer of a transformer): a plan can skip them too.
        frozen: what cannot be chosen, and why.
        costs: operations that cost time.
        edges: the tensors between these.
    """

    program: Program
    labels: Mapping[str, Labels | tuple[Labels, ...]]
    planes: Mapping[str, tuple[Array, ...]]
    label_count: int
    groups: tuple[UnitGroup, ...]
    regions: tuple[Region, ...]
    frozen: tuple[Frozen, ...]
    costs: tuple[Operator, ...] = ()
    edges: tuple[Edge, ...] = ()
    constants: frozenset[str] = frozenset()
    layers: tuple[Region, ...] = ()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Group name -> number of units."""
        return {g.name: g.size for g in self.groups}

    def group(self, name: str) -> UnitGroup:
        """The group of that name. Raises KeyError."""
        found = next((g for g in self.groups if g.name == name), None)
        if found is None:
            raise KeyError(f"the model has no unit group {name!r}{closest(name, self.sizes)}")
        return found

    def region(self, name: str) -> Region:
        """The region or layer of that name. Raises KeyError."""
        found = next((r for r in (*self.regions, *self.layers) if r.name == name), None)
        if found is None:
            raise KeyError(f"the model has no region {name!r}{closest(name, self.skippable)}")
        return found

    @property
    def skippable(self) -> tuple[str, ...]:
        """Names of the regions and layers."""
        return tuple(r.name for r in (*self.regions, *self.layers))

    def skipped(self, skips: Iterable[str]) -> list[Region]:
        """The regions of these names without those that lie in another of them. Raises KeyError."""
        return outermost(self.region(name) for name in skips)

    def kept(self, plan: Plan) -> dict[str, int]:
        """Group name -> number of units that the plan keeps."""
        return {**self.sizes, **{name: len(units) for name, units in plan.widths.items()}}

    def gone(self, plan: Plan) -> np.ndarray:
        """Boolean over labels: removed by the plan's widths. A link's parent goes when all of its children do."""
        gone = np.zeros(self.label_count, bool)
        for name, units in plan.widths.items():
            group = self.group(name)
            keep = set(units)
            for i, classes in enumerate(group.units):
                if i not in keep:
                    gone[classes] = True
        return gone

    def macs(self, plan: Plan | None = None) -> float:
        """Multiply-accumulates of one sample, with the plan applied."""
        plan = plan or Plan(self.program.fingerprint)
        gone = {self.program.origins[n].address for r in self.skipped(plan.skips) for n in r.nodes}
        return macs_of([op for op in self.costs if op.address not in gone], self.kept(plan))

    def memory(self, plan: Plan | None = None, **how: Any) -> Memory:
        """Memory of the activations through a plan: see `shohin.graph.memory.memory` for ``how``."""
        return memory(self, plan, **how)

    def to_html(self, path: str | Path | None = None, *, title: str = "model") -> str:
        """The model as one self-contained HTML page: operations by module, axes in the colours of their groups.

        Args:
            path: written there, too, if given.
            title: shown above.
        """
        from shohin.graph.html import to_html
        from shohin.run import write_atomic

        text = to_html(self, title)
        if path is not None:
            write_atomic(Path(path), text.encode())
        return text

    @property
    def sites(self) -> tuple[str, ...]:
        """Addresses at which a format can be chosen: the operations that contract with a weight."""
        return tuple(op.address for op in self.costs if op.macs and op.weights)

    def only(self, groups: Collection[str]) -> Graph:
        """The graph with no width to choose but those of ``groups``. Plans of it are plans of this graph."""
        return with_costs(replace(self, groups=tuple(g for g in self.groups if g.name in groups)))

    def __repr__(self) -> str:
        return f"Graph({len(self.groups)} groups, {len(self.regions)} regions, {len(self.costs)} operations, {len(self.frozen)} frozen)"


def understand_program(program: Program) -> Graph:
    """Labels by execution, then groups, regions and costs (DESIGN section 5)."""
    with _without_collection():
        return _understand(program)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Hundreds of thousands of small values are made and kept: looking for garbage among them would take a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _understand(program: Program) -> Graph:
    context = propagate(program)
    find = context.classes.find

    def settled(value: Labels) -> Labels:
        return Labels(tuple(p for p in (compress(find(p)) for p in value.planes) if p.size > 1), value.shape)

    labels: dict[str, Labels | tuple[Labels, ...]] = {}
    constants: set[str] = set()
    for node, value in context.values.items():
        if isinstance(value, Labels):
            labels[node.name] = settled(value)
        elif isinstance(value, Parameter) and value.constant:
            labels[node.name] = settled(Labels(tuple(value.planes), value.shape))
            constants.add(node.name)
        elif isinstance(value, torch.Tensor) and node.op == "call_function":
            constants.add(node.name)
        elif isinstance(value, (tuple, list)) and value and all(isinstance(v, Labels) for v in value):
            labels[node.name] = tuple(settled(v) for v in value)
    planes = {name: tuple(_settle_planes(p, find)) for name, p in context.parameters.items()}
    planes |= {name: (np.zeros((1,) * t.dim(), np.int64),) for name, t in program.tensors.items() if not t.is_floating_point()}
    by_tensor = {id(program.tensors[name]): planes[name] for name in planes}
    planes.update({name: by_tensor[id(t)] for name, t in program.tensors.items() if name not in planes and id(t) in by_tensor})
    flat = [one for v in labels.values() for one in (v if isinstance(v, tuple) else (v,))]
    whole = np.unique(find(np.array(sorted(context.classes.whole), np.int64)))
    extra = [*(find(g) for g in context.classes.grids), *whole[:, None]]
    structure = Structure(
        [*(p for v in flat for p in v.planes), *(a for arrays in planes.values() for a in arrays), *extra], context.classes.links
    )
    normalized = {int(v) for a in context.normalized for v in np.unique(find(a)) if v}
    order = [n for n in program.names.values() if n in context.parameters]
    distinct = {n: planes[n] for n in dict.fromkeys(order) if context.parameters[n].name == n}
    sizes = {n: program.tensors[n].numel() for n in distinct if n in program.trainable}
    itemsize = {n: program.tensors[n].element_size() for n in sizes}
    groups = find_groups(distinct, structure, normalized, sizes, itemsize, context.produced)
    count = context.classes.count
    single = {name: v for name, v in labels.items() if isinstance(v, Labels)}
    regions = find_regions(program, single)
    layers = find_layers(program, single, regions)
    frozen = tuple(dict.fromkeys(context.frozen))
    graph = Graph(program, labels, planes, count, tuple(groups), tuple(regions), frozen)
    return with_costs(replace(graph, constants=frozenset(constants), layers=tuple(layers)))


def with_costs(graph: Graph) -> Graph:
    """The graph with its costs as functions of the widths of its groups."""
    extents = Extents(graph.groups, graph.label_count)
    labels = {name: value for name, value in graph.labels.items() if isinstance(value, Labels)}
    costs = operators(graph.program, labels, graph.planes, extents, graph.regions)
    macs = _macs_per_unit(costs, graph.sizes)
    groups = tuple(replace(g, macs=macs[g.name]) for g in graph.groups)
    return replace(graph, groups=groups, costs=tuple(costs), edges=tuple(edges(graph.program, labels, extents, costs)))


def _macs_per_unit(costs: Sequence[Operator], sizes: Mapping[str, int]) -> dict[str, float]:
    """Group -> multiply-accumulates that go with one of its units, all other groups whole."""
    out = dict.fromkeys(sizes, 0.0)
    for term in (t for op in costs for t in op.macs):
        whole = term.at(sizes)
        for name in {g for extent in term.extents for g in extent.per_unit}:
            out[name] += whole - term.at({**sizes, name: sizes[name] - 1})
    return out


def _settle_planes(parameter: Parameter, find: Callable[[Array], Array]) -> list[Array]:
    out = []
    for plane in parameter.planes:
        data = compress(find(plane))
        if data.size > 1:
            out.append(data)
    return out or [np.zeros((1,) * len(parameter.shape), np.int64)]
