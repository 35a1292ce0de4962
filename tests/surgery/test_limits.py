"""What is not understood is frozen, named, or refused: never guessed, never a bare exception."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_models as models
from shohin.errors import ModelError, PlanError
from shohin.plan import Plan
from shohin.surgery import cut, understand, view
from surgery_cases import CASES
from surgery_checks import answers, close, understood


def frozen(name: str) -> str:
    return "\n".join(f"{f.address} {f.reason} {f.line}" for f in understood(name)[1].frozen)


def test_unknown_operator_is_frozen_with_its_line() -> None:
    assert "sort" in frozen("unknown operator")
    assert "torch.sort(self.a(x), dim=-1)" in frozen("unknown operator")


def test_data_dependent_branch_names_the_line() -> None:
    with pytest.raises(ModelError, match=r"if x\.sum\(\) > 0"):
        understand(models.Branching(), (torch.randn(1, 6),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_refused_by_name(value: float) -> None:
    model = models.Gated()
    with torch.no_grad():
        model.b.weight[0, 0] = value
    with pytest.raises(ModelError, match=r"b\.weight"):
        understand(model, (torch.randn(1, 6),))


@pytest.mark.parametrize("example", [(), (torch.randn(1, 5),), (torch.randn(1, 6), torch.randn(1)), (None,)])
def test_examples_that_do_not_run(example: tuple[object, ...]) -> None:
    with pytest.raises(ModelError, match="does not run on the example"):
        understand(models.Gated(), example)


def test_no_input_at_all() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return self.w * 2

    with pytest.raises(ModelError, match="holds no tensor"):
        understand(Silent(), ())


def test_a_number_as_input_is_refused() -> None:
    class Powered(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x**n

    with pytest.raises(ModelError, match="not a tensor"):
        understand(Powered(), (torch.randn(2, 3), 2))


def test_in_place_change_of_the_input_is_refused_with_its_line() -> None:
    class Rude(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    with pytest.raises(ModelError, match=r"x\.add_\(1\)"):
        understand(Rude(), (torch.randn(2, 3),))


def test_in_place_change_through_a_view_is_followed() -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y[:, :2].relu_()
            return self.b(y)

    model = models.lively(Sly())
    graph = understand(model, (torch.randn(2, 4).double(),))
    for group in graph.groups:
        assert cut(model, graph, Plan(graph.program.fingerprint, {group.name: (0, 1)})).proof.holds
    x = torch.randn(3, 4).double()
    assert torch.equal(view(graph, Plan(graph.program.fingerprint))(x), model(x))


def test_plans_for_another_model_are_refused() -> None:
    model, graph = understood("gated")
    for plan in (
        Plan("0" * 32, {"b.weight": (0,)}),
        Plan(graph.program.fingerprint, {"nothing.weight": (0,)}),
        Plan(graph.program.fingerprint, {"b.weight": (0, 99)}),
        Plan(graph.program.fingerprint, {}, ("no region",)),
    ):
        for act in (lambda p=plan: cut(model, graph, p), lambda p=plan: view(graph, p)):
            with pytest.raises(PlanError):
                act()


class Counted(nn.Module):
    """Averages over channels by hand, with a count read off the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.b(x / x.shape[-1])


def test_a_class_that_would_change_its_numbers_becomes_a_program() -> None:
    model = models.lively(Counted())
    graph = understand(model, (torch.randn(1, 6).double(),))
    result = cut(model, graph, Plan(graph.program.fingerprint, {"a.weight": (1, 3, 4)}))
    assert result.form == "program" and "does not equal the view" in result.reason
    assert result.proof.holds


class Indexed(nn.Module):
    """Channels picked by an index that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x)[:, which[0]])))


class Bounded(nn.Module):
    """A bound for each channel, made of another layer's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.clamp(self.a(x), min=self.b(x)))


class Shifted(nn.Module):
    """Padding that shifts an axis without changing its size, and pooling over what looks like channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.p, self.q = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(F.pad(self.a(x), (1, -1))), self.q(F.avg_pool2d(self.p(y), 3, 1, 1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x / torch.linalg.vector_norm(x, 2, dim=1, keepdim=True))


class Computed(nn.Module):
    """A bias and a scale that are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.bias, self.scale = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.a.weight, self.bias * 2)
        return self.b(F.layer_norm(x, (8,), 1 + self.scale))


class Whole(nn.Module):
    """A weight that is also used whole: its rows and columns are tied to what becomes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.b = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(torch.relu(self.s(torch.relu(self.a(x))))), x[:, :1] * self.s.weight.square().sum()


class OneOf(nn.Module):
    """One channel that is read alone can never go; the others can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 3, 1), nn.Conv1d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.tanh(x)) + self.c(x[:, :1])


ODD = {
    "indexed": (Indexed, lambda: (torch.randn(2, 6).double(), torch.tensor([[1, 5], [0, 3]]))),
    "bounded": (Bounded, lambda: (torch.randn(2, 6).double(),)),
    "shifted": (Shifted, lambda: (torch.randn(2, 6).double(), torch.randn(2, 2, 5).double())),
    "normed": (Normed, lambda: (torch.randn(2, 2, 5).double(),)),
    "computed": (Computed, lambda: (torch.randn(2, 6).double(),)),
    "whole": (Whole, lambda: (torch.randn(2, 6).double(),)),
    "one of": (OneOf, lambda: (torch.randn(2, 2, 5).double(),)),
}
EXPECTED = {
    "indexed": {"b.weight": 5},
    "bounded": {"a.weight": 8},
    "shifted": {},
    "normed": {"a.weight": 8},
    "computed": {"a.weight": 8},
    "whole": {"a.weight": 8, "s.weight": 7},
    "one of": {"a.weight#2": 7},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_operators(name: str) -> None:
    build, inputs = ODD[name]
    torch.manual_seed(3)
    model = models.lively(build())
    graph = understand(model, inputs())
    assert graph.sizes == EXPECTED[name], graph.frozen
    for kept in ((0, 2, 3), (1,)):
        for group in graph.groups:
            result = cut(model, graph, Plan(graph.program.fingerprint, {group.name: kept}))
            assert result.proof.holds
    if not graph.groups:
        assert len(graph.frozen) > 1


def test_no_case_is_without_groups() -> None:
    assert all(understood(name)[1].groups for name in CASES)


def test_a_removed_channel_that_is_read_alone_is_never_offered() -> None:
    """The oracle of `OneOf`: zero the consuming slice of the unit that the group calls 0, which is channel 1."""
    torch.manual_seed(3)
    model = models.lively(OneOf())
    graph = understand(model, ODD["one of"][1]())
    seen = view(graph, Plan(graph.program.fingerprint, {"a.weight#2": (1, 2, 3, 4, 5, 6)}))
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    from shohin.data import Call

    call = Call(ODD["one of"][1](), {}, None, None)
    close(answers(seen, call), answers(model, call), "one of")


@torch.library.custom_op("shohin_limits::relu", mutates_args=())
def backwards(x: Tensor) -> Tensor:
    """Called like torch's own operator, and another one."""
    return x.flip(-1).clone()


@backwards.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_that_bears_the_name_of_torchs_own_is_not_taken_for_it() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.ops.shohin_limits.relu(self.a(x)))

    graph = understand(Named(), (torch.randn(2, 4),))
    assert not graph.groups and any("shohin_limits" in f.address for f in graph.frozen)
