# mypy: ignore-errors
"""Operators one by one: what is prunable around each, and that the user's class and the view agree on every plan.

Where the cut keeps the user's class, that class runs its own code on the sliced tensors: it shares only the plan with the view.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import small_models as models
from shohin.errors import ModelError
from shohin.plan import Plan
from shohin.surgery import cut, understand, view


def made(init, forward):
    class X(nn.Module):
        def __init__(self):
            super().__init__()
            init(self)

    X.forward = forward
    return X


def i2(s):
    s.a = nn.Linear(6, 8)
    s.b = nn.Linear(8, 4)
    s.c = nn.Linear(4, 2)


def x6():
    return (torch.randn(2, 6).double(),)


def img():
    return (torch.randn(1, 3, 8, 8).double(),)


def seq():
    return (torch.randn(1, 5, 8).double(),)


def c2(s):
    s.a = nn.Conv2d(3, 8, 3, padding="same")
    s.b = nn.Conv2d(8, 4, 1)
    s.c = nn.Conv2d(4, 2, 1)


def wn(s):
    s.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    s.b = nn.Linear(8, 4)
    s.c = nn.Linear(4, 2)


def mha(s):
    s.a = nn.MultiheadAttention(8, 2, batch_first=True)
    s.b = nn.Linear(8, 6)
    s.c = nn.Linear(6, 3)


def ws(s):
    s.a = nn.Conv2d(3, 8, 3)
    s.b = nn.Conv2d(8, 4, 1)
    s.c = nn.Conv2d(4, 2, 1)


def wsf(s, x):
    w = s.a.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return s.c(F.relu(s.b(F.relu(F.conv2d(x, w, s.a.bias)))))


def bn0(s):
    s.a = nn.Conv2d(3, 8, 3)
    s.n = nn.BatchNorm2d(8, affine=False)
    s.b = nn.Conv2d(8, 4, 1)
    s.m = nn.BatchNorm2d(4, track_running_stats=False)
    s.c = nn.Conv2d(4, 2, 1)


def cnt(s):
    i2(s)
    s.register_buffer("n", torch.zeros(1).double())


def cntf(s, x):
    s.n.add_(1)
    return s.c(F.relu(s.b(F.relu(s.a(x)))))


def ct(s):
    s.a = nn.Conv2d(3, 8, 3)
    s.b = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
    s.c = nn.Conv2d(8, 2, 1)


MODELS = {
    "mask": (made(i2, lambda s, x: s.c(F.relu(s.b(s.a(x)))).masked_select(x[:, :2] > 0).sum()), x6),
    "boolindex": (made(i2, lambda s, x: s.c(F.relu(s.b(s.a(x))))[x[:, 0] > -9]), x6),
    "einsum": (made(i2, lambda s, x: s.c(torch.einsum("bi,oi->bo", F.relu(s.a(x)), s.b.weight))), x6),
    "einsum2": (made(i2, lambda s, x: s.c(F.relu(s.b(torch.einsum("bi,bi->bi", s.a(x), s.a(x)))))), x6),
    "mha": (made(mha, lambda s, x: s.c(F.relu(s.b(s.a(x, x, x, need_weights=False)[0])))), seq),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), seq),
    "weightnorm": (made(wn, lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))))), x6),
    "same": (made(c2, lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))))), img),
    "ws": (made(ws, wsf), img),
    "bn0": (made(bn0, lambda s, x: s.c(s.m(s.b(s.n(s.a(x)))))), img),
    "counter": (made(cnt, cntf), x6),
    "gru": (
        made(
            lambda s: (setattr(s, "g", nn.GRU(8, 6, batch_first=True)), setattr(s, "b", nn.Linear(6, 4)), setattr(s, "c", nn.Linear(4, 2))),
            lambda s, x: s.c(F.relu(s.b(s.g(x)[0]))),
        ),
        seq,
    ),
    "convtg": (made(ct, lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))))), img),
    "interp": (
        made(c2, lambda s, x: s.c(F.interpolate(F.relu(s.b(F.interpolate(s.a(x), scale_factor=2, mode="bilinear"))), size=(5, 5)))),
        img,
    ),
    "lnmulti": (made(lambda s: (c2(s), setattr(s, "n", nn.LayerNorm((8, 8, 8)))), lambda s, x: s.c(F.relu(s.b(s.n(s.a(x)))))), img),
    "lnfun": (made(c2, lambda s, x: s.c(F.relu(s.b(F.layer_norm(s.a(x), (8, 8, 8)))))), img),
    "unfold": (made(c2, lambda s, x: s.c(F.relu(s.b(F.fold(F.unfold(s.a(x), 2, stride=2), (8, 8), 2, stride=2))))), img),
    "scalarout": (made(i2, lambda s, x: (s.c(F.relu(s.b(s.a(x)))).mean(), None, 3)), x6),
    "topk": (made(i2, lambda s, x: s.c(F.relu(s.b(s.a(x)))) + s.a(x).topk(2, -1)[0]), x6),
    "max": (made(c2, lambda s, x: s.c(s.b(s.a(x) * torch.sigmoid(torch.max(s.a(x), 1, keepdim=True)[0])))), img),
    "normalize": (made(i2, lambda s, x: s.c(F.normalize(s.b(F.relu(s.a(x))), dim=-1))), x6),
    "repeat": (made(i2, lambda s, x: s.c(F.relu(s.b(s.a(x))).unsqueeze(1).repeat(1, 3, 1)).mean(1)), x6),
    "outer": (made(i2, lambda s, x: s.c(F.relu(s.b((s.a(x).unsqueeze(2) * s.a(x).unsqueeze(1)).sum(1))))), x6),
    "bmm": (
        made(
            i2,
            lambda s, x: s.c(
                F.relu(s.b(torch.bmm(s.a(x).unsqueeze(1), s.b.weight.t().unsqueeze(0).expand(x.shape[0], -1, -1)).squeeze(1) @ s.b.weight))
            ),
        ),
        x6,
    ),
    "residualmix": (made(i2, lambda s, x: s.c(F.relu(s.b(s.a(x) + F.pad(x, (0, 2)))))), x6),
    "batchfold": (
        made(
            c2,
            lambda s, x: s.c(
                F.relu(s.b(F.conv2d(s.a(x).reshape(-1, 1, 8, 8), torch.ones(1, 1, 3, 3).double(), padding=1).reshape(x.shape[0], 8, 8, 8)))
            ),
        ),
        img,
    ),
    "view_dtype": (made(i2, lambda s, x: s.c(F.relu(s.b(s.a(x).float().double())))), x6),
    "where": (made(i2, lambda s, x: s.c(F.relu(s.b(torch.where(s.a(x) > 0, s.a(x), torch.zeros(())))))), x6),
    "stackmean": (made(i2, lambda s, x: s.c(torch.stack([s.b(s.a(x)), s.b(s.a(-x))]).mean(0))), x6),
    "complex": (made(i2, lambda s, x: s.c(torch.fft.ifft(torch.fft.fft(s.b(s.a(x)))).real)), x6),
    "zerodim": (made(i2, lambda s, x, t: s.c(F.relu(s.b(s.a(x) * t)))), lambda: (torch.randn(2, 6).double(), torch.tensor(2.0).double())),
    "ntc": (
        made(
            lambda s: (setattr(s, "a", nn.Conv1d(8, 8, 1)), setattr(s, "b", nn.Linear(5, 6)), setattr(s, "c", nn.Linear(6, 3))),
            lambda s, x: s.c(F.gelu(s.b(s.a(x.transpose(1, 2))))),
        ),
        seq,
    ),
    "mixer": (
        made(
            lambda s: (
                setattr(s, "t1", nn.Linear(5, 7)),
                setattr(s, "t2", nn.Linear(7, 5)),
                setattr(s, "n", nn.LayerNorm(8)),
                setattr(s, "c1", nn.Linear(8, 12)),
                setattr(s, "c2", nn.Linear(12, 8)),
                setattr(s, "h", nn.Linear(8, 3)),
            ),
            lambda s, x: s.h(
                (
                    (y := x @ torch.eye(8).double() + s.t2(F.gelu(s.t1(s.n(x).transpose(1, 2)))).transpose(1, 2)) + s.c2(F.gelu(s.c1(y)))
                ).mean(1)
            ),
        ),
        seq,
    ),
}


REFUSED = {
    "mask": "depends on the values of the input",
    "boolindex": "depends on the values of the input",
    "counter": "changed in place",
}
SIZES = {
    "einsum": {"a.weight": 8, "b.weight": 4},
    "einsum2": {"a.weight": 8, "b.weight": 4},
    "mha": {"a.in_proj_weight": 2, "a.in_proj_weight#2": 4, "a.out_proj.weight": 8, "b.weight": 6},
    "encoder": {"self_attn.in_proj_weight": 2, "self_attn.in_proj_weight#2": 4, "linear1.weight": 12},
    "weightnorm": {"a.parametrizations.weight.original1": 8, "b.weight": 4},
    "same": {"a.weight": 8, "b.weight": 4},
    "ws": {"a.weight": 8, "b.weight": 4},
    "bn0": {"a.weight": 8, "b.weight": 4},
    "gru": {"g.weight_ih_l0": 6, "b.weight": 4},
    "convtg": {"a.weight": 4, "b.weight": 4},
    "interp": {"a.weight": 8, "b.weight": 4},
    "lnmulti": {"a.weight": 8, "b.weight": 4},
    "lnfun": {"a.weight": 8, "b.weight": 4},
    "unfold": {"a.weight": 8, "b.weight": 4},
    "scalarout": {"a.weight": 8, "b.weight": 4, "c.weight": 2},
    "topk": {"b.weight": 4},
    "max": {"a.weight": 8, "b.weight": 4},
    "normalize": {"a.weight": 8, "b.weight": 4},
    "repeat": {"a.weight": 8, "b.weight": 4},
    "outer": {"a.weight": 8, "b.weight": 4},
    "bmm": {"a.weight": 8, "b.weight": 4},
    "residualmix": {"b.weight": 4},
    "batchfold": {"b.weight": 4},
    "view_dtype": {"a.weight": 8, "b.weight": 4},
    "where": {"a.weight": 8, "b.weight": 4},
    "stackmean": {"a.weight": 8, "b.weight": 4},
    "complex": {"a.weight": 8},
    "zerodim": {"a.weight": 8, "b.weight": 4},
    "ntc": {"b.weight": 6},
    "mixer": {"t1.weight": 7, "c1.weight": 12},
}


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", MODELS)
def test_operator(name):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = models.lively(build()), inputs()
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            understand(model, x)
        return
    graph = understand(model, inputs())
    assert graph.sizes == SIZES[name], graph.frozen
    assert torch.allclose(first(view(graph, Plan(graph.program.fingerprint))(*x)), first(model(*x)), rtol=1e-10)
    for seed in range(4):
        r = random.Random(seed)
        widths = {g.name: tuple(sorted(r.sample(range(g.size), r.randint(1, g.size)))) for g in graph.groups}
        result = cut(model, graph, Plan(graph.program.fingerprint, widths))
        assert result.proof.holds
        assert name in ("mha", "encoder", "lnfun") or result.form == "module", result.reason
    if not graph.groups:
        assert graph.frozen
