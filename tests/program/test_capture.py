"""What a model may take, return and hold: the program has its structure, its names and its numbers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torch.utils import _pytree as pytree

import small_models as models
from shohin.data import Call
from shohin.errors import DataError
from shohin.plan import Plan
from shohin.program import ProgramModule, call_inputs, capture, structural_copy
from shohin.surgery import cut, understand


@dataclasses.dataclass
class Answer:
    """An output with a part that may be missing."""

    logits: Tensor
    inner: dict[str, Any]
    missing: Tensor | None = None


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Asked(nn.Module):
    """Nested arguments and nested answers; ``mask`` and ``detailed`` may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, pair: Any = None, *, more: Any = None, mask: Tensor | None = None, detailed: bool = True) -> Any:
        y = torch.tanh(self.a(x))
        if pair is not None:
            y = y + pair[0][:, :1] - pair[1]["k"][0]
        if more is not None:
            y = y * more["scale"]
        if mask is not None:
            y = y * mask[:, None]
        y = self.b(y)
        return Answer(y, {"pair": Pair(y, -y), "list": [y * 2, None, 3]}) if detailed else y


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6).double()


def nested(batch: int) -> tuple[Any, dict[str, Tensor]]:
    return (torch.randn(batch, 3).double(), {"k": [torch.randn(batch, 1).double()]}), {"scale": torch.randn(batch, 8).double()}


def same(got: Any, wanted: Any) -> None:
    flat, spec = pytree.tree_flatten(got)
    other, its = pytree.tree_flatten(wanted)
    assert spec == its and type(got) is type(wanted)
    for a, b in zip(flat, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-12) if isinstance(b, Tensor) else a == b


def test_nested_arguments_and_answers() -> None:
    model = models.lively(Asked())
    pair, more = nested(1)
    module = ProgramModule(capture(model, Call((x(1), pair), {"more": more}, None, None)))
    for batch in (1, 2, 4):
        pair, more = nested(batch)
        given = x(batch)
        answer = module(given, pair, more=more)
        assert isinstance(answer, Answer) and isinstance(answer.inner["pair"], Pair) and answer.missing is None
        same(answer, model(given, pair, more=more))


def test_one_call_in_all_its_ways_of_writing() -> None:
    model, given, mask = models.lively(Asked()), x(3), torch.ones(3).double() / 2
    program = capture(model, {"mask": torch.ones(2).double(), "x": x(), "detailed": False})
    module = ProgramModule(program)
    wanted = model(given, mask=mask, detailed=False)
    same(module(x=given, mask=mask, detailed=False), wanted)
    same(module(given, detailed=False, mask=mask), wanted)
    same(module(mask=mask, x=given, pair=None, detailed=False), wanted)
    assert [tuple(t.shape) for t in call_inputs(program, Call((given,), {"detailed": False, "mask": mask}, None, None))[:2]] == [
        (3, 6),
        (3,),
    ]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((x(),), {"mask": torch.ones(2).double(), "detailed": True}),
        ((x(),), {"mask": None, "detailed": False}),
        ((x(),), {"detailed": False}),
        ((x(), (x(), {"k": [x()]})), {"mask": torch.ones(2).double(), "detailed": False}),
    ],
)
def test_other_calls_than_the_captured_one_are_refused(args: Any, kwargs: Any) -> None:
    module = ProgramModule(capture(models.lively(Asked()), {"x": x(), "mask": torch.ones(2).double(), "detailed": False}))
    with pytest.raises(DataError, match="a batch"):
        module(*args, **kwargs)


def test_variable_arguments() -> None:
    class Any_(nn.Module):
        def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
            return sum(xs, torch.zeros(())) * more["by"]

    module = ProgramModule(capture(Any_(), Call((x(1), x(1)), {"by": x(1)}, None, None)))
    a, b, c = x(3), x(3), x(3)
    same(module(a, b, by=c), (a + b) * c)


