"""Scores of different groups on one scale, and groups that compete only with their like."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import small_models as models
from shohin.errors import PlanError
from shohin.graph import Graph
from shohin.pruning.criteria import CRITERIA, Inputs
from shohin.pruning.normalization import WAYS, normalize, structure
from shohin.surgery import understand

D = torch.float64


def graph_of(model: nn.Module, *shape: int) -> Graph:
    torch.manual_seed(0)
    return understand(models.lively(model), (torch.randn(2, *shape, dtype=D),))


def transformer(**sizes: int) -> Graph:
    return graph_of(models.ViT("sdpa", layers=2, **sizes), 3, 8, 8)


def test_scales_and_classes_of_each_way() -> None:
    graph = transformer()
    scores = CRITERIA["magnitude"](Inputs(graph))
    for how in WAYS:
        found = normalize(graph, scores, how)
        assert set(found.scores) == set(found.classes) == set(scores)
        for name, values in found.scores.items():
            assert torch.equal(values.argsort(), scores[name].argsort()), how  # the order inside a group never changes
        assert (len(found.members) == 1) == (how in ("global", "mean", "max"))
    assert len(normalize(graph, scores, "none").members) == len(scores)
    assert all(float(s.mean()) == pytest.approx(1) for s in normalize(graph, scores, "mean").scores.values())
    assert all(float(s.max()) == 1 for s in normalize(graph, scores, "max").scores.values())
    assert all(
        torch.equal(normalize(graph, scores, how).scores[n], s) for how in ("none", "global", "isomorphic") for n, s in scores.items()
    )


def test_groups_of_equal_structure_compete_whatever_their_names_and_sizes() -> None:
    graph = transformer()
    found = normalize(graph, CRITERIA["magnitude"](Inputs(graph)), "isomorphic")
    members = sorted(sorted(m) for m in found.members.values())
    parts = [["fc1.weight"], ["attn.q.weight"], ["attn.q.weight#2"], ["attn.v.weight"]]
    assert members == sorted([["patch.weight"], *([f"layers.{i}.{p[0]}" for i in (0, 1)] for p in parts)])
    wider = transformer(d=20, heads=2, dim=6, hidden=14)
    for group in graph.groups:
        assert structure(graph, group) == structure(wider, wider.group(group.name))


def test_what_differs_in_structure_does_not_compete() -> None:
    graph = graph_of(models.MobileNet(), 3, 16, 16)
    found = {g.name: structure(graph, g) for g in graph.groups}
    assert found["blocks.0.pw.weight"] == found["blocks.1.pw.weight"]
    assert found["blocks.0.se.fc1.weight"] == found["blocks.1.se.fc1.weight"] == "channel: makes conv2d, reads conv2d"
    assert len({found["stem.weight"], found["blocks.0.pw.weight"], found["blocks.0.se.fc1.weight"], found["blocks.1.pl.weight"]}) == 4
    residual = graph_of(models.ResNet(), 3, 32, 32)
    hidden = {structure(residual, residual.group(f"layers.{i}.conv1.weight")) for i in range(4)}
    assert len(hidden) == 1 and structure(residual, residual.group("conv.weight")) not in hidden


def test_groups_that_score_zero_stay_at_zero() -> None:
    graph = transformer()
    name = graph.groups[0].name
    scores = {name: torch.zeros(graph.groups[0].size, dtype=D)}
    for how in WAYS:
        found = normalize(graph, scores, how)
        assert list(found.scores) == [name] and float(found.scores[name].abs().sum()) == 0


def test_unknown_ways_and_groups_are_refused() -> None:
    graph = transformer()
    with pytest.raises(PlanError, match="isomorphic"):
        normalize(graph, {}, "isomorfic")
    with pytest.raises(PlanError, match=r"does not have; did you mean 'patch.weight'"):
        normalize(graph, {"patch.weigt": torch.zeros(12)}, "mean")
