"""Every criterion scores every unit of every kind of network, and says what it needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import small_models as models
from shohin.data import Data
from shohin.errors import DataError
from shohin.pruning.criteria import CRITERIA, Inputs
from shohin.pruning.criteria.inputs import Criterion
from shohin.pruning.criteria.readings import readings
from shohin.pruning.saliency import group_saliency
from shohin.surgery import understand

D = torch.float64
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (models.ResNet, (3, 32, 32)),
    "depthwise": (models.MobileNet, (3, 16, 16)),
    "concatenated": (models.DenseNet, (3, 8, 8)),
    "grouped": (models.Grouped, (3, 8, 8)),
    "transposed": (models.UNet, (3, 8, 8)),
    "called twice": (models.CalledTwice, (3, 4, 4)),
    "shuffled": (models.Shuffle, (3, 4, 4)),
    "recurrent": (models.Recurrent, (2, 8)),
    "heads": (lambda: models.ViT("sdpa"), (3, 8, 8)),
    "fused heads": (lambda: models.ViT("fused"), (3, 8, 8)),
    "grouped heads": (models.GroupedQuery, (5, 6)),
    "normalized stream": (models.ConvNeXt, (3, 8, 8)),
    "plain matrices": (models.Matrix, (4,)),
    "flattened": (models.Flatten, (3, 8, 8)),
}


def inputs_of(model: nn.Module, x: Tensor) -> Inputs:
    with torch.no_grad():
        out = model(x)
    labels = out.argmax(-1) if out.dim() < 4 else out.argmax(1)
    data = Data(train=[(x[:4], labels[:4]), (x[4:], labels[4:])])
    return Inputs(understand(model, (x[:2],)), data, list(data.calls("train")), seed=3)


@pytest.mark.parametrize("name", NETS)
def test_every_unit_of_every_group_gets_a_finite_score(name: str) -> None:
    build, shape = NETS[name]
    torch.manual_seed(1)
    inputs = inputs_of(models.lively(build()), torch.randn(8, *shape, dtype=D))
    assert inputs.graph.groups
    for criterion in CRITERIA.values():
        found = criterion(inputs)
        assert {n: tuple(s.shape) for n, s in found.items()} == {g.name: (g.size,) for g in inputs.graph.groups}, criterion.name
        for group, values in found.items():
            assert values.dtype == D and bool((values >= 0).all()) and bool((values > 0).any()), (criterion.name, group, values)
        again = criterion(inputs)
        assert all(torch.equal(found[n], again[n]) for n in found), criterion.name


class Weighted(nn.Module):
    """A weight that the forward computes, and one that is multiplied from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.rand(6, 1) + 0.5)
        self.left, self.out = nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(nn.functional.linear(x, self.v * self.g)).unsqueeze(2)
        return self.out(torch.relu(self.left @ x).squeeze(2))


def test_computed_weights_count_as_the_forward_computes_them() -> None:
    torch.manual_seed(2)
    model = Weighted().double().eval()
    inputs = inputs_of(model, torch.randn(8, 4, dtype=D))
    computed, left = (model.v * model.g).detach(), model.left.detach()
    found = CRITERIA["magnitude"](inputs)
    assert sorted(tuple(s.shape) for s in found.values()) == [(5,), (6,)]
    for values in found.values():
        torch.testing.assert_close(values, (computed if len(values) == 6 else left).square().sum(1))
    hidden = torch.relu(torch.cat([c.args[0] for c in inputs.calls]) @ computed.T)
    wanda = next(s for s in CRITERIA["wanda"](inputs).values() if len(s) == 6)
    torch.testing.assert_close(wanda, left.abs().sum(0) * hidden.square().mean(0).sqrt())


