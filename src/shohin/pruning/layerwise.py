"""Recovery without training: every layer of a cut model is refitted, in order, to what the original layer gave.

One pass over the original keeps a bounded random sample of each layer's output; one pass over the cut program solves each
layer by ridge least squares on its *actual* input, so later layers also correct what earlier ones left (ThiNet, Luo et al.
2017; He et al. 2017). Rows that the model's outputs do not depend on (padding that a mask hides) are left out: they would
outweigh the others. Batch normalization statistics can be taken anew in the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call
from shohin.errors import DataError
from shohin.evidence.reach import picked
from shohin.evidence.rows import Window, conv_rows
from shohin.graph import Graph
from shohin.graph.labels.core import Labels
from shohin.graph.units import kept_indices
from shohin.plan import Plan
from shohin.program import Program, family, interpret, joined_inputs
from shohin.program.nodes import argument
from shohin.pruning.reconstruct import RIDGES, fitted
from shohin.surgery import Rewritten

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
#: most bytes of activations that are alive at once
MEMORY = 1 << 30
#: rows of a layer for each of its inputs, and the fewest: more change little
ROWS_EACH, FEWEST = 16, 2048


def refit(
    graph: Graph,
    plan: Plan,
    rewritten: Rewritten,
    tensors: Mapping[str, Tensor],
    calls: Sequence[Call],
    *,
    weights: bool = True,
    statistics: bool = True,
    rows: int = 16384,
    samples: int = 1024,
    ridges: Sequence[float] = RIDGES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """New values of the cut program's tensors.

    Args:
        graph, plan, rewritten: of the cut.
        tensors: values of the cut program, by name.
        calls: calibration batches.
        weights: refit convolutions and linear layers by least squares.
        statistics: take batch normalization statistics anew.
        rows: most sampled outputs of each layer, fewer where it has few inputs. Memory: these, of all layers, and one layer's second moments.
        samples: most that go through the cut program as one batch, the first of ``calls``: fewer where their activations would
            take more than `MEMORY`.
        ridges: see `shohin.pruning.reconstruct.fitted`.

    Raises:
        DataError: if there is no calibration data or an activation is NaN.
    """
    if not calls:
        raise DataError("compensation needs calibration batches: give Data(train=loader)")
    program = graph.program
    joined = joined_inputs(program, calls, max(2, min(samples, MEMORY // max(graph.memory().peak_bytes, 1))))
    layers = _layers(program, rewritten.graph) if weights else {}
    limits = {node: min(rows, max(FEWEST, ROWS_EACH * tensors[weight][0].numel())) for node, (weight, _) in layers.items()}
    places = picked(program, joined, {node: axis for node, (_, axis) in layers.items()}, limits, seed)
    wanted = _teacher_rows(graph, plan, joined, places)
    new = {name: t.detach().clone() for name, t in tensors.items()}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in wanted:
            return _solve(program, node, args, new, wanted.pop(node.name), places[node.name], ridges)
        if statistics and family(node) == "batch_norm" and node.args[5] is False:
            mean_name, var_name = (program.names[a.name] for a in node.args[3:5] if isinstance(a, fx.Node))
            x = args[0]
            others = [d for d in range(x.dim()) if d != 1]
            new[mean_name] = x.double().mean(others).to(x.dtype)
            new[var_name] = x.double().var(others).to(x.dtype)
            return torch.nn.functional.batch_norm(x, new[mean_name], new[var_name], args[1], args[2], False, 0.0, args[7])
        return value

    with torch.no_grad():
        interpret(program, rewritten.graph, new, joined, visit)
    return new


def _layers(program: Program, graph: fx.Graph) -> dict[str, tuple[str, int]]:
    """Layer that can be refitted -> (its weight, which it alone reads, axis of its outputs): convolutions and linear layers."""
    found = {}
    for node in graph.nodes:
        if node.op != "call_function" or family(node) not in (*CONVOLUTIONS, "linear"):
            continue
        weight = node.args[1]
        if isinstance(weight, fx.Node) and weight.name in program.names and len(weight.users) == 1:
            found[node.name] = program.names[weight.name], 1 if family(node) in CONVOLUTIONS else -1
    return found


def _teacher_rows(graph: Graph, plan: Plan, joined: tuple[Any, ...], places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> its outputs in the original, of the picked rows and the units that stay."""
    gone = graph.gone(plan)
    found: dict[str, Tensor] = {}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        labels = graph.labels.get(node.name)
        if node.name in places and isinstance(labels, Labels) and len(places[node.name]):
            axis = 1 if family(node) in CONVOLUTIONS else value.dim() - 1
            kept = (kept_indices(labels.planes, gone) or {}).get(axis)
            flat = value.movedim(axis, -1).reshape(-1, value.shape[axis])[places[node.name]]
            found[node.name] = flat if kept is None else flat[:, torch.from_numpy(kept)]
        return value

    if places:
        with torch.no_grad():
            interpret(graph.program, graph.program.graph, graph.program.tensors, joined, visit)
    return found


def _solve(
    program: Program,
    node: fx.Node,
    args: tuple[Any, ...],
    new: dict[str, Tensor],
    wanted: Tensor,
    rows: Tensor,
    ridges: Sequence[float],
) -> Tensor:
    x, weight = args[0], args[1]
    bias_node = argument(node, 2)
    groups = 1
    if family(node) in CONVOLUTIONS:
        stride, padding, dilation = (argument(node, i, d) for i, d in ((3, 1), (4, 0), (5, 1)))
        groups = argument(node, 6, 1)
        x_rows, _ = conv_rows(x, Window(tuple(weight.shape[2:]), stride, padding, dilation), at=rows)
    else:
        x_rows = x.reshape(-1, x.shape[-1])[rows]
    follows = [family(u) for u in node.users if u.op == "call_function"]
    fits_bias = isinstance(bias_node, fx.Node) or follows == ["batch_norm"]  # a norm takes the mean out
    found, bias = fitted(x_rows, wanted, weight, bias=fits_bias, groups=groups, ridges=ridges)
    name = program.names[node.args[1].name]  # type: ignore[union-attr, index]
    new[name] = found
    own = None
    if isinstance(bias_node, fx.Node) and bias is not None:
        own = new[program.names[bias_node.name]] = bias
    result: Tensor = node.target(x, found, own, *args[3:], **node.kwargs)  # type: ignore[operator]
    return result
