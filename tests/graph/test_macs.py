"""MACs of single operators and of public models against two counters that share no code: torch's own, which sees the calls of
operators, and forward hooks on layers (`counter`), which see modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vision
from counter import hooked_macs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shohin.data import Call
from shohin.graph import Graph, understand_program
from shohin.plan import Plan
from shohin.program import capture
from shohin.surgery import view


def graph_of(model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    return understand_program(capture(model.eval(), Call(args, kwargs, None, None)))


def torch_macs(model: nn.Module, *args: Any, **kwargs: Any) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted; nor without gradients
        model(*args, **kwargs)
    return counter.get_total_flops() / 2


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """One function of the inputs, with weights of given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs, *self.weights)


OPERATORS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2), ((2, 4, 15),)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 5), padding=1), ((2, 4, 9, 8),)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), ((2, 4, 9, 8),)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 3, 3)), ((2, 2, 3, 6, 5),)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), ((2, 8, 7, 7),)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), ((2, 6, 7, 7),)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), ((2, 4, 7),)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), ((2, 4, 5, 7),)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 2, 2), ((2, 4, 3, 3, 2),)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), ((2, 4, 5, 5),)),
    "computed weight": (lambda: Calls(lambda x, w: F.conv2d(x, w / w.norm()), (5, 4, 3, 3)), ((2, 4, 6, 6),)),
    "linear": (lambda: nn.Linear(5, 7), ((2, 3, 5),)),
    "linear over sequences first": (lambda: Calls(lambda x, w: F.linear(x.transpose(0, 1), w), (7, 5)), ((2, 3, 5),)),
    "matmul": (lambda: Calls(lambda a, b: a @ b), ((2, 3, 4, 5), (2, 1, 5, 6))),
    "matmul, weight first": (lambda: Calls(lambda x, w: w @ x, (7, 5)), ((2, 5, 6),)),
    "bmm over batch x heads": (lambda: Calls(lambda x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1).mT)), ((2, 3, 4, 5),)),
    "baddbmm": (lambda: Calls(lambda a, b: torch.baddbmm(a, b, b.mT)), ((2, 4, 4), (2, 4, 3))),
    "addmm": (lambda: Calls(lambda x, w, b: torch.addmm(b, x, w), (5, 6), (6,)), ((2, 5),)),
    "windows": (lambda: Calls(lambda x, w: x.reshape(-1, 2, 6) @ w, (6, 3)), ((2, 4, 2, 6),)),
    "sdpa": (lambda: Calls(F.scaled_dot_product_attention), ((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7))),
    "sdpa, grouped": (
        lambda: Calls(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)),
        ((2, 4, 6, 5), (2, 2, 6, 5), (2, 2, 6, 5)),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_equal_the_counter(name: str) -> None:
    build, shapes = OPERATORS[name]
    torch.manual_seed(0)
    model = build()
    graph = graph_of(model, *(inputs(*shape) for shape in shapes))
    one = torch_macs(model, *(inputs(1, *shape[1:]) for shape in shapes))
    assert graph.macs() == one and one > 0
    assert graph.macs() * 3 == torch_macs(model, *(inputs(3, *shape[1:]) for shape in shapes))  # linear in the batch


