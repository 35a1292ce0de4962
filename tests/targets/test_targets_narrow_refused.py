"""What a prepared graph cannot follow for sure is refused, and then lowered in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import small_models as models
from shohin.graph import Graph
from shohin.pipeline.ship import lower_for_timing
from shohin.pipeline.timing import group_counts, plan_of, program_of, skipped_nodes
from shohin.planning.choice import Choice
from shohin.program import fold
from shohin.surgery import understand
from shohin.targets import CannotNarrow, Prepared, get_target
from shohin.targets.onnxruntime.session import Runner

torch.set_num_threads(1)


def prepared(make: Callable[[], nn.Module], *shape: int) -> tuple[Graph, Prepared]:
    torch.manual_seed(0)
    x = torch.randn(1, *shape)
    graph = understand(models.lively(make()).float(), (x,))
    made = get_target("onnxruntime").prepare(fold(graph.program).program, (x,))
    assert made is not None
    return graph, made


def halved(graph: Graph) -> dict[str, int]:
    return {name: max(1, size // 2) for name, size in graph.sizes.items()}


def test_what_is_not_certain_is_refused(tmp_path: Path) -> None:
    graph, made = prepared(models.Residual1d, 2, 16)
    plan = plan_of(graph, Choice(halved(graph), frozenset(r.name for r in graph.regions if r.residual)))
    assert plan.skips
    program, skips = fold(program_of(graph, plan)).program, skipped_nodes(graph, plan)
    path = tmp_path / "m.onnx"
    with pytest.raises(CannotNarrow, match=r"more than integers|not the operation"):
        made.variant(program, path)  # the skipped regions are not named
    (name,) = [n for n in program.tensors if n == "fc.weight"]
    whole = dict(program.tensors) | {name: program.tensors[name][:, :-1]}
    with pytest.raises(CannotNarrow):
        made.variant(dataclasses.replace(program, tensors=whole), path, skips=skips)
    other, _ = prepared(models.Flatten, 3, 8, 8)
    with pytest.raises(CannotNarrow, match="not the operation"):
        made.variant(fold(other.program).program, path)
    with pytest.raises(CannotNarrow, match="not a tensor of the exported graph"):
        made.variant(program, path, skips=skips | {"nothing": "nowhere"})
    assert not path.exists()
    made.variant(program, path, skips=skips)
    assert path.exists()


def test_another_graph_than_the_program_is_noticed(tmp_path: Path) -> None:
    """The prepared graph is damaged where no shape tells: only the comparison of values can see it."""
    graph, made = prepared(models.Flatten, 3, 8, 8)
    program = fold(program_of(graph, plan_of(graph, Choice(halved(graph))))).program
    path = tmp_path / "m.onnx"
    made.variant(program, path)
    held = made._optimized  # type: ignore[attr-defined]
    assert len(held) == 1
    for exported in held.values():
        for node in exported.model.graph.node:
            if node.op_type == "Relu":
                node.op_type = "Sigmoid"
    with pytest.raises(CannotNarrow, match="other values than the program"):
        made.variant(program, path)


def test_a_changed_scale_falls_back(tmp_path: Path) -> None:
    """Attention whose head dim shrinks needs its default scale written out, which is more than an integer."""
    torch.manual_seed(0)
    model, x = models.lively(models.ViT("sdpa")).float(), torch.randn(1, 3, 8, 8)
    graph, target = understand(model, (x,)), get_target("onnxruntime")
    made = target.prepare(fold(graph.program).program, (x,))
    least = {name: g.counts[0] for name, g in group_counts(graph, 1).items()}
    program = program_of(graph, plan_of(graph, Choice(least)))
    assert not lower_for_timing(target, program, frozenset(), tmp_path / "m.onnx", (x,), {}, made)
    assert Runner(tmp_path / "m.onnx")(x).shape == model(x).shape