class Unread(nn.Module):
    """Channels that are summed up: no layer reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + torch.relu(self.a(x)).sum(-1, keepdim=True)


def test_units_that_no_layer_reads_are_judged_where_they_are_made() -> None:
    torch.manual_seed(3)
    inputs = inputs_of(Unread().double().eval(), torch.randn(8, 4, dtype=D))
    assert [r.form for r in readings(inputs.graph)] == ["output"]
    for criterion in CRITERIA.values():
        assert bool((criterion(inputs)["a.weight"] > 0).any()), criterion.name


class Summed(nn.Module):
    """Layers written as Einstein sums, which no criterion takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,io->bo", torch.relu(torch.einsum("bi,io->bo", x, self.a)), self.b)


def test_layers_that_are_not_taken_apart_are_judged_by_what_passes() -> None:
    torch.manual_seed(4)
    inputs = inputs_of(Summed().double().eval(), torch.randn(8, 4, dtype=D))
    assert [(r.form, r.node) for r in readings(inputs.graph)] == [("output", "einsum")]
    for criterion in CRITERIA.values():
        assert all(bool((s > 0).any()) for s in criterion(inputs).values()), criterion.name


def test_the_name_taylor_stays_what_it_was() -> None:
    inputs = inputs_of(models.lively(models.Flatten()), torch.randn(8, 3, 8, 8, dtype=D))
    assert inputs.data is not None
    old = group_saliency(inputs.graph, inputs.data, inputs.calls, seed=3)
    assert all(torch.equal(old[n], s) for n, s in CRITERIA["taylor"](inputs).items())


def test_random_scores_follow_the_seed_and_the_group() -> None:
    inputs = inputs_of(models.lively(models.Gated()), torch.randn(8, 6, dtype=D))
    first, other = CRITERIA["random"](inputs), CRITERIA["random"](Inputs(inputs.graph, seed=4))
    alone = CRITERIA["random"](Inputs(inputs.graph.only(["b.weight"]), seed=3))
    assert not any(torch.equal(first[n], other[n]) for n in first)
    assert torch.equal(alone["b.weight"], first["b.weight"]) and list(alone) == ["b.weight"]


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if c.needs != "weights"])
def test_without_batches_the_error_says_what_to_give(name: str) -> None:
    graph = inputs_of(models.lively(models.Gated()), torch.randn(8, 6, dtype=D)).graph
    with pytest.raises(DataError, match=rf"'{name}' needs batches: give Data\(train=loader\)"):
        CRITERIA[name](Inputs(graph, Data(example=(torch.randn(2, 6),))))


def test_criteria_of_weights_need_no_data_and_progress_is_told() -> None:
    inputs = inputs_of(models.lively(models.Gated()), torch.randn(8, 6, dtype=D))
    assert [n for n, c in CRITERIA.items() if c.needs == "weights" and not c(Inputs(inputs.graph))] == []
    for name, passes in (("wanda", 1), ("obd", 1), ("obs", 2)):
        ticks: list[int] = []
        CRITERIA[name](Inputs(inputs.graph, inputs.data, inputs.calls, tick=lambda ticks=ticks: ticks.append(1)))  # type: ignore[misc]
        assert len(ticks) == passes * len(inputs.calls)


def test_a_model_without_a_choice_has_no_scores() -> None:
    inputs = inputs_of(models.lively(models.Gated()), torch.randn(8, 6, dtype=D))
    none = Inputs(inputs.graph.only([]), inputs.data, inputs.calls)
    assert {n: c(none) for n, c in CRITERIA.items()} == {n: {} for n in CRITERIA}


def test_weights_that_are_not_finite_are_named() -> None:
    model = models.lively(models.Gated())
    inputs = inputs_of(model, torch.randn(8, 6, dtype=D))
    with torch.no_grad():
        model.gate.weight[2, 1] = torch.nan
    with pytest.raises(DataError, match=r"'magnitude' gave NaN or Inf for group 'gate.weight'"):
        CRITERIA["magnitude"](inputs)
    with pytest.raises(DataError, match="NaN"):
        CRITERIA["obs"](inputs)


def test_every_criterion_names_its_paper() -> None:
    assert all(isinstance(c, Criterion) and n == c.name and any(y.isdigit() for y in c.paper) for n, c in CRITERIA.items())
