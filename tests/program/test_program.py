"""The captured program equals the model, in both modes; integers remember their source; in-place operators are gone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small_models as models
from shohin.program import Place, ProgramModule, Source, capture, interpret
from shohin.program.provenance import Tagged
from surgery_cases import CASES
from surgery_checks import answers, close


@pytest.mark.parametrize("name", ["resnet", "tied", "keywords", "vit sdpa", "grouped query", "windowed", "recurrent"])
def test_a_program_equals_its_model(name: str) -> None:
    case = CASES[name]
    model = case.model()
    module = ProgramModule(capture(model, case.call(1, 0)))
    assert set(module.state_dict()) >= {n for n, _ in model.named_parameters(remove_duplicate=False)}
    for batch in (1, 2, 5):
        close(answers(module, case.call(batch, 1)), answers(model, case.call(batch, 1)), name)


def test_interpretation_equals_the_model_and_visits_everything() -> None:
    case = CASES["resnet"]
    model = case.model()
    program = capture(model, case.call(1, 0))
    call, seen = case.call(3, 2), []

    def visit(node, value, args):  # type: ignore[no-untyped-def]
        seen.append(node.name)
        return value

    (out,) = interpret(program, program.graph, program.tensors, call.args, visit)
    close([out], [model(*call.args)], "interpret")
    assert seen == [n.name for n in program.graph.nodes if n.op == "call_function"]
    assert set(program.origins) == set(seen)


def test_no_operator_of_a_program_is_in_place() -> None:
    program = capture(CASES["resnet"].model(), CASES["resnet"].call(1, 0))
    assert not [
        n for n in program.graph.nodes if n.op == "call_function" and getattr(n.target, "_schema", None) and n.target._schema.is_mutable
    ]


class Sized(nn.Module):
    """Two attributes of equal value; one of them only through a product and a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim, self.half = 4, 4, 8
        self.a = nn.Linear(3, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(x.shape[0], self.heads, self.dim)
        x = x.transpose(1, 2).reshape(x.shape[0], self.heads * self.dim)
        return x.view(x.shape[0], self.half // 2, -1)


def test_sources_are_attributes_not_values() -> None:
    program = capture(Sized(), (torch.randn(2, 3),))
    found = {(k[0], k[1]): str(v) for k, v in program.sources.items()}
    views = [n for n, _ in found if n.startswith("view")]
    texts = sorted(found.values())
    assert views and texts == sorted(["heads", "dim", "heads * dim", "half"])


def test_sources_solve_for_one_unknown() -> None:
    a, b = Place("", "a"), Place("m", "b", 1)
    product = Source(((a, 4), (b, 6)), multiply=2, divide=3)
    assert product.solve(8, {a: 4}) == (b, 3)
    assert product.solve(16, {a: 4, b: 6}) is True
    assert product.solve(15, {a: 4, b: 6}) is False
    assert product.solve(7, {a: 4}) is False
    assert product.solve(8, {}) is False
    assert str(b) == "m.b[1]"


@pytest.mark.parametrize("other", [3, 4, 2.5])
def test_tagged_ints_count_like_ints(other: float) -> None:
    tagged = Tagged(12, Source(((Place("", "n"), 12),)))
    assert (tagged + other, other + tagged, tagged - other, other - tagged) == (12 + other, other + 12, 12 - other, other - 12)
    assert (tagged * other, other * tagged, tagged / other, other / tagged) == (12 * other, other * 12, 12 / other, other / 12)
    assert (tagged // other, other // tagged, tagged % other, other % tagged) == (12 // other, other // 12, 12 % other, other % 12)
    assert tagged == 12 and tagged != other and tagged > other and hash(tagged) == hash(12) and {tagged: 1}[12] == 1
    assert type(copy.deepcopy(tagged)) is Tagged and type(tagged + 1) is int


class Symbolic(nn.Module):
    """Attributes meet symbolic sizes in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.a = 2, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        size = (b * self.n) // self.n + self.n - self.n
        if self.n != b and self.n < b + self.n:
            x = x * 1.0
        return self.a(x).view(size, -1, 4) + (self.n + b - b) + b % self.n + (self.n - b) + self.n / self.n


def test_attributes_meet_symbolic_sizes() -> None:
    model = Symbolic()
    module = ProgramModule(capture(model, (torch.randn(4, 4),)))
    x = torch.randn(6, 4)
    assert torch.allclose(module(x), model(x))


class InPlace(nn.Module):
    """Mutations that a later reader must see."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        kept = y * 2
        y.relu_().add_(1).mul_(y)
        return kept + y, F.dropout(y, 0.0, inplace=True)


def test_in_place_operators_keep_their_meaning() -> None:
    model = models.lively(InPlace())
    module = ProgramModule(capture(model, (torch.randn(2, 4).double(),)))
    x = torch.randn(3, 4).double()
    close(list(module(x)), list(model(x)), "in place")


class Overlapping(nn.Module):
    """A view is changed, its base is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.view(-1).add_(1)
        return y


def test_a_mutated_view_whose_base_is_read_keeps_its_meaning() -> None:
    model = Overlapping()
    module, x = ProgramModule(capture(model, (torch.randn(2, 4),))), torch.randn(3, 4)
    assert torch.equal(module(x), model(x))


def test_hooks_and_static_batches_are_remarked() -> None:
    model = models.Gated()
    model.b.register_forward_hook(lambda *_: None)
    assert any("hook" in r for r in capture(model, (torch.randn(1, 6),)).remarks)

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1) * 2

    program = capture(Fixed(), (torch.randn(2, 3, 3),))
    assert program.batch == 2


def test_capture_leaves_the_model_alone() -> None:
    model = CASES["resnet"].model().train()
    before = copy.deepcopy(model.state_dict())
    capture(model, CASES["resnet"].call(1, 0))
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert type(model.conv.stride[0]) is int and type(model.bn.num_features) is int
