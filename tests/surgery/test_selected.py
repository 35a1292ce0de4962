"""Cuts whose meaning is the program on what stays, each beside a reference written by hand with selected indices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shohin.plan import Plan
from shohin.surgery import cut, understand
from shohin.surgery.oracle import unspoken


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_local_response_normalization_over_the_channels_that_stay(rank: int, size: int) -> None:
    torch.manual_seed(size)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    apply = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    model = nn.Sequential(conv(3, 6, 1), nn.LocalResponseNorm(size, alpha=0.5, beta=0.6), conv(6, 2, 1)).double()
    x = torch.randn(2, 3, *[4] * rank).double()
    graph = understand(model, (x,))
    assert graph.sizes == {"0.weight": 6} and graph.groups[0].normalized and list(unspoken(model, graph)) == ["0.weight"]
    stays = [0, 2, 3]
    result = cut(model, graph, Plan(graph.program.fingerprint, {"0.weight": tuple(stays)}))
    hidden = F.local_response_norm(model[0](x)[:, stays], size, alpha=0.5, beta=0.6)
    wanted = apply(hidden, model[2].get_parameter("weight")[:, stays], model[2].get_parameter("bias"))
    assert result.form == "module" and torch.allclose(result.model(x), wanted, rtol=1e-12)


class Standardized(nn.Conv2d):
    """Weights standardized by batch normalization over flattened inputs; ``shaped`` says how they get their shape back."""

    shaped = ""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight) if self.shaped == "as" else weight.reshape(self.weight.shape)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


@pytest.mark.parametrize("shaped", ["as", "to"])
def test_weights_standardized_over_the_inputs_that_stay(shaped: str) -> None:
    torch.manual_seed(0)
    middle = Standardized(6, 8, 3, padding=1)
    middle.shaped = shaped
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    x = torch.randn(2, 3, 5, 5).double()
    graph = understand(model, (x,))
    assert graph.sizes == {"0.weight": 6, "2.weight": 8}
    first, second = [0, 3, 5], [1, 2, 6, 7]
    result = cut(model, graph, Plan(graph.program.fingerprint, {"0.weight": tuple(first), "2.weight": tuple(second)}))
    weight = middle.weight[second][:, first]
    weight = F.batch_norm(weight.reshape(1, 4, -1), None, None, training=True, eps=1e-6).reshape(4, 3, 3, 3)
    hidden = F.conv2d(model[0](x)[:, first].relu(), weight, middle.bias[second], padding=1)  # type: ignore[index]
    wanted = F.conv2d(hidden.relu(), model[4].get_parameter("weight")[:, second], model[4].get_parameter("bias"))
    assert result.form == "module" and torch.allclose(result.model(x), wanted, rtol=1e-11)


class Interleaved(nn.Module):
    """Rotary angles in one table of sines and cosines, doubled by interleaving them in the table's own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        sin, cos = self.table.chunk(2, -1)
        sin, cos = (torch.stack([t, t], -1).reshape_as(self.table) for t in (sin, cos))
        turned = torch.stack([-q[..., 1::2], q[..., ::2]], -1).reshape_as(q)
        return self.o(torch.relu(q * cos + turned * sin))


def test_interleaved_halves_of_a_table() -> None:
    torch.manual_seed(0)
    model = Interleaved().double()
    x = torch.randn(2, 5, 6).double()
    graph = understand(model, (x,))
    assert graph.sizes == {"q.weight": 4}
    result = cut(model, graph, Plan(graph.program.fingerprint, {"q.weight": (0, 3)}))
    gone = [2, 3, 4, 5]
    reference = Interleaved().double()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference.o.weight[:, gone] = 0
    assert result.form == "module" and result.model.table.shape == (5, 4)
    assert torch.allclose(result.model(x), reference(x), rtol=1e-12)


class Maxout(nn.Module):
    """The largest of three neighbours; then attention by the largest and the mean channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h.view(h.shape[0], h.shape[1] // 3, 3, *h.shape[2:]).max(2)[0]
        h = self.b(h)
        return self.c(h * torch.sigmoid(h.max(1, keepdim=True)[0] + h.mean(1, keepdim=True)))


def test_largest_values_whose_places_nobody_reads() -> None:
    torch.manual_seed(0)
    model, x = Maxout().double(), torch.randn(2, 3, 4, 4).double()
    graph = understand(model, (x,))
    assert graph.sizes["b.weight"] == 6 and graph.group("b.weight").normalized
    stays = [0, 3, 4]
    result = cut(model, graph, Plan(graph.program.fingerprint, {"b.weight": tuple(stays)}))
    h = model.a(x).view(2, 4, 3, 4, 4).amax(2)
    h = F.conv2d(h, model.b.weight[stays], model.b.bias[stays])  # type: ignore[index]
    h = h * torch.sigmoid(h.amax(1, keepdim=True) + h.mean(1, keepdim=True))
    assert result.form == "module" and torch.allclose(result.model(x), F.conv2d(h, model.c.weight[:, stays], model.c.bias), rtol=1e-11)
    outputs = [g for g in graph.groups if "a.weight" in g.slices]
    assert [g.size for g in outputs] == [4, 3] or [g.size for g in outputs] == [4]
