"""The text of a profile: complete, in 100 columns, for short and for long names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shohin.graph import Graph, understand_program
from shohin.graph.describe import layer_details
from shohin.graph.memory import memory
from shohin.program import capture
from shohin.report.profile_text import folded, profile_text
from shohin.verbs import Profile


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand, self.reduce = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 3, padding=1, groups=1)
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.reduce(self.expand(x).relu()))


class Net(nn.Module):
    def __init__(self, name: str = "body") -> None:
        super().__init__()
        self.name, self.stem, self.head = name, nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 4)
        self.add_module(name, Block(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sort(getattr(self, self.name)(self.stem(x)).mean((2, 3)), dim=-1).values
        return self.head(x)


def profile_of(model: nn.Module, x: Tensor) -> Profile:
    """A profile whose milliseconds are made up: nothing is measured here."""
    graph: Graph = understand_program(capture(model.eval(), (x,)))
    details = layer_details(graph)
    rows = []
    for i, op in enumerate(graph.costs):
        macs, _, weights = op.amounts(graph.sizes)
        row = {"address": op.address, "kind": op.kind, "macs": macs, "params": weights, "bytes": 4 * weights, "ms_before": i / 1000}
        rows.append({**row, **details[op.address]})
    return Profile(rows, 1.5, 0.03, 0.01, graph, {}, memory(graph))


def test_everything_is_in_the_text() -> None:
    found = profile_of(Net(), torch.randn(2, 3, 9, 9))
    text = str(found)
    assert text == profile_text(found)
    for word in ("operation", "output", "MACs", "params", "moved", "MAC/byte", "ms", "Unit groups", "Regions", "Frozen"):
        assert word in text
    assert "total 1.50 ms measured" in text and "B×8×4×4" in text and "conv3x3" in text
    for row in found.rows:
        assert row["address"] in text
    for group in found.graph.groups:
        line = next(line for line in text.splitlines() if line.split()[:1] == [group.name] and str(group.size) in line.split())
        assert ("yes" in line.split()) == group.normalized
    for region in found.graph.regions:
        assert region.name in text
    flat = " ".join(text.split())
    assert "does not follow prunable axes here" in flat and "test_profile_text.py" in flat  # the reason, and the line
    assert found.memory is not None and found.memory.address in text


@pytest.mark.parametrize("name", ["b", "a_name_that_is_long_enough_to_need_more_than_one_line_of_the_table_" * 2])
def test_no_line_is_longer_than_100_columns(name: str) -> None:
    text = profile_text(profile_of(Net(name), torch.randn(2, 3, 9, 9)))
    assert max(map(len, text.splitlines())) <= 100
    assert name in "".join(text.split())  # folded, not cut off


def test_details_of_layers_are_their_shapes_bytes_and_intensity() -> None:
    found = {r["address"]: r for r in profile_of(Net(), torch.randn(2, 3, 9, 9)).rows}
    stem = found["stem/conv2d.0"]
    assert stem["inputs"] == ["B×3×9×9"] and stem["output"] == "B×8×4×4"
    assert stem["moved"] == 4 * (3 * 81 + 8 * 16 + 8 * 27 + 8)
    assert stem["intensity"] == pytest.approx(8 * 16 * 27 / stem["moved"])


@pytest.mark.parametrize("name", ["a.b.c/d.0", "x" * 90, "encoder.layers.0.attention/linear.12", ""])
def test_folding_loses_nothing(name: str) -> None:
    lines = folded(name, 12).split("\n")
    assert "".join(line.removeprefix("  ") for line in lines) == name
    assert all(len(line) <= 14 or not any(c in line.strip()[:-1] for c in "./×") for line in lines)