#: what torch's counter does not see, with the MACs of one sample worked out by hand
BY_HAND: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int]] = {
    "matmul with a vector": (lambda: Calls(lambda x, w: x @ w, (5,)), ((2, 3, 5),), 3 * 5),
    "inner": (lambda: Calls(torch.inner, (7, 5)), ((2, 3, 5),), 3 * 5 * 7),
    "tensordot": (lambda: Calls(lambda x, w: torch.tensordot(x, w, ([1, 2], [0, 1])), (3, 5, 4)), ((2, 3, 5),), 3 * 5 * 4),
    "elementwise": (lambda: Calls(lambda x: (x * x).softmax(-1)), ((2, 3, 5),), 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_operators_that_torch_does_not_count(name: str) -> None:
    build, shapes, macs = BY_HAND[name]
    assert graph_of(build(), *(inputs(*shape) for shape in shapes)).macs() == macs


EQUATIONS = {
    "bij,bkj->bik": ((2, 3, 4), (2, 5, 4)),
    "bhid, bhjd -> bhij": ((2, 2, 3, 4), (2, 2, 5, 4)),
    "b...d,de->b...e": ((2, 3, 4, 5), (5, 6)),
    "bij,bkl->bik": ((2, 3, 4), (2, 5, 6)),  # j and l are summed before: no product is accumulated
    "bij,bij->bij": ((2, 3, 4), (2, 3, 4)),
    "bi,bj->bji": ((2, 3), (2, 4)),
    "bij,jk": ((2, 3, 4), (4, 5)),
    "bij,bjk,bkl->bil": ((2, 3, 4), (2, 4, 5), (2, 5, 6)),
    "bi,ij,jk,bk->b": ((2, 3), (3, 4), (4, 5), (2, 5)),
    "bii->bi": ((2, 3, 3),),
    "bik,bik,bj->bj": ((2, 3, 4), (2, 3, 4), (2, 5)),
}


class Einsum(nn.Module):
    """An equation; factors without the letter b in front are weights."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        pairs = zip(equation.split("->")[0].split(","), EQUATIONS[equation], strict=True)
        self.given = [text.strip().startswith("b") for text, _ in pairs]
        self.weights = nn.ParameterList(
            torch.randn(shape) for shape, given in zip(EQUATIONS[equation], self.given, strict=True) if not given
        )

    def forward(self, *xs: Tensor) -> Tensor:
        values, weights = iter(xs), iter(self.weights)
        return torch.einsum(self.equation, *(next(values) if given else next(weights) for given in self.given))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_equals_the_counter(equation: str) -> None:
    model = Einsum(equation)
    xs = [inputs(*shape) for shape, given in zip(EQUATIONS[equation], model.given, strict=True) if given]
    assert graph_of(model, *xs).macs() * 2 == torch_macs(model, *xs)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True),
        lambda: nn.LSTM(4, 6, 2, proj_size=3, batch_first=True),
        lambda: nn.GRU(4, 5, 3, batch_first=True),
        lambda: nn.RNN(4, 5, 1, bidirectional=True, batch_first=True, nonlinearity="relu"),
        lambda: nn.RNN(4, 5, batch_first=True, bias=False),
    ],
    ids=["lstm", "projected lstm", "gru", "rnn relu", "rnn tanh"],
)
def test_recurrences_equal_the_hooks(build: Callable[[], nn.Module]) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = build()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    model = First()
    assert graph_of(model, inputs(2, 7, 4)).macs() == hooked_macs(model, inputs(1, 7, 4)) > 0


def test_cells_bilinear_and_attention_layers_equal_the_hooks() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 6), nn.GRUCell(6, 5), nn.RNNCell(5, 8)
            self.mix, self.attention = nn.Bilinear(8, 4, 6), nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(self.gru(self.lstm(x)[0]))
            s = self.mix(h, x)[:, None].expand(-1, 3, -1)
            return self.attention(s, s, s)[0]

    model = Mixed()
    assert graph_of(model, inputs(2, 4)).macs() == hooked_macs(model, inputs(1, 4)) > 0


#: models whose products all lie in layers that hooks see
LAYERED = {"resnet18", "squeezenet1_1", "small vit"}


@pytest.mark.parametrize("name", vision.MODELS)
def test_torchvision_models_equal_both_counters(name: str) -> None:
    build, size = vision.MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    x = inputs(1, 3, size, size)
    graph = graph_of(model, x)
    assert graph.macs() == torch_macs(model, x)
    assert (graph.macs() == hooked_macs(model, x)) == (name in LAYERED)


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SMALL),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2, "use_cache": False}),
    "t5": ("T5EncoderModel", "T5Config", {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers_equal_the_counter(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model_name, config_name, values = LANGUAGE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**values)).eval()
        ids = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(0))
        graph = graph_of(model, input_ids=ids)
    assert graph.macs() == torch_macs(model, input_ids=ids)
    assert 0 < hooked_macs(model, input_ids=ids) < graph.macs()  # the attention's own products are between layers


def test_einsum_is_a_polynomial_of_the_widths() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.einsum("bid,bjd->bij", self.q(x), self.k(x)))

    model = Attention().double()
    graph = graph_of(model, inputs(2, 5, 6).double())
    for group in graph.groups:
        plan = Plan(graph.program.fingerprint, {group.name: tuple(range(0, group.size, 3))})
        cut = view(graph, plan)
        assert graph.macs(plan) == torch_macs(cut, inputs(1, 5, 6).double()) < graph.macs()


def test_intensity_and_bytes_of_a_linear_layer() -> None:
    graph = graph_of(nn.Linear(16, 8), inputs(2, 16))
    (op,) = graph.costs
    assert op.moved(graph.sizes) == 4 * (16 + 8 + 16 * 8 + 8)
    assert op.moved(graph.sizes, batch=10, element=1, weight=0.5) == 10 * (16 + 8) + 0.5 * (16 * 8 + 8)
    assert op.intensity(graph.sizes) == 16 * 8 / op.moved(graph.sizes)
    assert op.intensity(graph.sizes, batch=64) > op.intensity(graph.sizes)  # weights are read once for all samples


def test_a_batch_that_is_a_number_in_the_program() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).reshape(2, 12))

    model = Fixed()
    graph = graph_of(model, inputs(2, 3, 6))
    assert graph.program.remarks  # the batch could not stay symbolic
    assert graph.macs() * 2 == torch_macs(model, inputs(2, 3, 6))
