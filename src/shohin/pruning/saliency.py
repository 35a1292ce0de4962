"""Saliency of unit groups: the expected loss of gating a unit to zero where it is consumed, from one pass with gradients.

For a gate of one on each unit, placed on the inputs of the layers that read it, s = d loss / d gate of one sample. With the
Fisher information as Hessian, removing the unit costs about ``E[s**2] / 2`` (Molchanov et al. 2019, 1906.10771; Theis et
al. 2018, 1801.05787). Targets are drawn from the model's own answers where these are class scores (the true Fisher), so no
labels are needed and a model that fits its training labels perfectly does not look as if nothing mattered; other answers
are taken as means of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from shohin.data import Call, Data, class_axis, first_output
from shohin.errors import DataError
from shohin.evidence.fisher import UnitSaliency, gate_gradients
from shohin.graph import Graph
from shohin.graph.kinds import contraction, static_nodes
from shohin.graph.labels.core import Labels
from shohin.program import call_inputs, family, interpret, restore_outputs

CONSUMERS = frozenset(["conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
PRODUCTS = frozenset(("matmul", "bmm", "scaled_dot_product_attention"))


def group_saliency(
    graph: Graph, data: Data, calls: Sequence[Call], *, seed: int = 0, tick: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """Group name -> float64 tensor (units,): estimated increase of the loss, in the loss's unit, if the unit is removed.

    Args:
        calls: batches; the pass costs one forward and one backward of each.
        seed: of the drawn targets.
        tick: called after each batch (for progress).

    Raises:
        DataError: if there are no batches, or a gradient is NaN or infinite.
    """
    if not calls:
        raise DataError("saliency needs batches: give Data(train=loader)")
    program = graph.program
    readers = _readers(graph)
    totals = {g.name: UnitSaliency({}) for g in graph.groups}
    tensors = {
        name: t.detach().clone().requires_grad_(t.is_floating_point() and name in program.trainable) for name, t in program.tensors.items()
    }
    generator = torch.Generator().manual_seed(seed)
    for call in calls:
        taken: dict[str, Tensor] = {}

        def feed(node: fx.Node, args: tuple[Any, ...], taken: dict[str, Tensor] = taken) -> tuple[Any, ...]:
            if node.name not in readers:
                return args
            x = args[0].view_as(args[0])
            if x.requires_grad:
                x.retain_grad()
                taken[node.name] = x
            return (x, *args[1:])

        with torch.enable_grad():
            outputs = restore_outputs(program, interpret(program, program.graph, tensors, call_inputs(program, call), feed=feed))
            loss = sampled_loss(outputs, call, data, generator)
            loss.backward()  # type: ignore[no-untyped-call]
        for group in graph.groups:
            gates: Tensor | None = None
            for name, x in taken.items():
                rows = readers[name].get(group.name)
                if rows is None or x.grad is None:
                    continue
                axis, owner = rows
                line = gate_gradients(x, x.grad, axis)
                part = torch.zeros(len(line), group.size, dtype=torch.float64).index_add_(1, owner[owner >= 0], line[:, owner >= 0])
                gates = part if gates is None else gates + part
            if gates is not None:
                totals[group.name].update_gates(gates)
        if tick is not None:
            tick()
    return {name: s.taylor() / 2 if s.updates else torch.zeros(graph.sizes[name], dtype=torch.float64) for name, s in totals.items()}


def _readers(graph: Graph) -> dict[str, dict[str, tuple[int, Tensor]]]:
    """Consuming node -> {group: (axis of its first argument, unit that owns each index, or -1)}.

    A group that no layer with weights reads (the dims that queries and keys share) is gated at the product instead. A depthwise
    convolution passes a channel on: a gate there too would count it twice.
    """
    out: dict[str, dict[str, tuple[int, Tensor]]] = {}
    static = static_nodes(graph)
    for families in (CONSUMERS, PRODUCTS):
        done = {group for rows in out.values() for group in rows}
        for node in graph.program.graph.nodes:
            if node.op != "call_function" or family(node) not in families:
                continue
            layer = contraction(node, static)
            if layer is not None and layer.depthwise:
                continue
            source = node.args[0]
            labels = graph.labels.get(source.name) if isinstance(source, fx.Node) else None
            if not isinstance(labels, Labels) or labels.rigid:
                continue
            for group in graph.groups:
                found = None if group.name in done else _owner(labels, group.units, graph.label_count)
                if found is not None:
                    out.setdefault(node.name, {})[group.name] = found
    return out


def _owner(labels: Labels, units: Sequence[np.ndarray], count: int) -> tuple[int, Tensor] | None:
    table = np.full(count, -1)
    for i, classes in enumerate(units):
        table[classes] = i
    for axis in labels.varying:
        line = np.moveaxis(table[labels.plane(axis)], axis, 0).reshape(labels.shape[axis], -1)
        if (line == line[:, :1]).all() and (line[:, 0] >= 0).any():
            return axis, torch.from_numpy(line[:, 0].copy())
    return None


def sampled_loss(outputs: Any, call: Call, data: Data, generator: torch.Generator) -> Tensor:
    """The user's loss; without one, the likelihood of answers drawn from the model's own distribution."""
    if data.loss is not None or getattr(outputs, "loss", None) is not None:
        return data.batch_loss(outputs, call)
    answers = first_output(outputs)
    if (axis := class_axis(outputs, call)) is not None:
        flat = answers.movedim(axis, -1).flatten(0, -2)
        drawn = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator).squeeze(1)
        return F.cross_entropy(flat, drawn)
    noise = torch.randn(answers.shape, generator=generator, dtype=answers.dtype)
    return 0.5 * (answers - answers.detach() - noise).square().sum() / max(len(answers), 1)
