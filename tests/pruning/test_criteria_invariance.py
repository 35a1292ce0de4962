"""What each criterion must not be moved by, and where it must be zero."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import Data
from shohin.errors import DataError
from shohin.pruning.criteria import CRITERIA, Inputs, Scores
from shohin.surgery import understand

#: all but the one that looks at nothing
LOOKING = sorted(set(CRITERIA) - {"random"})
#: of what is read, not of what is made
AT_THE_READERS = ("wanda", "layer_obs", "obs", "obs_greedy", "taylor", "first_order", "apoz", "obd")


class Net(nn.Module):
    """Convolutions with a residual branch, a depthwise layer and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.dw = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.c, self.f, self.g = nn.Conv2d(6, 8, 1), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x + F.relu(self.b(x))
        x = F.relu(self.c(self.dw(x))).mean((2, 3))
        return self.g(F.relu(self.f(x)))


def task(seed: int = 0) -> tuple[Net, Data, Tensor]:
    torch.manual_seed(seed)
    x, y = torch.randn(24, 3, 6, 6, dtype=torch.float64), torch.randint(0, 4, (24,))
    return Net().double().eval(), Data(train=[(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]), x


def scores(name: str, model: nn.Module, data: Data, x: Tensor) -> Scores:
    calls = list(data.calls("train")) if data.has_batches else []
    return CRITERIA[name](Inputs(understand(model, (x[:2],)), data, calls))


def rescaled(model: Net, made: str, read: str, unit: int, by: float) -> Net:
    """The same function: a hidden unit made larger, and read smaller."""
    model = copy.deepcopy(model)
    layer, reader = getattr(model, made), getattr(model, read)
    with torch.no_grad():
        layer.weight[unit] *= by
        layer.bias[unit] *= by
        reader.weight[:, unit] /= by
    return model


@pytest.mark.parametrize("name", AT_THE_READERS)
def test_rescaling_across_relu_changes_nothing_for_criteria_of_what_is_read(name: str) -> None:
    model, data, x = task(1)
    before = scores(name, model, data, x)
    for made, read, unit, by in (("f", "g", 1, 7.0), ("c", "f", 3, 0.02)):
        after = scores(name, rescaled(model, made, read, unit, by), data, x)
        # layer_obs and wanda take the outputs of a reader as they are: those of f are larger where f makes more
        for group in (f"{made}.weight",) if name in ("wanda", "layer_obs") else before:
            torch.testing.assert_close(after[group], before[group], rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("name", ["magnitude", "magnitude_l1", "geometric_median", "activation", "norm_scale"])
def test_rescaling_across_relu_moves_criteria_of_what_is_made(name: str) -> None:
    model, data, x = task()
    before = scores(name, model, data, x)
    unit = int(before["f.weight"].argmax())
    after = scores(name, rescaled(model, "f", "g", unit, 7.0), data, x)
    assert float(after["f.weight"][unit]) > 1.5 * float(before["f.weight"][unit])


@pytest.mark.parametrize("name", ["wanda", "layer_obs", "obs", "obs_greedy", "taylor", "first_order"])
def test_a_unit_that_nobody_weighs_scores_zero(name: str) -> None:
    model, data, x = task()
    with torch.no_grad():
        model.g.weight[:, 4] = 0
        model.f.weight[:, 2] = 0
    found = scores(name, model, data, x)
    for group, unit in (("f.weight", 4), ("c.weight", 2)):
        others = torch.cat([found[group][:unit], found[group][unit + 1 :]])
        assert float(found[group][unit]) <= 1e-18 and float(others.max()) > 1e-9, (group, found[group])


@pytest.mark.parametrize("name", ["activation", "apoz", "wanda", "layer_obs", "obs", "taylor", "first_order"])
def test_a_dead_unit_scores_zero_though_its_weights_are_large(name: str) -> None:
    model, data, x = task()
    with torch.no_grad():
        model.c.weight[5] *= 9
        model.c.bias[5] = -1e4
    found = scores(name, model, data, x)["c.weight"]
    assert float(found[5]) == 0 and float(found.max()) > 0


def permuted(model: Net, hidden: Tensor, stream: Tensor) -> Net:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (model.a, model.b, model.dw):
            layer.weight.copy_(layer.weight[stream])
            layer.bias.copy_(layer.bias[stream])
        for layer in (model.b, model.c):
            layer.weight.copy_(layer.weight[:, stream])
        model.f.weight.copy_(model.f.weight[hidden])
        model.f.bias.copy_(model.f.bias[hidden])
        model.g.weight.copy_(model.g.weight[:, hidden])
    return model


@pytest.mark.parametrize("name", LOOKING)
def test_permuting_units_permutes_their_scores(name: str) -> None:
    model, data, x = task(2)
    hidden, stream = torch.randperm(10), torch.randperm(6)
    other = permuted(model, hidden, stream)
    torch.testing.assert_close(other(x), model(x))
    before, after = scores(name, model, data, x), scores(name, other, data, x)
    torch.testing.assert_close(after["f.weight"], before["f.weight"][hidden], rtol=1e-7, atol=1e-14)
    torch.testing.assert_close(after["a.weight"], before["a.weight"][stream], rtol=1e-7, atol=1e-14)
    torch.testing.assert_close(after["c.weight"], before["c.weight"], rtol=1e-7, atol=1e-14)


def test_first_order_is_the_derivative_of_the_loss_along_removal() -> None:
    """Measured by scaling what reads a unit, past a depthwise layer too, which must not count twice."""
    model, data, x = task(3)
    calls = list(data.calls("train"))
    found = scores("first_order", model, data, x)

    def loss(step: float, unit: int) -> list[float]:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.b.weight[:, unit] *= 1 - step
            changed.c.weight[:, unit] *= 1 - step
            return [float(data.batch_loss(changed(*c.args), c)) for c in calls]

    for unit in range(6):
        slopes = [(up - down) / 2e-6 for up, down in zip(loss(1e-6, unit), loss(-1e-6, unit), strict=True)]
        expected = sum(map(abs, slopes)) / len(slopes)
        assert float(found["a.weight"][unit]) == pytest.approx(expected, rel=1e-5)


def test_first_order_needs_the_loss_of_the_task() -> None:
    model, _, x = task()
    unlabelled = Data(train=[x])
    with pytest.raises(DataError, match="no loss"):
        scores("first_order", model, unlabelled, x)
    assert all(bool((s > 0).any()) for s in scores("obs", model, unlabelled, x).values())


def test_magnitudes_are_norms_of_the_producing_slices() -> None:
    model, data, x = task()
    squared, absolute = scores("magnitude", model, data, x), scores("magnitude_l1", model, data, x)
    both = [model.a.weight.detach().flatten(1), model.b.weight.detach().flatten(1)]
    torch.testing.assert_close(squared["a.weight"], sum(w.square().sum(1) for w in both))
    torch.testing.assert_close(absolute["a.weight"], sum(w.abs().sum(1) for w in both))
    torch.testing.assert_close(squared["f.weight"], model.f.weight.detach().square().sum(1))


def test_the_geometric_median_finds_what_others_can_stand_in_for() -> None:
    model, data, x = task()
    with torch.no_grad():
        model.f.weight[3] = model.f.weight.mean(0)
        model.f.weight[7] *= 10
    found = scores("geometric_median", model, data, x)["f.weight"]
    w = model.f.weight.detach()
    torch.testing.assert_close(found, torch.stack([(w - row).norm(dim=1).sum() for row in w]))
    assert int(found.argmin()) == 3 and int(found.argmax()) == 7


def test_scales_of_batch_normalization_and_what_stands_for_them_elsewhere() -> None:
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 1)).double().eval()
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -3.0, 0.0, 0.5, 2.0]))
    found = scores(
        "norm_scale", model, Data(example=(torch.randn(2, 2, 8, dtype=torch.float64),)), torch.randn(2, 2, 8, dtype=torch.float64)
    )
    assert found["0.weight"].tolist() == [1, 3, 0, 0.5, 2]
    torch.testing.assert_close(found["3.weight"], model[3].weight.detach().flatten(1).norm(dim=1))
