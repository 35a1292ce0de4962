"""Recovery without training: every layer of a cut model is refitted, in order, to what the original layer gave.

One pass over the original keeps a bounded random sample of each layer's output; one pass over the cut program solves each
layer by ridge least squares on its *actual* input, so later layers also correct what earlier ones left (ThiNet, Luo et al.
2017; He et al. 2017). Batch normalization statistics can be taken anew in the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call
from shohin.errors import DataError
from shohin.evidence.rows import Window, conv_rows
from shohin.graph import Graph
from shohin.graph.labels.core import Labels
from shohin.graph.units import kept_indices
from shohin.plan import Plan
from shohin.program import Program, family, interpret, joined_inputs
from shohin.program.nodes import argument
from shohin.pruning.reconstruct import LeastSquares
from shohin.surgery import Rewritten

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


def refit(
    graph: Graph,
    plan: Plan,
    rewritten: Rewritten,
    tensors: Mapping[str, Tensor],
    calls: Sequence[Call],
    *,
    weights: bool = True,
    statistics: bool = True,
    rows: int = 4096,
    samples: int = 256,
    ridge: float = 1e-3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """New values of the cut program's tensors.

    Args:
        graph, plan, rewritten: of the cut.
        tensors: values of the cut program, by name.
        calls: calibration batches.
        weights: refit convolutions and linear layers by least squares.
        statistics: take batch normalization statistics anew.
        rows: sampled outputs for each layer.
        samples: go through the cut program as one batch: the first ones of ``calls``.
        ridge: towards the sliced weights, as a share of the mean input variance.

    Raises:
        DataError: if there is no calibration data or an activation is NaN.
    """
    if not calls:
        raise DataError("compensation needs calibration batches: give Data(train=loader)")
    program = graph.program
    joined = joined_inputs(program, calls, samples)
    layers = _layers(program, rewritten.graph)
    wanted = _teacher_rows(graph, plan, layers, joined, rows, seed) if weights else {}
    new = {name: t.detach().clone() for name, t in tensors.items()}
    changed: set[str] = set()

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        name = family(node)
        if node.name in wanted:
            return _solve(program, node, args, new, wanted[node.name], rows, ridge, seed)
        if statistics and name == "batch_norm" and node.args[5] is False:
            mean_name, var_name = (program.names[a.name] for a in node.args[3:5] if isinstance(a, fx.Node))
            x = args[0]
            others = [d for d in range(x.dim()) if d != 1]
            changed.add(mean_name)
            new[mean_name] = x.double().mean(others).to(x.dtype)
            new[var_name] = x.double().var(others).to(x.dtype)
            return torch.nn.functional.batch_norm(x, new[mean_name], new[var_name], args[1], args[2], False, 0.0, args[7])
        return value

    with torch.no_grad():
        interpret(program, rewritten.graph, new, joined, visit)
    return new


def _layers(program: Program, graph: fx.Graph) -> set[str]:
    """Layers that can be refitted: weights of the model that one ungrouped convolution or linear layer reads."""
    found = set()
    for node in graph.nodes:
        if node.op != "call_function" or family(node) not in (*CONVOLUTIONS, "linear"):
            continue
        weight = node.args[1]
        if not (isinstance(weight, fx.Node) and weight.name in program.names and len(weight.users) == 1):
            continue
        if family(node) in CONVOLUTIONS and (argument(node, 6, 1) != 1 or isinstance(argument(node, 4, 0), str)):
            continue
        found.add(node.name)
    return found


def _teacher_rows(graph: Graph, plan: Plan, layers: set[str], joined: tuple[Any, ...], rows: int, seed: int) -> dict[str, Tensor]:
    """Layer -> sampled outputs (rows, kept outputs) of the original."""
    gone = graph.gone(plan)
    found: dict[str, Tensor] = {}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        labels = graph.labels.get(node.name)
        if node.name in layers and isinstance(labels, Labels):
            axis = 1 if family(node) in CONVOLUTIONS else value.dim() - 1
            kept = (kept_indices(labels.planes, gone) or {}).get(axis)
            outputs = value.movedim(axis, -1)
            flat = outputs.reshape(-1, outputs.shape[-1])
            chosen = _chosen(len(flat), rows, node.name, seed)
            flat = flat if chosen is None else flat[chosen]
            found[node.name] = flat if kept is None else flat[:, torch.from_numpy(kept)]
        return value

    with torch.no_grad():
        interpret(graph.program, graph.program.graph, graph.program.tensors, joined, visit)
    return found


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1000003 + sum(ord(c) * (i + 1) for i, c in enumerate(name)))


def _chosen(count: int, limit: int, name: str, seed: int) -> Tensor | None:
    if count <= limit:
        return None
    return torch.randperm(count, generator=_generator(name, seed))[:limit].sort().values


def _solve(
    program: Program, node: fx.Node, args: tuple[Any, ...], new: dict[str, Tensor], wanted: Tensor, rows: int, ridge: float, seed: int
) -> Tensor:
    x, weight = args[0], args[1]
    bias_node = argument(node, 2)
    if family(node) in CONVOLUTIONS:
        dims = CONVOLUTIONS[family(node)]
        strides, padding, dilation = (_each(argument(node, i, d), dims) for i, d in ((3, 1), (4, 0), (5, 1)))
        x_rows, _ = conv_rows(x, Window(tuple(weight.shape[2:]), strides, padding, dilation), rows, _generator(node.name, seed))
    else:
        flat = x.reshape(-1, x.shape[-1])
        chosen = _chosen(len(flat), rows, node.name, seed)
        x_rows = flat if chosen is None else flat[chosen]
    system = LeastSquares(x_rows.shape[1], len(weight))
    system.update(x_rows, wanted)
    follows = [family(u) for u in node.users if u.op == "call_function"]
    fitted, bias = system.solve(
        weight, ridge, bias=isinstance(bias_node, fx.Node) or follows == ["batch_norm"]
    )  # a norm takes the mean out
    name = program.names[node.args[1].name]  # type: ignore[union-attr, index]
    new[name] = fitted
    own = None
    if isinstance(bias_node, fx.Node) and bias is not None:
        own = new[program.names[bias_node.name]] = bias
    args = (x, fitted, own, *args[3:])
    result: Tensor = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return result


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
