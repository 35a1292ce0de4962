"""What a cut class keeps of the original: modes, hooks, ties, sharing, flags; and which integers and attributes follow."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shohin.data import Call
from shohin.plan import Plan
from shohin.program import ProgramModule
from shohin.surgery import Cut, cut, understand, view
from surgery_cases import CASES
from surgery_checks import answers, close, random_plan, understood


def halved(model: nn.Module, inputs: tuple[Tensor, ...], *names: str) -> Cut:
    """The model with every second unit of the named groups (of all groups without names)."""
    graph = understand(model, inputs)
    chosen = [g for g in graph.groups if not names or g.name in names]
    assert chosen
    made = cut(model, graph, Plan(graph.program.fingerprint, {g.name: tuple(range(0, g.size, 2)) for g in chosen}))
    call = Call(inputs, {}, None, None)
    close(
        answers(made.model, call),
        answers(view(graph, Plan(graph.program.fingerprint, {g.name: tuple(range(0, g.size, 2)) for g in chosen})), call),
        names,
    )
    return made


class Layer(nn.Module):
    """Reads its sizes from a configuration that all layers hold."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.dim
        self.q, self.k, self.v = (nn.Linear(12, width) for _ in range(3))
        self.out = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.config.heads, self.config.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(2, 3) * 0.5).softmax(-1)
        return x + self.out((scores @ v).transpose(1, 2).reshape(b, n, self.config.heads * self.config.dim))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(heads=4, dim=3, name="tiny")
        self.config = config
        self.layers = nn.Sequential(Layer(config), Layer(config))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_layers_of_one_configuration_get_their_own_where_they_differ() -> None:
    torch.manual_seed(0)
    model, x = Shared().double().eval(), torch.randn(2, 5, 12).double()
    made = halved(model, (x,), "layers.0.q.weight")
    assert made.form == "module" and not made.parts, made.reason
    first, second = made.model.layers
    assert (first.config.heads, second.config.heads, first.config.name) == (2, 4, "tiny")
    assert first.config is not second.config and second.config is made.model.config
    assert model.config.heads == 4 and model.layers[0].config is model.config


def test_layers_of_one_configuration_share_it_where_they_agree() -> None:
    torch.manual_seed(0)
    model, x = Shared().double().eval(), torch.randn(2, 5, 12).double()
    made = halved(model, (x,), "layers.0.q.weight", "layers.1.q.weight")
    assert made.form == "module" and not made.parts, made.reason
    assert made.model.config.heads == 2 and made.model.layers[0].config is made.model.layers[1].config is made.model.config


