"""Every rewritten movement is run again: it must move what stays to where it is expected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from shohin.graph.labels.core import Array, Labels
from shohin.graph.labels.movement import MOVED, move
from shohin.program import concrete, family, shape_of
from shohin.program.nodes import arguments, flatten, run
from shohin.surgery.rewritten import CannotRewrite
from shohin.surgery.work import Work


def check_movement(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """Numbers the positions along the axes that shrink, moves them before and after, and compares.

    Raises:
        CannotRewrite: if the rewritten operator does not give what stays of the original's result.
    """
    moved = [n for n in flatten(arguments(node)[: MOVED.get(family(node), 1)]) if isinstance(n, fx.Node)]
    before: dict[fx.Node, Tensor] = {}
    after: dict[fx.Node, Tensor] = {}
    start = 0
    for source in dict.fromkeys(moved):
        kept, shape = work.stays(source), shape_of(source)
        ids = _positions(shape, kept, start)
        start += math.prod(shape[axis] for axis in kept)
        before[source] = after[source] = ids
        for axis, indices in kept.items():
            after[source] = after[source].index_select(axis, torch.from_numpy(indices))
    old = {work.use(n, node): n for n in node.all_input_nodes}
    first = [before[n] if n in before else evaluate(work, n) for n in node.all_input_nodes]
    known = dict(zip(node.all_input_nodes, first, strict=True))

    def now(n: fx.Node) -> Any:
        original = old.get(n)
        return evaluate(work, n) if original is None else after[original] if original in after else _remaining(work, original)

    try:
        whole = move(node, _full(fx.map_arg(node.args, known.__getitem__)))
        part = move(copy, _full(fx.map_arg(copy.args, now)))
    except (RuntimeError, IndexError, ValueError) as error:
        raise CannotRewrite(f"the operation does not run on what stays: {str(error).splitlines()[0]}") from None
    value = work.graph.labels[node.name]
    wanted = [value] if isinstance(value, Labels) else list(value)
    for a, b, labels in zip(_list(whole), _list(part), wanted, strict=True):
        if not a.numel():
            continue  # an empty slice has no labels
        for axis, indices in work.kept(labels).items():
            a = a.index_select(axis, torch.from_numpy(indices))
        if a.shape != b.shape or not torch.equal(a, b):
            raise CannotRewrite("the operation would not move what stays to where it is expected")


def _full(args: Any) -> list[Any]:
    """Arguments without the empty tensors of a list: an empty slice that is joined again has no labels, and adds nothing."""
    return [[t for t in a if not isinstance(t, Tensor) or t.numel()] if isinstance(a, (list, tuple)) else a for a in args]


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else list(value)


def _positions(shape: tuple[int, ...], kept: dict[int, Array], start: int) -> Tensor:
    """Numbers that differ along the axes that shrink, with stride 0 along the others."""
    sizes = [n if d in kept else 1 for d, n in enumerate(shape)]
    numbers = np.arange(start, start + int(np.prod(sizes)), dtype=np.int64).reshape(sizes)
    return torch.from_numpy(numbers).expand(shape)


def _remaining(work: Work, node: fx.Node) -> Any:
    """What stays of a tensor that is read beside what is moved (a shape to take, an index)."""
    value = evaluate(work, node)
    for axis, indices in work.stays(node).items():
        value = value.index_select(axis, torch.from_numpy(indices))
    return value


def evaluate(work: Work, node: fx.Node) -> Any:
    """A size of the example batch, or a constant index; zeros for an index that is not known."""
    if node.op == "placeholder" and node.name in work.graph.program.names:
        return work.graph.program.tensors[work.graph.program.names[node.name]].detach().cpu()
    val = node.meta.get("val")
    if node.op == "placeholder" and isinstance(val, Tensor):
        return torch.zeros([concrete(s) for s in val.shape], dtype=torch.int64)
    if val is not None and not isinstance(val, (Tensor, tuple, list)):
        return concrete(val)
    if isinstance(val, Tensor) and node.name not in work.graph.constants:
        return torch.zeros([concrete(s) for s in val.shape], dtype=torch.int64)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: evaluate(work, n))
    return run(node, args, kwargs)
