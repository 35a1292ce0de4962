"""Names and order of groups, regions and addresses are stable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shohin.graph import Graph
from shohin.surgery import understand
from surgery_cases import CASES

SOME = ["resnet", "vit fused", "grouped query", "chunks", "densenet", "shuffle"]


def portrait(graph: Graph) -> list[object]:
    groups = [(g.name, g.size, g.parameters, {n: {a: i.tolist() for a, i in x.items()} for n, x in g.slices.items()}) for g in graph.groups]
    return [groups, [r.name for r in graph.regions], [c.address for c in graph.costs], list(graph.frozen), graph.sites]


@pytest.mark.parametrize("name", SOME)
def test_two_captures_agree(name: str) -> None:
    case = CASES[name]
    first, second = (understand(case.model(), case.call(batch, 0)) for batch in (1, 3))
    assert portrait(first) == portrait(second)
    assert first.program.fingerprint == second.program.fingerprint


class Pair(nn.Module):
    """A model and an unrelated module beside it, whose name may change."""

    def __init__(self, main: nn.Module, name: str, first: bool) -> None:
        super().__init__()
        for key in (name, "main") if first else ("main", name):
            self.add_module(key, main if key == "main" else nn.Linear(3, 3))
        self.other = name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.main(x), self.get_submodule(self.other)(x.flatten(1)[:, :3])


@pytest.mark.parametrize("name", SOME)
def test_renaming_an_unrelated_module_changes_nothing(name: str) -> None:
    case = CASES[name]
    seen = []
    for other, first in (("aaa", True), ("zzz", True), ("zzz", False)):
        torch.manual_seed(0)
        graph = understand(Pair(case.model(), other, first).double(), case.call(1, 0))
        mine = portrait(graph)
        mine[0] = [g for g in mine[0] if g[0].startswith("main")]
        mine[1] = [r for r in mine[1] if r.startswith("main")]
        mine[2] = [a for a in mine[2] if a.startswith("main")]
        seen.append(mine[:3])
    assert seen[0] == seen[1] == seen[2]
