"""A program through a plan: sliced tensors and the few integers that must change with them.

Only integer positions whose kept value differs are rewritten, so the batch stays symbolic. Every rewritten movement is run
again on the labels that stay and must give exactly the labels that were predicted to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from shohin.errors import ShohinError
from shohin.graph import Graph, kept_indices
from shohin.graph.labels.core import Array, Labels
from shohin.graph.labels.movement import MOVEMENT, move
from shohin.plan import Plan
from shohin.program import concrete, family
from shohin.program.nodes import argument, arguments, flatten, run
from shohin.surgery.queries import query_rows


class CannotRewrite(ShohinError):
    """An operation's integers cannot follow the plan."""


@dataclass(frozen=True)
class Change:
    """One integer that follows the plan.

    Args:
        node: operation node name.
        position: in the node's flattened arguments; -1 if the operation itself had to become another one.
        old, new: values.
    """

    node: str
    position: int
    old: int
    new: int


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A program through a plan.

    Args:
        graph: the rewritten graph.
        kept: tensor name -> {axis: kept indices}, for tensors that are sliced.
        changes: every integer that changed.
        mended: node names that needed more than an integer (a scale written out, a split made uneven).
        tensors: the model's own, whole.
        scaled: tensor name -> (rows of the whole tensor, factor), for query rows whose head dims were cut.
    """

    graph: fx.Graph
    kept: Mapping[str, Mapping[int, Array]]
    changes: tuple[Change, ...]
    mended: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    scaled: Mapping[str, tuple[Tensor, float]]

    def own(self, name: str) -> Tensor:
        """A copy of what stays of the model's own tensor."""
        tensor = self.tensors[name].detach()
        return self.scale(name, self.slice(name, tensor)) if self.kept.get(name) else tensor.clone()

    def sliced(self) -> dict[str, Tensor]:
        """The parts that stay of all tensors, unscaled: values for the rewritten graph."""
        return {name: self.slice(name, tensor.detach()) for name, tensor in self.tensors.items()}

    def scale(self, name: str, part: Tensor) -> Tensor:
        """The kept part of a tensor with its query rows multiplied, where head dims were cut."""
        if name not in self.scaled:
            return part
        rows, factor = self.scaled[name]
        kept = self.kept.get(name, {}).get(0)
        index = torch.arange(len(part)) if kept is None else torch.from_numpy(kept)
        factors = torch.where(torch.isin(index, rows), factor, 1.0).to(part)
        return part * factors.reshape(-1, *[1] * (part.dim() - 1))

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a named tensor that stays."""
        for axis, indices in self.kept.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.from_numpy(indices).to(tensor.device))
        return tensor


@dataclass
class _Work:
    graph: Graph
    gone: np.ndarray
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    scaled: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    _kept: dict[int, dict[int, Array]] = field(default_factory=dict)

    def kept(self, labels: Labels) -> dict[int, Array]:
        """Kept indices of the axes that shrink."""
        key = id(labels)
        if key not in self._kept:
            found = kept_indices(labels.data, self.gone) if labels.data.any() else {}
            if found is None:
                raise CannotRewrite("what stays of a tensor is not rectangular, or empty")
            self._kept[key] = found
        return self._kept[key]

    def shape(self, labels: Labels) -> tuple[int, ...]:
        """The shape that stays."""
        kept = self.kept(labels)
        return tuple(len(kept[d]) if d in kept else n for d, n in enumerate(labels.shape))

    def of(self, node: Any) -> Labels | None:
        """Labels of a node with one tensor."""
        value = self.graph.labels.get(node.name) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Labels) else None


def rewrite(graph: Graph, plan: Plan) -> Rewritten:
    """The program through a plan (widths and skips; formats do not change the graph).

    Raises:
        PlanError: if the plan is for another model.
        CannotRewrite: if an operation cannot follow, with its address and line.
    """
    program = graph.program
    plan.check(program.fingerprint, graph.sizes, [r.name for r in graph.regions])
    work = _Work(graph, graph.gone(plan))
    kept = _kept_tensors(graph, work.gone)
    result = fx.Graph()
    skipped = {graph.region(name).output: graph.region(name).input for name in plan.skips}
    by_name = {n.name: n for n in program.graph.nodes}
    for node in program.graph.nodes:
        if node.op == "output":
            result.output(fx.map_arg(node.args[0], lambda n: work.new[n]))
            continue
        if node.name in skipped:
            work.new[node] = work.new[by_name[skipped[node.name]]]
            continue
        copy = result.node_copy(node, lambda n: work.new[n])
        work.new[node] = copy
        if node.op == "call_function" and _touched(work, node):
            try:
                _follow(work, node, copy)
            except CannotRewrite as error:
                origin = program.origins[node.name]
                raise CannotRewrite(f"{origin.address}: {error}" + (f" ({origin.line})" if origin.line else "")) from None
    _drop_unused(result, program.names)
    return Rewritten(result, kept, tuple(work.changes), tuple(work.mended), program.tensors, work.scaled)


def _drop_unused(graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Every operation is functional, so what nobody reads can go (torch's own pass keeps attention and dropout for their seeds)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "call_function" or (node.op == "placeholder" and node.name in names)):
            graph.erase_node(node)


def _kept_tensors(graph: Graph, gone: np.ndarray) -> dict[str, dict[int, Array]]:
    out: dict[str, dict[int, Array]] = {}
    for name, planes in graph.planes.items():
        for plane in planes:
            found = kept_indices(plane, gone)
            if found is None:
                raise CannotRewrite(f"{name}: what stays is not rectangular, or empty")
            for axis, indices in found.items():
                previous = out.setdefault(name, {}).get(axis)
                out[name][axis] = indices if previous is None else np.intersect1d(previous, indices)
        if name in out and any(not len(i) for i in out[name].values()):
            raise CannotRewrite(f"{name}: nothing stays")
    return out


def _touched(work: _Work, node: fx.Node) -> bool:
    values = [work.graph.labels.get(n.name) for n in (node, *node.all_input_nodes)]
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(v, Labels) and work.kept(v) for v in flat)


Handler = Callable[[_Work, fx.Node, fx.Node], None]


def _follow(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    name = family(node)
    handler = HANDLERS.get(name)
    if handler is not None:
        handler(work, node, copy)
    if name in MOVEMENT:
        _check_movement(work, node, copy)


def _set(work: _Work, node: fx.Node, copy: fx.Node, place: int, value: Any) -> None:
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


def _sizes(work: _Work, node: fx.Node, copy: fx.Node, place: int, wanted: Sequence[int], before: Sequence[int]) -> None:
    """Rewrites a list of sizes so that it gives ``wanted`` where it gave ``before``."""
    sizes, new = list(arguments(node)[place]), list(arguments(copy)[place])
    for i, size in enumerate(sizes):
        if wanted[i] == before[i] or (isinstance(size, int) and size == -1):
            continue
        if isinstance(size, int):
            new[i] = wanted[i]
        else:
            new[i] = _scaled(work, size, wanted[i], before[i])
    _set(work, node, copy, place, new)


def _scaled(work: _Work, size: Any, wanted: int, before: int) -> fx.Node:
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


def _view(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    labels = work.of(node)
    if labels is not None:
        _sizes(work, node, copy, 1, work.shape(labels), labels.shape)


def _unflatten(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    labels = work.of(node)
    if labels is not None:
        _, axis, sizes = arguments(node)[:3]
        start = axis % (len(labels.shape) - len(sizes) + 1)
        stop = start + len(sizes)
        _sizes(work, node, copy, 2, work.shape(labels)[start:stop], labels.shape[start:stop])


def _axis(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    value: Any = argument(node, position, node.kwargs.get("dim", default))
    return int(value) % rank


def _pieces(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    pieces = work.graph.labels[node.name]
    if not isinstance(pieces, tuple):
        return
    axis = _axis(node, 2, len(pieces[0].shape))
    before = [p.shape[axis] for p in pieces]
    wanted = [work.shape(p)[axis] for p in pieces]
    if wanted == before:
        return
    if isinstance(node.args[1], (list, tuple)):
        _set(work, node, copy, 1, wanted)
        return
    total = sum(wanted)
    if family(node) == "chunk":
        same = [len(c) for c in torch.arange(total).chunk(arguments(node)[1])]
        if same == wanted:
            return
    else:
        if wanted[0] and [min(wanted[0], total - i) for i in range(0, total, wanted[0])] == wanted:
            _set(work, node, copy, 1, wanted[0])
            return
    copy.target = torch.ops.aten.split_with_sizes.default
    copy.args = (copy.args[0], wanted, axis)
    copy.kwargs = {}
    work.mended.append(node.name)


def _slice(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    source = work.of(node.args[0])
    if source is None:
        return
    axis = _axis(node, 1, len(source.shape))
    kept = work.kept(source).get(axis)
    if kept is None:
        return
    if argument(node, 4, 1) != 1:
        raise CannotRewrite("a slice with a step cannot follow")
    for position in (2, 3):
        value = argument(node, position)
        if isinstance(value, int):
            size = source.shape[axis]
            bound = value + size if value < 0 else value
            if bound < size:
                _set(work, node, copy, position, int((kept < bound).sum()))
        elif value is not None:
            raise CannotRewrite("a slice with a computed bound cannot follow")


def _select(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    source = work.of(node.args[0])
    if source is None:
        return
    axis = _axis(node, 1, len(source.shape))
    kept = work.kept(source).get(axis)
    if kept is not None:
        index = arguments(node)[2] % source.shape[axis]
        place = np.flatnonzero(kept == index)
        if not len(place):
            raise CannotRewrite("the selected index is removed")
        _set(work, node, copy, 2, int(place[0]))


def _narrow(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    source, labels = work.of(node.args[0]), work.of(node)
    if source is None or labels is None:
        return
    axis = _axis(node, 1, len(source.shape))
    kept = work.kept(source).get(axis)
    if kept is not None:
        _set(work, node, copy, 2, int((kept < arguments(node)[2]).sum()))
        _set(work, node, copy, 3, work.shape(labels)[axis])


def _layer_norm(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    labels = work.of(node)
    if labels is not None:
        count = len(arguments(node)[1])
        _sizes(work, node, copy, 1, work.shape(labels)[-count:], labels.shape[-count:])


def _convolution(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    """Depthwise convolutions have as many groups as input channels; other groups keep their number."""
    groups = argument(node, 6, 1)
    source = work.of(node.args[0])
    if groups == 1 or source is None:
        return
    if source.shape[1] == groups:
        _set(work, node, copy, 6, work.shape(source)[1])


def _group_norm(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    """As many groups as channels stay so; other groups keep their number."""
    source = work.of(node.args[0])
    if source is not None and source.shape[1] == arguments(node)[1]:
        _set(work, node, copy, 1, work.shape(source)[1])


def _attention(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    """The default scale follows the head dim: the query rows make up for it, or the original scale is written out."""
    query = work.of(node.args[0])
    if query is not None and work.shape(query)[-1] != query.shape[-1] and copy.kwargs.get("scale") is None:
        found = query_rows(work.graph.program, node)
        if found is not None:
            names, rows = found
            work.scaled.update(dict.fromkeys(names, (rows, (work.shape(query)[-1] / query.shape[-1]) ** 0.5)))
            return
        copy.kwargs = {**copy.kwargs, "scale": float(query.shape[-1]) ** -0.5}
        work.mended.append(node.name)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("view", "reshape", "expand"), _view),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _pieces),
    "slice": _slice,
    "select": _select,
    "narrow": _narrow,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
}


def _check_movement(work: _Work, node: fx.Node, copy: fx.Node) -> None:
    """Runs the rewritten movement on the labels that stay: the result must be the labels that were predicted to stay."""

    def stays(labels: Labels) -> Tensor:
        tensor = labels.full()
        for axis, indices in work.kept(labels).items():
            tensor = tensor.index_select(axis, torch.from_numpy(indices))
        return tensor

    program = work.graph.program
    old = {work.new[n]: n for n in node.all_input_nodes}

    def value(n: fx.Node) -> Any:
        original = old.get(n)
        if original is None:
            return _evaluate(n, work)
        name = program.names.get(original.name)
        if name is not None and program.tensors[name].is_floating_point():
            plane, *more = work.graph.planes[name]
            if more:
                raise CannotRewrite("a parameter that shrinks on several axes is moved")
            return stays(Labels(plane, tuple(program.tensors[name].shape)))
        labels = work.graph.labels.get(original.name)
        return stays(labels) if isinstance(labels, Labels) else _evaluate(n, work)

    evaluated: Any = fx.map_arg(copy.args, value)
    try:
        result = move(copy, list(evaluated))
    except (RuntimeError, IndexError, ValueError) as error:
        raise CannotRewrite(f"the operation does not run on what stays: {str(error).splitlines()[0]}") from None
    wanted = work.graph.labels[node.name]
    pairs = [(result, wanted)] if isinstance(wanted, Labels) else list(zip(result, wanted, strict=True))
    for got, labels in pairs:
        if not torch.equal(got, stays(labels)):
            raise CannotRewrite("the operation would not move what stays to where it is expected")


def _evaluate(node: fx.Node, work: _Work) -> Any:
    """A size of the example batch, or a constant index."""
    if node.op == "placeholder" and node.name in work.graph.program.names:
        return work.graph.program.tensors[work.graph.program.names[node.name]].detach().cpu()
    if "val" in node.meta and not isinstance(node.meta["val"], (Tensor, tuple, list)):
        return concrete(node.meta["val"])
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(n, work))
    return run(node, args, kwargs)
