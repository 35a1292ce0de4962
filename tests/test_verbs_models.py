"""The verbs on models that cannot be captured as one program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.errors import ModelError, PlanError
from shohin.surgery import Parts


class EarlyExit(nn.Module):
    """Leaves after the first head where that is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.first, self.second = nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3))
        first = self.first(x)
        return first if first.abs().max() > 1e6 else self.second(x)


class Branch(nn.Module):
    """Nothing in it can be cut apart from the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


def test_a_model_with_a_branch_is_understood_and_cut_by_its_sub_modules() -> None:
    torch.manual_seed(0)
    model, x = EarlyExit().eval(), torch.randn(2, 3, 8, 8)
    parts = shohin.understand(model, x)
    assert isinstance(parts, Parts) and parts.sizes == {"body.0.weight": 8, "second.0.weight": 12}
    assert any("branch" in f.reason for f in parts.frozen)
    plan = shohin.Plan(parts.fingerprint, {"body.0.weight": (0, 3, 5), "second.0.weight": (1, 2)})
    small = shohin.cut(model, plan)
    assert type(small) is EarlyExit and small.body[0].weight.shape[0] == 3 and small.second[2].weight.shape == (4, 2)
    model.body[2].weight.data[:, [1, 2, 4, 6, 7]] = 0
    model.second[2].weight.data[:, [0, *range(3, 12)]] = 0
    assert torch.allclose(small(x), model(x), atol=1e-6)
    with pytest.raises(ModelError, match="no program of its own"):
        shohin.view(model, plan)
    with pytest.raises(PlanError, match="another model"):
        shohin.cut(model, shohin.Plan("0" * 32, {}))


def test_a_branch_around_which_nothing_can_be_cut_is_refused() -> None:
    with pytest.raises(ModelError, match=r"x\.sum\(\) > 0"):
        shohin.understand(Branch(), torch.randn(2, 3))
