"""docs/pruning.md: its code runs, in its order, and its tables name what there is."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from pages import DOCS, Block, blocks
from shohin.pipeline.units import ALLOCATIONS
from shohin.pruning import schedules, sparse
from shohin.pruning.criteria import CRITERIA
from shohin.pruning.criteria.blocks import BLOCK_CRITERIA
from shohin.pruning.normalization import WAYS
from shohin.verbs.pruning import RECOVERIES, UNITS

PAGE = "pruning.md"


class Layer(nn.Module):
    """Attention of four heads and a feed-forward layer, each beside a shortcut."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tiny(nn.Module):
    """``[N, 1, 8, 8]`` to ``[N, 3]``: patches, two layers, a class."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, 4)
        self.layers = nn.Sequential(Layer(16, 32), Layer(16, 32))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patches(x).flatten(2).transpose(1, 2))).mean(1))  # type: ignore[no-any-return]


def of_budget(block: Block) -> bool:
    """True for blocks that measure whole runs: minutes."""
    return "budget=" in block.text


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's code leaves behind."""
    torch.manual_seed(0)
    loader = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(4)]
    names: dict[str, Any] = {
        "shohin": shohin,
        "torch": torch,
        "cross_entropy": F.cross_entropy,
        "model": Tiny().eval(),
        "loader": loader,
        "data": shohin.Data(train=loader, validation=loader),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs"))
        for block in blocks(PAGE):
            if not of_budget(block):
                block.run(names)
    return names


def test_the_code_runs_and_does_what_the_page_says(ran: dict[str, Any]) -> None:
    assert ran["first"].notes["left"] <= 0.7 and ran["both"].widths and not ran["first"].plan.is_identity
    shapes = {n: p.shape for n, p in ran["second"].model.named_parameters()}
    assert {n: p.shape for n, p in ran["same"].named_parameters()} == shapes
    assert ran["whole"].widths and ran["whole"].sparsity and ran["whole"].formats
    assert sparse.masks_of(ran["small"].model, ran["sparse"].plan)


def test_calls_with_a_budget_have_arguments_that_exist() -> None:
    (block,) = [b for b in blocks(PAGE) if of_budget(b)]
    calls = [n for n in ast.walk(ast.parse(block.text)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "shohin.prune"]
    for call in calls:
        inspect.signature(shohin.prune).bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})
        (budget,) = [ast.literal_eval(k.value) for k in call.keywords if k.arg == "budget"]
        assert shohin.Budget.parse(budget).limits
    assert calls


NAMES = {
    "criteria": (*CRITERIA, *BLOCK_CRITERIA, *sparse.CRITERIA),
    "granularities": UNITS,
    "allocations": (*ALLOCATIONS, *sparse.ALLOCATIONS),
    "normalizations": tuple(name for name in WAYS if name != "global"),
    "recoveries": tuple(name for name in RECOVERIES if name not in (None, "auto")),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_choice_is_named(kind: str) -> None:
    text = (DOCS / PAGE).read_text("utf-8")
    assert [name for name in NAMES[kind] if f'`"{name}"`' not in text] == []


def test_every_schedule_is_named_and_files_that_are_named_exist() -> None:
    text = (DOCS / PAGE).read_text("utf-8")
    trained = [n for n in schedules.__all__ if n.islower() and "objective" in inspect.signature(getattr(schedules, n)).parameters]
    assert len(trained) > 6 and [n for n in trained if f"`{n}`" not in text] == []
    named = re.findall(r"`python ([\w/]+\.py)", text)
    assert named and [f for f in named if not (Path(__file__).parents[1] / f).is_file()] == []
