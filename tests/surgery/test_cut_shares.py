"""Where one forward cannot follow a plan, only its module runs as a program; the rest is the user's class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shohin.data import Call
from shohin.plan import Plan
from shohin.program import ProgramModule
from shohin.surgery import cut, understand, view
from surgery_checks import answers, close


class Attention(nn.Module):
    """The head dim comes from the input's width, and the output's width too."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.5)
        self.register_buffer("shift", torch.randn(width), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) * self.scale
        scores = scores if bias is None else scores + bias
        return self.drop(self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c) + self.shift))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList(Attention(16, 4) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), bias=self.bias)
        return self.head(x)


def build() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model().double().eval(), torch.randn(2, 5, 6).double()


def test_only_the_attention_runs_as_a_program() -> None:
    model, x = build()
    graph = understand(model, (x,))
    heads = [g.name for g in graph.groups if g.size == 4 and not g.name.endswith("#2")]
    plan = Plan(graph.program.fingerprint, {name: (0, 2, 3) for name in heads} | {"a.weight": tuple(range(0, 16, 3))})
    made = cut(model, graph, plan)
    assert made.form == "module" and type(made.model) is Model and made.proof.holds
    assert made.parts == ("layers.0", "layers.1") and all(isinstance(made.model.layers[i], ProgramModule) for i in range(2))
    assert "reshape" in made.reason or "c // self.heads" in made.reason
    call = Call((x,), {}, None, None)
    close(answers(made.model, call), answers(view(graph, plan), call), plan)
    wider = torch.randn(7, 5, 6).double()
    close([made.model(wider)], [view(graph, plan)(wider)], "another batch")


def test_state_hooks_and_modes_are_the_originals() -> None:
    model, x = build()
    model.layers[0].qkv.weight.requires_grad_(False)
    graph = understand(model, (x,))
    seen = []
    model.layers[1].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    heads = [g.name for g in graph.groups if g.size == 4 and not g.name.endswith("#2")]
    made = cut(model, graph, Plan(graph.program.fingerprint, {heads[0]: (0, 2, 3)}))
    assert made.form == "module" and "layers.0" in made.parts
    assert set(made.model.state_dict()) == set(model.state_dict())
    assert not made.model.get_parameter("layers.0.qkv.weight").requires_grad
    seen.clear()
    made.model(x)
    assert seen == [(2, 5, 16)]
    made.model.eval()
    assert torch.equal(made.model(x), made.model(x))
    made.model.train()
    assert not torch.equal(made.model(x), made.model(x))  # the dropout inside the part
    made.model.load_state_dict(made.model.state_dict())


def test_a_forward_of_the_model_itself_gives_the_program() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p, self.q, self.out = nn.Linear(6, 8), nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            p, q = torch.split(self.a(x), [3, 5], dim=-1)
            return self.out(torch.tanh(self.p(torch.sigmoid(p)) + self.q(torch.relu(q))))

    torch.manual_seed(0)
    model, x = Root().double().eval(), torch.randn(2, 6).double()
    graph = understand(model, (x,))
    group = graph.group("a.weight")
    made = cut(model, graph, Plan(graph.program.fingerprint, {group.name: tuple(range(group.size - 1))}))
    assert made.form == "program" and not made.parts and "torch.split" in made.reason
