"""What a user may do wrong with `shohin.distill` is said in words; what only looks odd works."""

import pytest
import torch
from torch import nn

import shohin
from shohin.errors import DataError, ModelError, ShohinError

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 4, generator=G), torch.randint(0, 3, (64,), generator=G)


def net(classes: int = 3, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes))


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "gave no batch"),
        ([(X[:0], Y[:0])], "first dimension of all its batches is 0"),
        ([(X, Y + 1)], "labels from 1 to 3 do not fit 3 classes"),
        ([(X, Y), (X * torch.nan, Y)], "NaN"),
    ],
)
def test_batches_that_teach_nothing(batches: list[object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        shohin.distill(net(), net(width=16), shohin.Data(train=batches), epochs=1)


@pytest.mark.parametrize("teacher", ["teacher", ["teacher"], [net(), None], 3.0, []])
def test_a_teacher_is_a_module(teacher: object) -> None:
    with pytest.raises(ShohinError, match="teacher"):
        shohin.distill(net(), teacher, shohin.Data(train=[(X, Y)]), epochs=1)  # type: ignore[arg-type]


def test_other_classes() -> None:
    with pytest.raises((DataError, ModelError), match=r"3 classes .* in the student and 5 in the teacher"):
        shohin.distill(net(3), net(5, 16), shohin.Data(train=[(X, Y)]), epochs=1)


@pytest.mark.parametrize("losses", [("kd",), ("kd", "features")])
def test_constant_batches_are_survived(losses: tuple[str, ...]) -> None:
    data = shohin.Data(train=[(torch.ones(32, 4), torch.zeros(32, dtype=torch.long))])
    found = shohin.distill(net(), net(width=16), data, losses, epochs=1)
    assert all(bool(t.isfinite().all()) for t in found.model.state_dict().values())


def test_features_of_double_models() -> None:
    data = shohin.Data(train=[(X.double(), Y)])
    found = shohin.distill(net().double(), net(width=16).double(), data, ("kd", "features"), epochs=1)
    assert next(found.model.parameters()).dtype == torch.float64
