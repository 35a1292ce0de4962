"""Recurrent layers against smaller ones whose tensors are index-selected by hand, built by torch's own constructors."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_models as models
from shohin.data import Call
from shohin.plan import Plan
from shohin.surgery import cut, understand, view
from shohin.surgery.rewritten import CannotRewrite
from surgery_checks import answers, close

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


class Net(nn.Module):
    """A linear layer, a recurrent one, a linear layer over what is used of it.

    Args:
        use: "all", "last" step, "h" or "c" (last states), "states" (outputs and last states of all layers).
        start: initial state: "default" (zeros made by torch), "zeros" (made by the model), "new" (``x.new_zeros``),
            "learned", "input" (computed from the input).
    """

    def __init__(
        self, kind: type, width: int, hidden: int, proj: int = 0, use: str = "all", start: str = "default", **options: Any
    ) -> None:
        super().__init__()
        self.use, self.start, self.directions = use, start, 1 + bool(options.get("bidirectional"))
        self.batch_first, self.hidden, self.out = options.get("batch_first", False), hidden, proj or hidden
        self.layers = options.get("num_layers", 1) * self.directions
        if proj:
            options["proj_size"] = proj
        self.a, self.r = nn.Linear(4, width), kind(width, hidden, **options)
        wide = self.out * self.directions
        self.b = nn.Linear({"h": self.out, "c": hidden, "states": wide + self.layers * self.out}.get(use, wide), 3)
        if start == "learned":
            self.starts = nn.ParameterList([torch.randn(self.layers, 1, n) for n in self.sizes()])
        if start == "input":
            self.starts = nn.ModuleList([nn.Linear(4, n) for n in self.sizes()])

    def sizes(self) -> tuple[int, ...]:
        return (self.out, self.hidden) if isinstance(self.r, nn.LSTM) else (self.out,)

    def states(self, x: Tensor) -> Any:
        batch = x.shape[0] if self.batch_first else x.shape[1]
        if self.start == "zeros":
            found = [torch.zeros(self.layers, batch, n, dtype=x.dtype) for n in self.sizes()]
        elif self.start == "new":
            found = [x.new_zeros(self.layers, batch, n) for n in self.sizes()]
        elif self.start == "learned":
            found = [t.expand(-1, batch, -1).contiguous() for t in self.starts]
        elif self.start == "input":
            first = x.mean(1 if self.batch_first else 0)
            found = [torch.tanh(m(first)).expand(self.layers, -1, -1).contiguous() for m in self.starts]
        else:
            return None
        return tuple(found) if isinstance(self.r, nn.LSTM) else found[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        out, last = self.r(torch.relu(self.a(x)), self.states(x))
        h, c = last if isinstance(self.r, nn.LSTM) else (last, last)
        if self.use == "last":
            return self.b(out[:, -1] if self.batch_first else out[-1])
        if self.use in "hc":
            return self.b((h if self.use == "h" else c)[-1])
        if self.use == "states":
            end = out[:, -1] if self.batch_first else out[-1]
            return self.b(torch.cat([end, h.transpose(0, 1).flatten(1)], 1))
        return self.b(out if self.batch_first else out.transpose(0, 1))


class Loop(nn.Module):
    """A cell over the steps of a sequence."""

    def __init__(self, kind: type, width: int, hidden: int, start: str = "default", **options: Any) -> None:
        super().__init__()
        self.start, self.hidden = start, hidden
        self.a, self.r, self.b = nn.Linear(4, width), kind(width, hidden, **options), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, state = torch.relu(self.a(x)), None
        if self.start == "zeros":
            state = torch.zeros(x.shape[0], self.hidden, dtype=x.dtype)
            state = (state, state.clone()) if isinstance(self.r, nn.LSTMCell) else state
        out = []
        for step in range(x.shape[1]):
            state = self.r(x[:, step], state)
            out.append(self.b(state[0] if isinstance(state, tuple) else state))
        return torch.stack(out, 1)


def select(model: nn.Module, small: nn.Module, a: Sequence[int], units: Sequence[int], proj: Sequence[int] | None) -> nn.Module:
    """``small`` with the tensors of ``model`` at the kept input channels, hidden units and projected units."""
    hidden, gates = model.r.hidden_size, GATES[type(model.r)]
    rows = [g * hidden + j for g in range(gates) for j in units]
    out = units if proj is None else proj
    wide = model.r.proj_size if proj is not None else hidden
    directions = getattr(model, "directions", 1)
    repeats = {"b.weight": directions, "next": directions}
    if getattr(model, "use", "") == "states":
        repeats["b.weight"] += model.layers
    elif getattr(model, "use", "") in ("h", "c"):
        repeats["b.weight"] = 1
    end, size = (units, hidden) if getattr(model, "use", "") == "c" else (out, wide)
    state = {}
    for name, tensor in model.state_dict().items():
        axes: dict[int, Sequence[int]] = {}
        if name in ("a.weight", "a.bias"):
            axes = {0: a}
        elif name == "b.weight":
            axes = {1: [k * size + j for k in range(repeats[name]) for j in end]}
        elif name.startswith("starts"):
            axes = {2 if tensor.dim() == 3 else 0: out if name.split(".")[1] == "0" else units}
        elif "weight_ih" in name:
            first = "_l" not in name or "_l0" in name
            axes = {0: rows, 1: a if first else [k * wide + j for k in range(repeats["next"]) for j in out]}
        elif "weight_hh" in name:
            axes = {0: rows, 1: out}
        elif "weight_hr" in name:
            axes = {0: out, 1: units}
        elif "r.bias" in name:
            axes = {0: rows}
        for axis, indices in axes.items():
            tensor = tensor.index_select(axis, torch.tensor(list(indices)))
        state[name] = tensor
    small = small.double().eval()
    small.load_state_dict(state)
    return small


@dataclass(frozen=True)
class Case:
    kind: type
    options: dict[str, Any] = field(default_factory=dict)
    proj: int = 0
    form: str = "module"

    def build(self, width: int = 6, hidden: int = 8, proj: int | None = None) -> nn.Module:
        if issubclass(self.kind, nn.RNNCellBase):
            return Loop(self.kind, width, hidden, **self.options)
        return Net(self.kind, width, hidden, self.proj if proj is None else proj, **self.options)


TWO = {"num_layers": 2, "bidirectional": True, "batch_first": True}
CASES = {
    "lstm": Case(nn.LSTM),
    "lstm h": Case(nn.LSTM, {"use": "h", "num_layers": 2}),
    "lstm c": Case(nn.LSTM, {"use": "c", "batch_first": True}),
    "lstm states": Case(nn.LSTM, {**TWO, "use": "states"}),
    "lstm zeros, no bias": Case(nn.LSTM, {**TWO, "start": "zeros", "bias": False}),
    "lstm new zeros, last step": Case(nn.LSTM, {"batch_first": True, "start": "new", "use": "last"}),
    "lstm computed start": Case(nn.LSTM, {"num_layers": 2, "start": "input"}),
    "lstm projected": Case(nn.LSTM, {**TWO, "use": "states"}, proj=5),
    "lstm projected, no bias": Case(nn.LSTM, {"bias": False, "use": "c"}, proj=5),
    "lstm projected, learned start": Case(nn.LSTM, {**TWO, "start": "learned"}, proj=5),
    "gru both ways": Case(nn.GRU, {**TWO, "use": "states"}),
    "gru learned start, no bias": Case(nn.GRU, {"start": "learned", "use": "last", "bias": False}),
    "rnn tanh": Case(nn.RNN, {"use": "h"}),
    "rnn relu": Case(nn.RNN, {**TWO, "nonlinearity": "relu"}),
    "lstm cell": Case(nn.LSTMCell),
    "lstm cell, zeros": Case(nn.LSTMCell, {"start": "zeros"}),
    "gru cell, no bias": Case(nn.GRUCell, {"bias": False}),
    "rnn relu cell, zeros": Case(nn.RNNCell, {"nonlinearity": "relu", "start": "zeros"}),
}


def inputs(batch: int, seed: int) -> Call:
    """Sequences of 4 steps."""
    x = torch.randn(batch, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Call((x,), {}, None, None)


def names(case: Case) -> dict[str, int]:
    cell = issubclass(case.kind, nn.RNNCellBase)
    return {"a.weight": 6, "r.weight_ih" if cell else "r.weight_ih_l0": 8, **({"r.weight_hr_l0": case.proj} if case.proj else {})}


def plans(sizes: dict[str, int]) -> list[dict[str, tuple[int, ...]]]:
    """Half of everything; random numbers of hidden and projected units alone."""
    r = random.Random(0)
    half = {n: tuple(sorted(r.sample(range(s), s // 2))) for n, s in sizes.items()}
    return [half, {n: tuple(sorted(r.sample(range(s), s - r.randint(1, 3)))) for n, s in sizes.items() if n != "a.weight"}]


@pytest.mark.parametrize("name", CASES)
def test_equals_a_smaller_layer(name: str) -> None:
    case = CASES[name]
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = models.lively(case.build())
    graph = understand(model, inputs(1, 0))
    sizes = names(case)
    assert {n: s for n, s in graph.sizes.items() if n in sizes} == sizes, graph.frozen
    for widths in plans(sizes):
        kept = {n: widths.get(n, tuple(range(s))) for n, s in sizes.items()}
        a, units, *proj = kept.values()
        small = select(model, case.build(len(a), len(units), len(proj[0]) if proj else 0), a, units, proj[0] if proj else None)
        result = cut(model, graph, Plan(graph.program.fingerprint, widths))
        assert result.form == case.form, result.reason
        close(answers(result.model, inputs(1, 1)), answers(small, inputs(1, 1)), (name, widths, "cut"))
        whole = view(graph, Plan(graph.program.fingerprint, widths))
        close(answers(whole, inputs(3, 3)), answers(small, inputs(3, 3)), (name, widths, "view"))
        call = inputs(2, 4)
        gradients = []
        for one in (result.model, small):
            one.zero_grad()
            (one(*call.args) ** 2).sum().backward()
            gradients.append({n: p.grad for n, p in one.named_parameters()})
        assert gradients[0].keys() == gradients[1].keys()
        close([*gradients[0].values()], [*gradients[1].values()], (name, widths, "gradients"))


@pytest.mark.parametrize("name", ["lstm states", "gru both ways", "lstm projected", "rnn tanh"])
def test_a_cut_layer_is_whole(name: str) -> None:
    """Its sizes say what its tensors are; the list that torch runs holds these tensors; it copies, trains and reloads."""
    case = CASES[name]
    torch.manual_seed(3)
    model = models.lively(case.build())
    graph = understand(model, inputs(2, 0))
    sizes = names(case)
    made = cut(model, graph, Plan(graph.program.fingerprint, {n: tuple(range(0, s, 2)) for n, s in sizes.items()})).model
    layer = made.r
    assert type(layer) is case.kind and (layer.input_size, layer.hidden_size) == (3, 4)
    assert layer.proj_size == (3 if case.proj else 0)
    assert [id(w) for w in layer._flat_weights] == [id(getattr(layer, n)) for n in layer._flat_weights_names]
    assert [id(w) for layers in layer.all_weights for w in layers] == [id(p) for p in layer.parameters()]
    layer.flatten_parameters()
    call = inputs(2, 1)
    wanted = answers(made, call)
    close(answers(copy.deepcopy(made), call), wanted, "deepcopy")
    close(answers(made.float().double(), call), answers(made, call), "moved")
    torch.optim.SGD(made.parameters(), 0.1).step()
    made.train()
    before = made(*call.args).detach()
    optimizer = torch.optim.SGD(made.parameters(), 0.1)
    (made(*call.args) ** 2).sum().backward()
    optimizer.step()
    assert not torch.equal(made(*call.args), before)
    fresh = case.build(3, 4, 3 if case.proj else 0).double()
    fresh.load_state_dict(made.state_dict())
    close(answers(fresh, call), answers(made, call), "reloaded")


class Given(nn.Module):
    """The initial state is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.b = nn.Linear(4, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.b(self.r(self.a(x), h.unsqueeze(0))[0])


class Mixed(nn.Module):
    """A recurrent layer along channels: its time axis is what could be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.b = nn.Conv1d(2, 6, 1), nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.r(self.a(x))[0])


class Carried(nn.Module):
    """One constant is the initial state, and another is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 8
        self.a, self.r, self.b = nn.Linear(4, 6), nn.GRUCell(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.ones(x.shape[0], self.hidden, dtype=x.dtype)
        g = h.cumsum(1)
        return self.b(self.r(self.a(x), h) * g)


def test_a_state_that_is_an_input_stays_whole() -> None:
    model = models.lively(Given())
    graph = understand(model, (torch.randn(2, 5, 4).double(), torch.randn(2, 8).double()))
    assert graph.sizes == {"a.weight": 6}
    assert any(f.address == "r/gru.0" and "initial state" in f.reason and "self.r(self.a(x)" in f.line for f in graph.frozen)
    assert cut(model, graph, Plan(graph.program.fingerprint, {"a.weight": (1, 4)})).form == "module"


def test_time_is_never_cut() -> None:
    model = models.lively(Mixed())
    graph = understand(model, (torch.randn(2, 2, 5).double(),))
    assert graph.sizes == {"r.weight_ih_l0": 8}
    assert any(f.address == "r/gru.0" and "along a prunable axis" in f.reason for f in graph.frozen)


def test_a_constant_computed_from_the_state_keeps_its_places() -> None:
    torch.manual_seed(0)
    model = models.lively(Carried())
    x = torch.randn(2, 4).double()
    graph = understand(model, (x,))
    kept = [1, 4, 6]
    result = cut(model, graph, Plan(graph.program.fingerprint, {"r.weight_ih": tuple(kept)}))
    assert result.proof.holds
    small = copy.deepcopy(model)
    with torch.no_grad():
        gone = [i for i in range(8) if i not in kept]
        small.r.weight_hh[:, gone] = 0
        small.b.weight[:, gone] = 0
    close([result.model(x)], [small(x)], "carried")


def test_projections_as_wide_as_cells_are_refused() -> None:
    """torch's operator tells projected states by their width."""
    model = models.lively(Case(nn.LSTM, {"batch_first": True}, proj=5).build())
    graph = understand(model, inputs(2, 0))
    with pytest.raises(CannotRewrite, match="projected units"):
        cut(model, graph, Plan(graph.program.fingerprint, {"r.weight_ih_l0": (0, 1, 2, 5, 7)}))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_follows_the_mode_of_a_program(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = kind(4, 6, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 5, 4).double()
    graph = understand(model, (x,))
    program = view(graph, Plan(graph.program.fingerprint))
    program.eval()
    assert torch.equal(program(x), program(x)) and torch.allclose(program(x), model.eval()(x))
    program.train()
    assert not torch.equal(program(x), program(x))