class Weights(nn.Module):
    """All the ways in which a weight is made of parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        a, b = nn.Linear(6, 8), nn.Linear(8, 3)
        if kind == "old weight_norm":
            a, b = torch.nn.utils.weight_norm(a), torch.nn.utils.weight_norm(b, dim=None)
        elif kind == "weight_norm":
            a = torch.nn.utils.parametrizations.weight_norm(a)
        elif kind == "spectral_norm":
            a = torch.nn.utils.parametrizations.spectral_norm(a)
        elif kind == "old spectral_norm":
            a = torch.nn.utils.spectral_norm(a)
        elif kind == "pruned":
            l1_unstructured(a, "weight", 0.5)
        elif kind == "lora":
            self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2))
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight
        if self.kind == "standardized":
            weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        elif self.kind == "lora":
            weight = weight + self.up @ self.down
        else:
            return self.b(torch.tanh(self.a(x)))
        return self.b(torch.tanh(F.linear(x, weight, self.a.bias)))


KINDS = {
    "old weight_norm": {"a.weight_g", "a.weight_v", "b.weight_g", "b.weight_v"},
    "weight_norm": {"a.parametrizations.weight.original0", "a.parametrizations.weight.original1"},
    "spectral_norm": {"a.parametrizations.weight.original", "a.parametrizations.weight.0._u"},
    "old spectral_norm": {"a.weight_orig", "a.weight_u"},
    "pruned": {"a.weight_orig", "a.weight_mask"},
    "standardized": {"a.weight"},
    "lora": {"a.weight", "up", "down"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_computed_weights_keep_their_parameters(kind: str) -> None:
    torch.manual_seed(0)
    model = Weights(kind).double().eval()
    model(x()).sum().backward()  # after a forward, an attribute may be a tensor that deepcopy refuses
    program = capture(model, (x(1),))
    assert KINDS[kind] <= set(program.tensors) and program.tensors.keys() >= set(model.state_dict())
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(program.tensors[n] is own[n] for n in KINDS[kind])
    module, given = ProgramModule(program), x(3)
    same(module(given), model(given))
    for m in (module, model):
        m.zero_grad()
        m(given).sum().backward()
    if "old" not in kind:  # hooks keep the old graph
        same([p.grad for _, p in sorted(module.named_parameters())], [p.grad for _, p in sorted(model.named_parameters())])
    graph = understand(model, (x(1),))
    for group in graph.groups:
        assert cut(model, graph, Plan(graph.program.fingerprint, {group.name: tuple(range(0, group.size, 2))})).proof.holds


class Holding(nn.Module):
    """Buffers of both kinds, a plain tensor, a frozen and an unused parameter, a shared module, tied weights, made-up constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(2, 2)
        self.again = self.a
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)
        self.register_buffer("shift", torch.randn(6))
        self.register_buffer("hidden", torch.randn(6), persistent=False)
        self.plain, self.cache = torch.randn(6).double(), None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None or self.cache.shape[0] != x.shape[0]:
            self.cache = torch.ones(x.shape[0], 1, dtype=x.dtype) * 0.5
        mask = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=x.dtype) + torch.arange(6, dtype=x.dtype)
        y = self.again(torch.tanh(self.b(self.a(x)))) + self.shift * self.hidden
        return y * mask * self.plain + self.cache


def test_what_a_model_may_hold() -> None:
    model = models.lively(Holding())
    program = capture(model, (x(1),))
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert all(program.tensors[name] is tensor for name, tensor in own.items())
    assert program.tensors["plain"] is model.plain and model.cache is None
    assert {"unused.weight", "b.weight", "again.weight"} <= program.trainable and "hidden" not in program.trainable
    module = ProgramModule(program)
    flags = {n: p.requires_grad for n, p in module.named_parameters(remove_duplicate=False)}
    assert not flags["a.bias"] and flags["a.weight"] and module.a.weight is module.b.weight is module.again.weight
    for batch in (1, 3):
        given = x(batch)
        same(module(given), model(given))


