"""What a proof must see: units that the model's own weights leave dead, tensors put in place of others, branches of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.errors import ModelError, PlanError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.surgery import cut, understand


class Literal(nn.Module):
    """The first six of eight units are summed by a number written in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x).relu()
        return self.o(h) + h[:, :6].sum(1, keepdim=True)


@pytest.mark.parametrize("seed", range(6))
def test_a_literal_width_is_seen_though_the_unit_behind_it_is_dead(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Literal().double().eval(), torch.randn(2, 5).double()
    with torch.no_grad():
        model.i.bias[7] = -2.0
    graph = understand(model, (x,))
    kept = [0, 1, 2, 3, 4, 7]
    result = cut(model, graph, Plan(graph.program.fingerprint, {"i.weight": (0, 1, 2, 3, 4), "i.weight#2": (1,)}))
    x = 3 * torch.randn(500, 5).double()
    h = model.i(x).relu()
    wanted = h[:, kept] @ model.o.weight[:, kept].T + model.o.bias + h[:, :5].sum(1, keepdim=True)
    assert result.form == "program" and torch.allclose(result.model(x), wanted, rtol=1e-10)


def test_tensors_put_in_place_of_others_are_noticed() -> None:
    x = torch.randn(2, 5)

    def fresh_plan(model: nn.Module) -> Plan:
        graph = shohin.understand(model, x)
        assert isinstance(graph, Graph)
        return Plan(graph.program.fingerprint, {"0.weight": (0, 3)})

    def assign(model: nn.Module) -> None:
        model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()}, assign=True)

    def layer(model: nn.Module) -> None:
        model[2] = nn.Linear(8, 3)  # type: ignore[index, operator]

    def wide(model: nn.Module) -> None:
        model.double()

    for change in (assign, layer, wide):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        plan = fresh_plan(model)
        change(model)
        with pytest.raises(ModelError, match="has changed since it was understood"):
            shohin.cut(model, plan)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    plan = fresh_plan(model)
    with torch.no_grad():
        model[0].weight.zero_()
    small = shohin.cut(model, plan)
    assert float(next(small.parameters()).detach().abs().sum()) == 0


class Auxiliary(nn.Module):
    """A head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.c(h + self.aux(h) if self.training else h)


def test_a_class_that_would_fail_in_training_is_not_returned() -> None:
    torch.manual_seed(0)
    model, x = Auxiliary(), torch.randn(2, 5)
    graph = understand(model.eval(), (x,))
    result = cut(model, graph, Plan(graph.program.fingerprint, {"a.weight": (0, 1, 5)}))
    assert result.form == "program" and "in training mode the class fails" in result.reason
    result.model.train()
    assert torch.allclose(result.model(x), cut(model, graph, Plan(graph.program.fingerprint, {"a.weight": (0, 1, 5)})).model.eval()(x))


class Pointing(nn.Module):
    """Indices that point into another input: a small graph network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return self.b(self.a(x).relu()[source])


def test_indices_into_another_input_are_taken_from_the_example() -> None:
    torch.manual_seed(0)
    model = Pointing().double().eval()
    example = (torch.randn(5, 4).double(), torch.tensor([4, 0, 3, 3, 1, 2, 4]))
    graph = understand(model, example)
    result = cut(model, graph, Plan(graph.program.fingerprint, {"a.weight": (1, 4)}))
    hidden = nn.functional.linear(example[0], model.a.weight[[1, 4]], model.a.bias[[1, 4]]).relu()
    wanted = nn.functional.linear(hidden[example[1]], model.b.weight[:, [1, 4]], model.b.bias)
    assert result.form == "module" and result.proof.holds, result.reason
    assert torch.allclose(result.model(*example), wanted)


def test_what_cannot_be_proved_is_not_returned() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h / h.std(-1, keepdim=True))

    torch.manual_seed(0)
    model, x = Spread(), torch.randn(3, 4)
    graph = understand(model, (x,))
    with pytest.raises(ModelError, match="could not be proved"):
        shohin.cut(model, Plan(graph.program.fingerprint, {"a.weight": (2,)}), (x,))


@pytest.mark.parametrize("kept", [4, (0.5, 1.7), "01", [False, True], torch.tensor([True, False])])
def test_kept_units_are_indices(kept: object) -> None:
    with pytest.raises(PlanError, match="kept units are indices"):
        Plan("f", {"a.weight": kept})  # type: ignore[dict-item]


def test_names_that_were_meant() -> None:
    torch.manual_seed(0)
    model, x = Literal(), torch.randn(2, 5)
    graph = understand(model, (x,))
    with pytest.raises(PlanError, match=r"did you mean 'i\.weight'"):
        cut(model, graph, Plan(graph.program.fingerprint, {"i.wieght": (0,)}))
    with pytest.raises(KeyError, match=r"did you mean 'i\.weight'"):
        graph.group("i.wieght")
    with pytest.raises(PlanError, match="sequence of region names"):
        Plan("f", skips="layer1")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"must be a shohin\.Plan, not dict"):
        shohin.cut(model, {"i.weight": (0,)}, (x,))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="not NoneType"):
        shohin.understand(model, None)