class Product(nn.Module):
    """A constant that is a product of an attribute and a size that is read off a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.repeats = 2
        self.a, self.b = nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c = x.shape
        return self.b(x[:, None].expand(n, self.repeats, c).reshape(n, self.repeats * c))


def test_a_plain_factor_may_follow_by_itself() -> None:
    torch.manual_seed(0)
    model = Product().double().eval()
    graph = understand(model, (torch.randn(2, 6).double(),))
    made = cut(model, graph, Plan(graph.program.fingerprint, {"a.weight": (0, 2, 3, 7)}))
    assert made.form == "module" and made.model.repeats == 2, made.reason


class Conv1D(nn.Module):
    """A linear layer stored as (in, out), as language models have it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Described(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.depth = nn.Embedding(9, 8), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.batch, self.instance, self.group, self.act = (
            nn.BatchNorm1d(8),
            nn.InstanceNorm1d(8, affine=True),
            nn.GroupNorm(8, 8),
            nn.PReLU(8),
        )
        self.layer, self.rms, self.up, self.one, self.two = (
            nn.LayerNorm(8),
            nn.RMSNorm(8),
            nn.ConvTranspose1d(8, 6, 1),
            Conv1D(10, 6),
            nn.Linear(10, 2),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.act(self.batch(self.depth(self.conv(self.embed(tokens).transpose(1, 2)))))
        x = self.rms(self.layer(self.group(self.instance(x)).transpose(1, 2))).transpose(1, 2)
        return self.two(torch.tanh(self.one(self.up(x).transpose(1, 2))))


def test_descriptive_attributes_follow() -> None:
    torch.manual_seed(0)
    model = Described().double().eval()
    made = halved(model, (torch.randint(0, 9, (2, 6)),))
    assert made.form == "module", made.reason
    new = made.model
    for module in new.modules():
        for old, size in (("in_features", 1), ("out_features", 0)):
            if hasattr(module, old):
                assert getattr(module, old) == module.weight.shape[size]
    width = new.conv.weight.shape[0]
    assert 0 < width < 8
    assert (new.conv.out_channels, new.depth.in_channels, new.depth.out_channels, new.depth.groups) == (width,) * 4
    assert (new.batch.num_features, new.instance.num_features, new.group.num_channels, new.group.num_groups) == (width,) * 4
    assert (new.act.num_parameters, new.embed.embedding_dim, new.embed.num_embeddings) == (width, new.embed.weight.shape[1], 9)
    assert new.layer.normalized_shape == new.rms.normalized_shape == (width,)
    assert (new.up.in_channels, new.up.out_channels) == tuple(new.up.weight.shape[:2]) and (new.one.nx, new.one.nf) == tuple(
        new.one.weight.shape
    )
    assert new.up.out_channels < 6 and new.one.nf < 10
    assert "Conv1d(" + str(new.conv.in_channels) in repr(new)


class Plain(nn.Module):
    """A tensor that is neither a parameter nor a buffer, a buffer that no checkpoint holds, a module used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.again = self.b
        self.factor = torch.rand(8) + 0.5
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x) * self.factor + self.shift)
        return self.c(self.again(torch.tanh(self.b(x))))

    def _apply(self, fn):  # type: ignore[no-untyped-def]
        super()._apply(fn)
        self.factor = fn(self.factor)
        return self


def test_plain_tensors_buffers_and_shared_modules_follow() -> None:
    torch.manual_seed(0)
    model = Plain().double().eval()
    model.b.bias.requires_grad_(False)
    made = halved(model, (torch.randn(2, 6).double(),))
    assert made.form == "module", made.reason
    new = made.model
    assert new.again is new.b and new.b.weight.shape == (4, 4)
    assert new.factor.shape == (4,) and new.shift.shape == (4,)
    assert set(new.state_dict()) == set(model.state_dict()) and "shift" not in new.state_dict()
    assert not new.b.bias.requires_grad and new.b.weight.requires_grad
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), model.factor)}
    assert not mine & {t.untyped_storage().data_ptr() for t in (*new.parameters(), *new.buffers(), new.factor)}


def test_hooks_and_modes_survive() -> None:
    model, graph = understood("resnet")
    model = copy.deepcopy(model)
    seen: list[tuple[int, ...]] = []
    model.layers[1].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    model.layers[0].bn1.eval()
    model.train()
    model.layers[0].bn1.eval()
    graph = understand(model, CASES["resnet"].call(1, 0))
    made = cut(model, graph, random_plan(CASES["resnet"], graph, 1))
    assert made.form == "module" and made.model.training and not made.model.layers[0].bn1.training
    seen.clear()
    made.model(*CASES["resnet"].call(2, 0).args)
    assert seen and seen[0][1] == made.model.layers[1].conv2.weight.shape[0]


@pytest.mark.parametrize("name", ["residual 1d", "resnet", "mobilenet", "densenet", "unet"])
def test_batch_statistics_in_training_mode_equal_the_view(name: str) -> None:
    """Forward, gradients and the running statistics that training leaves."""
    model, graph = understood(name)
    for seed in (2, 3):
        plan = random_plan(CASES[name], graph, seed)
        made, seen = cut(model, graph, plan), view(graph, plan)
        assert made.form == "module" and isinstance(seen, ProgramModule)
        call = CASES[name].call(4, 1)
        close(answers(made.model.train(), call), answers(seen.train(), call), plan)
        mine, theirs = dict(made.model.named_buffers()), dict(seen.named_buffers())
        for key in theirs:
            if "running" in key:
                close([mine[key]], [theirs[key]], key)


def test_a_class_that_computes_in_single_precision_is_proved_in_double() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.softmax(self.a(x), -1, dtype=torch.float32).to(torch.float32)
            x = self.b(x) * torch.ones(1, dtype=torch.float32)
            return self.c(x.float())

    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 6)
    graph = understand(model, (x,))
    group = graph.group("b.weight")
    made = cut(model, graph, Plan(graph.program.fingerprint, {group.name: (1, 2, 5)}))
    assert made.form == "module" and made.proof.holds and made.proof.error < 1e-12
    assert made.model.b.weight.dtype == torch.float32
