"""Which rows of a layer's output reach the model's outputs: padding that a mask hides does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from shohin.program import Program, interpret
from shohin.program.execute import apart
from shohin.program.inputs import samples

#: samples of one backward pass, and after how many that use every row the others are taken to do so too
CHUNK, ENOUGH = 8, 64


def picked(
    program: Program, joined: tuple[Any, ...], layers: Mapping[str, int], limits: Mapping[str, int], seed: int = 0
) -> dict[str, Tensor]:
    """Layer -> at most so many random rows of its output that are `reached`, as ascending indices."""
    return {name: _drawn(mask.nonzero()[:, 0], limits[name], name, seed) for name, mask in reached(program, joined, layers, seed).items()}


def _drawn(rows: Tensor, limit: int, name: str, seed: int) -> Tensor:
    if len(rows) <= limit:
        return rows
    generator = torch.Generator().manual_seed(seed * 1000003 + sum(ord(c) * (i + 1) for i, c in enumerate(name)))
    return rows[torch.randperm(len(rows), generator=generator)[:limit]].sort().values


def reached(program: Program, joined: tuple[Any, ...], layers: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Layer -> boolean for each row of its output: a random combination of the model's outputs has a gradient there.

    Where the first `ENOUGH` samples use every row the others are taken to do so too.

    Args:
        joined: inputs of the program, all samples in one batch.
        layers: node name -> axis of its output's features; all others are rows.
    """
    if not layers:
        return {}
    batch = next((x.shape[0] for x in joined if isinstance(x, Tensor) and x.dim()), 1)
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    nodes = {node.name: node for node in program.graph.nodes}
    alike = {name for name in layers if not any(isinstance(d, torch.SymInt) for d in nodes[name].meta["val"].shape)}  # for any batch
    each = CHUNK if batch > CHUNK and apart(program, joined, batch) else batch
    for start in range(0, batch, each):
        for name, rows in _rows(program, samples(joined, batch, start, start + each), layers, seed).items():
            parts[name].append(rows)
        known = min(start + each, batch)
        if ENOUGH <= known < batch and known - each < ENOUGH and all(bool(rows.all()) for found in parts.values() for rows in found):
            return {name: _joined(rows, name in alike, batch, known) for name, rows in parts.items() if rows}
    return {name: _joined(rows, name in alike) for name, rows in parts.items() if rows}


def _joined(parts: list[Tensor], alike: bool, batch: int = 0, known: int = 0) -> Tensor:
    """Rows of all samples, of which the last ones, if any are left, are as the first; of a layer without samples those of any part."""
    if alike:
        return torch.stack(parts).any(0)
    rows = torch.cat(parts)
    return torch.ones(len(rows) // known * batch, dtype=torch.bool) if known else rows


def _rows(program: Program, inputs: tuple[Any, ...], layers: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    taken: dict[str, Tensor] = {}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in layers:
            taken[node.name] = value = value.detach().requires_grad_() if not value.requires_grad else value
        return value

    tensors = {n: t.detach().clone().requires_grad_(n in program.trainable and t.is_floating_point()) for n, t in program.tensors.items()}
    with torch.enable_grad():
        outputs = interpret(program, program.graph, tensors, inputs, visit)
        generator = torch.Generator().manual_seed(seed)
        total: Any = 0.0
        for out in pytree.tree_leaves(outputs):
            if isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad:
                total = total + (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
        grads = torch.autograd.grad(total, list(taken.values()), allow_unused=True) if isinstance(total, Tensor) else [None] * len(taken)
    return {
        name: _any(torch.zeros_like(taken[name]) if grad is None else grad, layers[name]) for name, grad in zip(taken, grads, strict=True)
    }


def _any(gradient: Tensor, axis: int) -> Tensor:
    last = gradient.movedim(axis, -1)
    return (last.reshape(-1, last.shape[-1]) != 0).any(1)
