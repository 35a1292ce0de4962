"""A program through a plan: sliced tensors and the few integers that must change with them.

Only integer positions whose kept value differs are rewritten, so the batch stays symbolic. Every rewritten movement is run
again on what stays and must move it to where it was predicted to be.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import fx

from shohin.errors import PlanError
from shohin.graph import Graph, kept_indices
from shohin.graph.labels.core import Array, Labels
from shohin.graph.labels.movement import MOVEMENT
from shohin.graph.labels.recurrent import FILLED
from shohin.plan import Plan
from shohin.program import family, shape_of
from shohin.surgery.follow import FOLLOW
from shohin.surgery.moves import check_movement
from shohin.surgery.rewritten import CannotRewrite, Rewritten
from shohin.surgery.scales import Scaling, settle
from shohin.surgery.work import Work


def rewrite(graph: Graph, plan: Plan) -> Rewritten:
    """The program through a plan (widths and skips; formats do not change the graph).

    Raises:
        PlanError: if the plan is for another model.
        CannotRewrite: if an operation cannot follow, with its address and line.
    """
    program = graph.program
    plan.check(program.fingerprint, graph.sizes, graph.skippable)
    rewritten, failed = attempt(graph, plan)
    if failed:
        raise next(iter(failed.values()))
    return rewritten


def attempt(graph: Graph, plan: Plan) -> tuple[Rewritten, dict[str, CannotRewrite]]:
    """The program through a plan, and what could not follow: node or tensor name -> why."""
    program = graph.program
    work = Work(graph, graph.gone(plan))
    failed: dict[str, CannotRewrite] = {}
    kept = _kept_tensors(graph, work.gone, failed)
    result = fx.Graph()
    skipped = {r.output: r.input for r in graph.skipped(plan.skips)}
    by_name = {n.name: n for n in program.graph.nodes}
    _check_skips(work, plan, by_name)
    for node in program.graph.nodes:
        if node.op == "output":
            result.output(fx.map_arg(node.args[0], work.reading(node)))
            continue
        if node.name in skipped:
            work.new[node] = work.new[by_name[skipped[node.name]]]
            continue
        copy = result.node_copy(node, work.reading(node))
        work.new[node] = copy
        if node.op != "call_function":
            continue
        try:
            if node.name in graph.constants and not _fills(graph, node):
                _take_part(work, node, copy)
            elif _touched(work, node):
                _follow(work, node, copy)
        except CannotRewrite as error:
            origin = program.origins[node.name]
            failed[node.name] = CannotRewrite(f"{origin.address}: {error}" + (f" ({origin.line})" if origin.line else ""))
    scaled, refused = settle(program, work.scalings)
    for scaling in refused:
        _write_scale(work, scaling)
    _drop_unused(result, program.names)
    return Rewritten(result, kept, tuple(work.changes), tuple(work.mended), program.tensors, scaled), failed


def _fills(graph: Graph, node: fx.Node) -> bool:
    """True for a tensor of one value that no other constant is made of: its sizes follow, as the class's own would."""
    return family(node) in FILLED and all(u.name not in graph.constants for u in node.users)


def _write_scale(work: Work, scaling: Scaling) -> None:
    """The default scale of an attention as a number: the class would need one too."""
    copy = work.new[scaling.reader]
    copy.kwargs = {**copy.kwargs, "scale": float(shape_of(scaling.value)[-1]) ** -0.5}
    work.mended.append(scaling.reader.name)


def _check_skips(work: Work, plan: Plan, by_name: Mapping[str, fx.Node]) -> None:
    """A chain can be skipped only if its input and output keep the same."""
    for region in work.graph.skipped(plan.skips):
        first, second = (work.stays(by_name[n]) for n in (region.input, region.output))
        if first.keys() != second.keys() or any(not np.array_equal(first[d], second[d]) for d in first):
            raise PlanError(
                f"the plan skips {region.name!r}, whose input and output would keep different units: keep the same of both, or all"
            )


def _take_part(work: Work, node: fx.Node, copy: fx.Node) -> None:
    """A constant that the forward makes is sliced where it is used; the class would have to make another one."""
    part = copy
    for axis, indices in work.stays(node).items():
        with copy.graph.inserting_after(part):
            index = copy.graph.call_function(torch.tensor, (indices.tolist(),))
        with copy.graph.inserting_after(index):
            part = copy.graph.call_function(torch.ops.aten.index_select.default, (part, axis, index))
    if part is not copy:
        work.parts[node] = part
        work.mended.append(node.name)


def _drop_unused(graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Every operation is functional, so what nobody reads can go (torch's own pass keeps attention and dropout for their seeds)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "call_function" or (node.op == "placeholder" and node.name in names)):
            graph.erase_node(node)


def _kept_tensors(graph: Graph, gone: np.ndarray, failed: dict[str, CannotRewrite]) -> dict[str, dict[int, Array]]:
    out: dict[str, dict[int, Array]] = {}
    for name, planes in graph.planes.items():
        found = kept_indices(planes, gone)
        if found is None:
            failed[name] = CannotRewrite(f"{name}: what stays is not rectangular, or empty")
        elif found:
            out[name] = found
    return out


def _touched(work: Work, node: fx.Node) -> bool:
    if any(work.stays(n) for n in node.all_input_nodes if n.name in work.graph.program.names or n.name in work.graph.constants):
        return True
    values = [work.graph.labels.get(n.name) for n in (node, *node.all_input_nodes)]
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(v, Labels) and work.kept(v) for v in flat)


def _follow(work: Work, node: fx.Node, copy: fx.Node) -> None:
    name = family(node)
    if name in FOLLOW:
        FOLLOW[name](work, node, copy)
    if name in MOVEMENT:
        check_movement(work, node, copy)
