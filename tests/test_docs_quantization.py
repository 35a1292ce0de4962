"""docs/quantization.md: its code runs, in its order, and its tables name what there is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shohin
from pages import DOCS, blocks
from shohin.evidence.calibration import METHODS
from shohin.formats import BLOCK_FORMATS, FLOAT_FORMATS
from shohin.quantization import ROUNDINGS
from shohin.quantization.aware import LEARNS
from shohin.quantization.rounding import __all__ as roundings
from shohin.quantization.sensitivity import MEASURES

PAGE = "quantization.md"


class Tiny(nn.Module):
    """``[N, 1, 8, 8]`` to ``[N, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 4, 4)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head((tokens + self.layers(tokens)).mean(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the page's code leaves behind; its files lie in a folder of their own."""
    torch.manual_seed(0)
    loader = [torch.randn(8, 1, 8, 8) for _ in range(4)]
    names: dict[str, Any] = {"shohin": shohin, "torch": torch, "model": Tiny().eval(), "data": shohin.Data(train=loader)}
    names["pairs"] = [(x, names["model"](x).argmax(1)) for x in loader]
    with contextlib.chdir(tmp_path_factory.mktemp("page")):
        for block in blocks(PAGE):
            block.run(names)
        yield names


def test_the_code_runs_and_does_what_the_page_says(ran: dict[str, Any]) -> None:
    assert set(ran["found"].plan.formats.values()) == {"int8"} and ran["found"].view is not None
    assert not any(address.startswith("head") for address in ran["mixed"].plan.formats)
    assert ran["kept"].notes["quality"]["kept"] >= 0.99 * ran["kept"].notes["quality"]["float"]
    assert ran["planned"].notes["met"] in (True, False) and ran["planned"].metrics.size_bytes is not None
    assert set(ran["trained"].plan.formats.values()) == {"w4a4", "int8"} and ran["trained"].notes["learn"] == "lsq"
    formats = ran["both"].plan.formats
    assert {a: f for a, f in formats.items() if f != "int8"} == dict.fromkeys(
        ("layers.0/linear.0", "layers.2/linear.0"), "weights uint4 group 16"
    )


def test_every_choice_is_named() -> None:
    text = (DOCS / PAGE).read_text("utf-8")
    assert [name for name in (*METHODS, *ROUNDINGS, *LEARNS, *MEASURES, *FLOAT_FORMATS, *BLOCK_FORMATS) if f'`"{name}"`' not in text] == []
    assert roundings