def test_a_model_that_was_run_before_is_captured_alike() -> None:
    model = models.lively(Holding())
    model(x(5))
    program = capture(model, (x(2),))
    given = x(3)
    same(ProgramModule(program)(given), model(given))
    assert not [r for r in program.remarks if "batch" in r]


class Moving(nn.Module):
    """Counts its calls, changes its statistics, and drops at random."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x))
        if self.training:
            self.calls += 1
            y = y + self.calls  # what is read later in the same call is what was changed
        if self.training:  # stochastic depth: each sample keeps the branch with probability 0.75
            keep = torch.empty(x.shape[0], 1, dtype=x.dtype).bernoulli_(0.75)
            keep.div_(0.75)
            y = y + self.b(torch.tanh(y)) * keep
        else:
            y = y + self.b(torch.tanh(y))
        return self.c(self.drop(y))


def test_capture_leaves_mode_buffers_and_random_numbers_alone() -> None:
    model = models.lively(Moving()).train()
    given, before, state = x(4), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for training in (False, True):
        capture(model, (given,), training=training)
    assert all(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_training_program_does_what_training_does() -> None:
    model = models.lively(Moving())
    evaluation, training = capture(model, (x(4),)), capture(model, (x(4),), training=True)
    assert training.training and not evaluation.training
    assert training.tensors.keys() == evaluation.tensors.keys() and training.trainable == evaluation.trainable
    assert any("'calls'" in r for r in training.remarks) and not evaluation.remarks
    own = copy.deepcopy(model).train()
    module = copy.deepcopy(ProgramModule(training))
    assert module.training
    given = x(6)
    torch.manual_seed(3)
    wanted = own(given)
    torch.manual_seed(3)
    same(module(given), wanted)
    same(module.n.running_mean, own.n.running_mean)
    assert float(module.calls) == 0.0 and float(own.calls) == 1.0
    same(ProgramModule(evaluation)(given), model.eval()(given))


@pytest.mark.parametrize("kind", ["old spectral_norm", "spectral_norm", "weight_norm", "standardized"])
def test_computed_weights_in_training(kind: str) -> None:
    torch.manual_seed(0)
    model = Weights(kind).double().train()
    module, given = ProgramModule(capture(model, (x(),), training=True)), x(3)
    same(copy.deepcopy(module)(given), copy.deepcopy(model)(given))


def test_a_training_program_accepts_the_plans_of_its_evaluation_program() -> None:
    from shohin.graph import understand_program
    from shohin.surgery import confirm, view

    model = models.lively(Moving())
    evaluation = capture(model, (x(4),))
    training = capture(model, (x(4),), training=True, evaluation=evaluation)
    assert training.fingerprint == evaluation.fingerprint
    graphs = [confirm(understand_program(p)) for p in (evaluation, training)]
    assert graphs[0].sizes == graphs[1].sizes
    plan = Plan(evaluation.fingerprint, {name: tuple(range(0, size, 2)) for name, size in graphs[0].sizes.items()})
    small = cut(model, graphs[0], plan).model.train()
    seen, given = view(graphs[1], plan), x(6)
    torch.manual_seed(1)
    wanted = small(given)
    torch.manual_seed(1)
    assert torch.allclose(seen(given), wanted, rtol=1e-10)


def test_a_structural_copy_shares_tensors() -> None:
    model = models.lively(Holding())
    model.plain = (model.a.weight * 2).sum(0)
    shared = structural_copy(model)
    assert shared.a.weight is model.a.weight and shared.plain.data_ptr() == model.plain.data_ptr()
    assert shared.b.weight is shared.a.weight and shared.again is shared.a


def test_a_switched_off_gradient_stays_off() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x)
            return self.b(y)

    module = ProgramModule(capture(Stopped(), (torch.randn(2, 6),)))
    given = torch.randn(3, 6, requires_grad=True)
    module(given).sum().backward()
    assert given.grad is None and module.a.weight.grad is None and module.b.weight.grad is not None
