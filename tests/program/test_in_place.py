"""In-place operators, views and slices that are written to: outputs and gradients of the program equal the model's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shohin.errors import ModelError
from shohin.program import ProgramModule, capture

Body = Callable[["Layers", Tensor], object]


class Layers(nn.Module):
    """A linear layer, a convolution and a buffer, and a forward given by a function."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 6), nn.Conv1d(4, 6, 1)
        self.register_buffer("count", torch.ones(6))
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


def accumulate(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    kept = y * 3
    y += kept
    y -= 1
    y *= 0.5
    return y + kept


def skip(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    return F.relu(y, inplace=True) + y


def column(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    y[:, 0] = x[:, 1]
    y[:, 2:4] = x[:, :2] * 2
    y[:, -1] = 0.5
    return y


def fresh(m: Layers, x: Tensor) -> object:
    y = torch.zeros(x.shape[0], 6, dtype=x.dtype)
    y[:, :4] = x
    y[:, 4:] = m.a(x)[:, :2]
    return torch.tanh(y)


def shift(m: Layers, x: Tensor) -> object:
    y = m.a(x).view(-1, 2, 3)
    out = torch.zeros_like(y)
    out[:, :-1, :1] = y[:, 1:, :1]
    out[:, 1:, 1:2] = y[:, :-1, 1:2]
    out[:, :, 2:] = y[:, :, 2:]
    return out


def through_view(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    z = y.view(-1, 2, 3).transpose(1, 2)
    z.mul_(2).add_(1)
    w = y.sum(1)
    y.sigmoid_()
    return y, z, w


def nested(m: Layers, x: Tensor) -> object:
    y = m.a(x).reshape(-1, 2, 3)
    y[:, 1][:, 0:2].mul_(3)
    y[:, 0].unsqueeze(1).squeeze(1).permute(1, 0).add_(1)
    return y.tanh()


def stepped(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    y[:, ::2] = x[:, :3]
    return y * 2


def batch_row(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    y[0] = 1.0
    y[1:] += 1
    return y


def masked(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    y[y > 0] = 0.25
    y.masked_fill_(x[:, :1] > 0, 2.0)
    return y


def indexed(m: Layers, x: Tensor) -> object:
    y = m.a(x).clone()
    y[:, torch.tensor([0, 3])] = x[:, :2]
    y.index_add_(1, torch.tensor([1, 1]), x[:, 2:])
    y.scatter_(1, torch.zeros(x.shape[0], 1, dtype=torch.long), 0.5)
    return y


def pieces(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    a = y.narrow(1, 1, 2)
    a.add_(1)
    torch.diagonal(y.view(-1, 2, 3), dim1=1, dim2=2).mul_(3)
    return y


def zeroed(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    z = y[:, 1:3]
    z.zero_()
    y[:, 3].fill_(2)
    return y, z


def out_given(m: Layers, x: Tensor) -> object:
    y = m.a(x).detach()
    z = torch.empty_like(y)
    torch.add(y, 1, out=z)
    return z * 2 + m.a(x)


def half(m: Layers, x: Tensor) -> object:
    y = m.a(x).float()
    y += x.sum(1, keepdim=True)
    return y * 2


def copied(m: Layers, x: Tensor) -> object:
    y, z = m.a(x), torch.empty(x.shape[0], 6, dtype=torch.float32)
    z.copy_(y)
    y.copy_(x[:, :1])
    return y, z


def renewed(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    z = y[:, :2]
    y.add_(1)
    w = (x * 2).unsqueeze_(1)
    w.add_(1)
    return z * 2, y, w.squeeze_(1)


def stateless(m: Layers, x: Tensor) -> object:
    with torch.no_grad():
        scale = m.a(x).abs().mean(1, keepdim=True)
        scale.clamp_(min=0.1)
    return m.a(x) / scale


def no_autocast(m: Layers, x: Tensor) -> object:
    with torch.autocast("cpu", enabled=False):
        return m.a(x).relu_()


CASES: list[Body] = [
    accumulate,
    skip,
    column,
    fresh,
    shift,
    through_view,
    nested,
    stepped,
    batch_row,
    masked,
    indexed,
    pieces,
    zeroed,
    out_given,
    half,
    copied,
    renewed,
    stateless,
    no_autocast,
]


def results(module: nn.Module, x: Tensor, gradients: bool) -> list[Tensor]:
    """Outputs, and gradients of input and parameters (those that the model itself can compute)."""
    x = x.clone().requires_grad_()
    outputs = module(x)
    flat = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((t.double() * torch.linspace(0.5, 2, t.numel(), dtype=torch.float64).view(t.shape)).sum() for t in flat)
    parameters = sorted((n, p) for n, p in module.named_parameters() if n.startswith("a."))
    leaves = [x, *(p for _, p in parameters)]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if gradients else [None] * len(leaves)
    zeros = [torch.zeros_like(t) for t in (x, *(p for _, p in parameters))]
    return [*(t.detach() for t in flat), *(z if g is None else g for g, z in zip(grads, zeros, strict=True))]


def check(body: Body, batches: tuple[int, ...] = (2, 3, 5), *, gradients: bool = True, may_settle: bool = False) -> ProgramModule:
    torch.manual_seed(0)
    model = Layers(body).double().eval()
    program = capture(model, (torch.randn(2, 4).double(),))
    assert all(not n.target._schema.is_mutable for n in program.graph.nodes if hasattr(n.target, "_schema"))
    if any("batch" in r for r in program.remarks):  # torch settled it, because the model asked
        assert may_settle
        batches = (2,)
    module, tolerance = ProgramModule(program), 1e-5 if body is half else 1e-12
    for batch in batches:
        x = torch.randn(batch, 4).double()
        again = Layers(body).double().eval()
        again.load_state_dict(model.state_dict())
        for got, wanted in zip(results(module, x, gradients), results(again, x, gradients), strict=True):
            assert got.shape == wanted.shape and got.dtype == wanted.dtype
            assert torch.equal(got, wanted) or torch.allclose(got, wanted, rtol=tolerance, atol=tolerance), body.__name__
    return module


@pytest.mark.parametrize("body", CASES, ids=lambda b: b.__name__)
def test_a_change_in_place_keeps_its_meaning(body: Body) -> None:
    check(body, may_settle=body is batch_row)  # a slice of one row of two


def test_slices_that_are_written_become_plain_movement() -> None:
    for body in (column, fresh, shift, nested):
        targets = {str(n.target) for n in capture(Layers(body), (torch.randn(2, 4),)).graph.nodes}
        assert not [t for t in targets if "scatter" in t or "copy_" in t], targets


def refuse_input(m: Layers, x: Tensor) -> object:
    return x.view(-1, 2).mul_(2)


def refuse_parameter(m: Layers, x: Tensor) -> object:
    with torch.no_grad():
        m.a.weight.clamp_(-1, 1)
    return m.a(x)


def refuse_buffer(m: Layers, x: Tensor) -> object:
    m.count += 1
    return m.a(x) * m.count


def refuse_unfold(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    y.unfold(1, 2, 2).mul_(2)
    return y


def refuse_shape(m: Layers, x: Tensor) -> object:
    y = m.a(x)
    z = y[:, :2]
    y.unsqueeze_(1)
    return y, z


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (refuse_input, r"input, parameter or buffer \(x\).*changed in place.*self.body\(self, x\)"),
        (refuse_parameter, r"input, parameter or buffer \(p_a_weight\).*changed in place.*self.body\(self, x\)"),
        (refuse_buffer, r"buffer \(b_count\).*changed in place.*self.body\(self, x\)"),
        (refuse_unfold, r"shares memory.*changed in place.*self.body\(self, x\)"),
        (refuse_shape, r"another shape in place.*self.body\(self, x\)"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_line(body: Body, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        capture(Layers(body), (torch.randn(2, 4),))


VIEWS: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "slice": lambda t, r: t[:, r.randint(0, 1) : r.randint(2, 4)] if t.dim() > 1 and t.shape[1] > 2 else t,
    "select": lambda t, r: t[..., r.randrange(t.shape[-1])] if t.dim() > 1 else t,
    "transpose": lambda t, r: t.transpose(-1, -2) if t.dim() > 2 else t,
    "view": lambda t, r: t.view(t.shape[0], 2, 3) if t.shape[1:] == (6,) and t.is_contiguous() else t,
    "piece": lambda t, r: t[:, None][:, 0],
    "rows": lambda t, r: t[1:],
}
CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda t, x: t.add_(0.5),
    "relu": lambda t, x: t.relu_(),
    "mul": lambda t, x: t.mul_(x.mean()),
    "set": lambda t, x: t.copy_(x.sum() * 0.1),
    "fill": lambda t, x: t.fill_(0.3),
    "tanh": lambda t, x: t.tanh_(),
}
STEPS = st.lists(st.tuples(st.sampled_from(["look", "change"]), st.integers(0, 10**6)), min_size=2, max_size=8)


@settings(max_examples=25, phases=(Phase.explicit, Phase.generate))
@given(STEPS)
def test_any_order_of_views_and_changes(steps: list[tuple[str, int]]) -> None:
    def body(m: Layers, x: Tensor) -> object:
        seen = [m.a(x)]
        for kind, seed in steps:
            r = random.Random(seed)
            t = r.choice(seen)
            if kind == "look":
                seen.append(VIEWS[r.choice(sorted(VIEWS))](t, r))
            else:
                CHANGES[r.choice(sorted(CHANGES))](t, x)
        return tuple(s * 1 for s in seen)

    check(body, (3,), gradients=False, may_settle=True)
