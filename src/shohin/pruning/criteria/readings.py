"""The layers that read units, each as rows of features times a matrix: what activation, Wanda and OBS criteria have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, fx

from shohin.evidence.rows import Window
from shohin.graph import Graph
from shohin.graph.kinds import CONVOLUTIONS, PRODUCTS, TRANSPOSED, Contraction, Owners, Use, contraction, static_nodes, uses
from shohin.program import Program, family, shape_of
from shohin.program.nodes import argument
from shohin.pruning.criteria.weights import unit_indices, weight_value


@dataclass(frozen=True, eq=False)
class Reading:
    """An operation at which units are read.

    Args:
        node: name of the operation.
        form: "layer" (weights contract the units' axis), "product" (another activation does: queries with keys), or
            "output" (nothing is known to read the group: the first activation that holds it stands for what is read).
        place: of the tensor that holds the units among the arguments; None for "output".
        axis: of that tensor.
        channels: its size.
        owners: group -> int64 (channels,): the unit at each index, or -1.
        sizes: group -> number of units.
        layer: of the form "layer".
        partner: (place, axis) of the other operand of a product.
        centred: True if what is constant can go into a bias, or into the statistics of a batch normalization that follows.
    """

    node: str
    form: Literal["layer", "product", "output"]
    place: int | None
    axis: int
    channels: int
    owners: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    layer: Contraction | None = None
    partner: tuple[int, int] | None = None
    centred: bool = False

    @cached_property
    def window(self) -> Window | None:
        """The geometry of a convolution; None for all else."""
        if self.layer is None or family(self.layer.node) not in CONVOLUTIONS:
            return None
        node = self.layer.node
        kernel = shape_of(self.layer.weights[0])[2:]
        stride, padding, dilation = argument(node, 3, 1), argument(node, 4, 0), argument(node, 5, 1)
        return Window(kernel, stride, padding, dilation, self.layer.groups)

    @property
    def groups(self) -> int:
        """Of a convolution, else 1."""
        return 1 if self.layer is None else self.layer.groups

    @property
    def taps(self) -> int:
        """Features for each channel: kernel positions of a convolution, else 1."""
        return self.window.taps if self.window is not None else 1

    @property
    def features(self) -> int:
        """Features of each group of the layer."""
        return self.channels // self.groups * self.taps

    def matrix(self, program: Program) -> Tensor:
        """What multiplies the features: float64 (groups, outputs of a group, features)."""
        if self.layer is None:
            ones = torch.ones(self.channels, dtype=torch.float64)
            return (ones[None] if self.form == "product" else ones.diag())[None]
        values = [weight_value(program, w).double() for w in self.layer.weights]
        if family(self.layer.node) in TRANSPOSED or (len(shape_of(self.layer.weights[0])) > 2 and self.layer.outer == 1):
            return values[0].reshape(self.groups, self.features, -1).transpose(1, 2)
        rows = torch.cat([v.movedim(self.layer.outer, 0).flatten(1) for v in values])
        return rows.reshape(self.groups, -1, self.features)

    def unit_features(self, group: str) -> list[tuple[int, Tensor, Tensor]]:
        """(group of the layer, units (n,), their features (n, k)): units that own as many features of it are listed together."""
        found = []
        lines = self.owners[group].reshape(self.groups, -1)
        for number, line in enumerate(lines):
            indices = unit_indices(line, self.sizes[group])
            for count in sorted({len(i) for i in indices} - {0}):
                units = torch.tensor([u for u, i in enumerate(indices) if len(i) == count])
                channels = torch.stack([indices[u] for u in units.tolist()])
                features = channels.unsqueeze(2) * self.taps + torch.arange(self.taps)
                found.append((number, units, features.flatten(1)))
        return found

    def by_unit(self, values: Tensor, group: str) -> Tensor:
        """The sum of values (..., channels) over the channels of each unit: (..., units)."""
        owner = self.owners[group].to(values.device)
        out = values.new_zeros(*values.shape[:-1], self.sizes[group])
        return out.index_add_(values.dim() - 1, owner[owner >= 0], values[..., owner >= 0])


def readings(graph: Graph) -> list[Reading]:
    """All operations that read units, in program order. A depthwise convolution passes units on and reads none."""
    static = static_nodes(graph)
    at: dict[tuple[str, str], dict[str, Use]] = {}
    for group, listed in uses(graph).items():
        for use in listed:
            if use.role in ("reads", "meets") and use.family != "einsum":
                at.setdefault((use.node, use.role), {})[group] = use
    unread = graph.sizes.keys() - {group for mine in at.values() for group in mine}
    nodes = {n.name: (i, n) for i, n in enumerate(graph.program.graph.nodes)}
    found = [_reading(graph, nodes[name][1], mine, contraction(nodes[name][1], static)) for (name, _), mine in at.items()]
    found += _unread(graph, unread, static) if unread else []
    return sorted(found, key=lambda one: nodes[one.node][0])


def _reading(graph: Graph, node: fx.Node, mine: Mapping[str, Use], layer: Contraction | None) -> Reading:
    owners = {name: torch.from_numpy(use.owner) for name, use in mine.items()}
    sizes = {name: graph.sizes[name] for name in mine}
    use = next(iter(mine.values()))
    if layer is not None:
        centred = layer.bias or any(family(u) == "batch_norm" for u in node.users if u.op == "call_function")
        return Reading(node.name, "layer", layer.place, layer.axis, len(use.owner), owners, sizes, layer, centred=centred)
    left, right = PRODUCTS.get(use.family, (0, 1))
    axis = -1 if use.family == "scaled_dot_product_attention" else -2
    return Reading(node.name, "product", left, use.axis, len(use.owner), owners, sizes, partner=(right, axis))


def _unread(graph: Graph, groups: Collection[str], static: frozenset[fx.Node]) -> list[Reading]:
    """Of each group that nothing is known to read, the first activation that holds its units."""
    found: list[Reading] = []
    left, owners = set(groups), Owners(graph)
    for node in graph.program.graph.nodes:
        if node.op != "call_function" or node in static or not isinstance(node.meta.get("val"), Tensor):
            continue
        for axis, size in enumerate(shape_of(node)):
            mine = {name: torch.from_numpy(owner) for name, owner in owners.along(node, axis) if name in left}
            if mine:
                found.append(Reading(node.name, "output", None, axis, size, mine, {name: graph.sizes[name] for name in mine}))
                left -= mine.keys()
    return found
