# mypy: ignore-errors
"""Contractions, attention, normalizations, recurrent layers and embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_kit import aten, image, own, sequence, vector
from torch import nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def convolution(families, layer, dims=2, units=6, out=None, groups=None, size=3):
    """``a`` with kernels of 1, the layer to try, ``b`` with kernels of 1."""
    conv = CONVS[dims - 1]
    return own(
        families,
        lambda s, x: s.b(s.m(s.a(x).tanh()).tanh()),
        lambda: {"a": conv(2, units, 1), "m": layer(), "b": conv(out or units, 2, 1)},
        (2, 2, *[size] * dims),
        groups or {"a.weight": units, "m.weight": out or units},
    )


CONVOLUTIONS = {
    **{f"conv{n}d": convolution(f"conv{n}d", lambda n=n: CONVS[n - 1](6, 4, 2), n, out=4) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": convolution(f"conv_transpose{n}d", lambda n=n: TRANSPOSED[n - 1](6, 4, 2), n, out=4) for n in (1, 2, 3)},
    "grouped": convolution(
        "conv2d", lambda: nn.Conv2d(8, 6, 1, groups=2), units=8, out=6, groups={"a.weight": 2, "a.weight#2": 4, "m.weight": 3}
    ),
    "grouped, one output each": convolution("conv1d", lambda: nn.Conv1d(6, 3, 1, groups=3), 1, 6, 3, {"a.weight": 3, "a.weight#2": 2}),
    "depthwise": convolution("conv2d", lambda: nn.Conv2d(6, 6, 2, groups=6), groups={"a.weight": 6}),
    "depthwise with multiplier": convolution("conv2d", lambda: nn.Conv2d(4, 8, 2, groups=4), units=4, out=8, groups={"a.weight": 4}),
    "grouped over whole inputs": own(
        "conv2d",
        lambda s, x: s.b(s.m(x).tanh()) + s.d(s.c(x)),
        lambda: {"m": nn.Conv2d(4, 6, 1, groups=2), "b": nn.Conv2d(6, 2, 1), "c": nn.Conv2d(4, 3, 1), "d": nn.Conv2d(3, 2, 1)},
        (2, 4, 3, 3),
        {"m.weight": 3, "c.weight": 3},
    ),
    "transposed grouped": convolution(
        "conv_transpose2d", lambda: nn.ConvTranspose2d(8, 6, 2, groups=2), units=8, out=6, groups={"a.weight": 4, "m.weight": 3}
    ),
    "transposed depthwise": convolution("conv_transpose2d", lambda: nn.ConvTranspose2d(6, 6, 2, groups=6), groups={"a.weight": 6}),
    "transposed depthwise with multiplier": convolution(
        "conv_transpose1d", lambda: nn.ConvTranspose1d(4, 8, 2, groups=4), 1, units=4, out=8, groups={"m.weight": 2}
    ),
    "convolution": own(
        "convolution",
        lambda s, x: s.b(aten.convolution(s.a(x), s.w, s.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        lambda: {
            "a": nn.Conv2d(2, 6, 1),
            "b": nn.Conv2d(4, 2, 1),
            "w": nn.Parameter(torch.randn(4, 6, 2, 2)),
            "bias": nn.Parameter(torch.randn(4)),
        },
        (2, 2, 3, 3),
        {"a.weight": 6, "w": 4},
    ),
    "convolution by a standardized weight": own(
        "conv2d",
        lambda s, x: s.b(F.conv2d(s.a(x), s.w - s.w.mean((1, 2, 3), keepdim=True), s.bias)),
        lambda: {
            "a": nn.Conv2d(2, 6, 1),
            "b": nn.Conv2d(4, 2, 1),
            "w": nn.Parameter(torch.randn(4, 6, 2, 2)),
            "bias": nn.Parameter(torch.randn(4)),
        },
        (2, 2, 3, 3),
        {"a.weight": 6, "w": 4},
    ),
}


def product(families, function, groups, shape=(2, 3, 5), more=(), **layers):
    """``function(module, x) -> b`` with the layers and parameters named."""
    make = {k: v for k, v in layers.items()}
    return own(families, function, lambda: {k: v() for k, v in make.items()}, shape, groups, *more)


def linear(n, m):
    return lambda: nn.Linear(n, m)


def weight(*shape):
    return lambda: nn.Parameter(torch.randn(shape))


PRODUCTS = {
    "linear": vector("linear", torch.relu),
    "mm": product(
        "mm", lambda s, x: s.b(torch.mm(s.a(x), s.w)), {"a.weight": 6, "w": 4}, (2, 5), a=linear(5, 6), w=weight(6, 4), b=linear(4, 2)
    ),
    "addmm": product(
        "addmm",
        lambda s, x: s.b(torch.addmm(s.v, s.a(x), s.w)),
        {"a.weight": 6, "w": 4},
        (2, 5),
        a=linear(5, 6),
        w=weight(6, 4),
        v=weight(4),
        b=linear(4, 2),
    ),
    "bmm": product(
        "bmm",
        lambda s, x: s.b(torch.bmm(s.a(x).transpose(1, 2), s.c(x)).flatten(1)),
        {"a.weight": 6, "c.weight": 4},
        a=linear(5, 6),
        c=linear(5, 4),
        b=linear(24, 2),
    ),
    "baddbmm": product(
        "baddbmm",
        lambda s, x: s.b(torch.baddbmm(s.v, s.a(x), s.c(x).transpose(1, 2))),
        {"a.weight": 6},
        a=linear(5, 6),
        c=linear(5, 6),
        v=weight(1, 1, 3),
        b=linear(3, 2),
    ),
    "baddbmm of weights of experts": product(
        "baddbmm",
        lambda s, x: s.b(torch.baddbmm(s.v, s.a(x).transpose(0, 1), s.w)).transpose(0, 1),
        {"a.weight": 6, "w": 4},
        a=linear(5, 6),
        w=weight(3, 6, 4),
        v=weight(3, 1, 4),
        b=linear(4, 2),
    ),
    "matmul": product("matmul", lambda s, x: s.b(s.a(x) @ s.w), {"a.weight": 6, "w": 4}, a=linear(5, 6), w=weight(6, 4), b=linear(4, 2)),
    "matmul with broadcast": product(
        "matmul",
        lambda s, x: s.b((s.a(x)[:, None] @ s.w).flatten(2).transpose(1, 2).mean(1)),
        {"a.weight": 6, "w": 3, "w#2": 4},
        a=linear(5, 6),
        w=weight(3, 6, 4),
        b=linear(3, 2),
    ),
    "matmul of activations": product(
        "matmul",
        lambda s, x: s.b(
            (s.a(x).unflatten(-1, (2, 3)).transpose(1, 2) @ s.c(x).unflatten(-1, (2, 3)).permute(0, 2, 3, 1)).transpose(1, 2).flatten(2)
        ),
        {"a.weight": 2, "a.weight#2": 3},
        a=linear(5, 6),
        c=linear(5, 6),
        b=linear(6, 2),
    ),
    "matmul from the left": product(
        "matmul",
        lambda s, x: s.b((s.w @ s.a(x)).flatten(1)),
        {"b.weight": 4, "a.weight": 6},
        a=linear(5, 6),
        w=weight(4, 3),
        b=linear(24, 2),
    ),
    "mv": product("mv", lambda s, x: x.sum(1) + torch.mv(s.a(x), s.w)[:, None], {"a.weight": 6}, (2, 5), a=linear(5, 6), w=weight(6)),
    "dot": product("dot", lambda s, x: x + torch.dot(s.a(x).mean(0), s.w), {"a.weight": 6}, (2, 5), a=linear(5, 6), w=weight(6)),
    "matmul by a vector": product("matmul", lambda s, x: s.b(s.a(x) @ s.w), {"a.weight": 6}, a=linear(5, 6), w=weight(6), b=linear(3, 2)),
    "gram": product(
        "matmul", lambda s, x: s.b((lambda y: y @ (y.transpose(1, 2) @ y))(s.a(x))), {"a.weight": 6}, a=linear(5, 6), b=linear(6, 2)
    ),
    "outer sum and its mean": product(
        "mean",
        lambda s, x: s.b((lambda y: (y.unsqueeze(-1) + y.unsqueeze(-2)).mean(-1))(s.a(x))),
        {"a.weight": 6},
        a=linear(5, 6),
        b=linear(6, 2),
    ),
    "a weight made by a layer": product(
        "bmm view",
        lambda s, x: s.b(torch.bmm(s.a(x).unsqueeze(1), s.h(x).view(-1, 6, 4)).squeeze(1)),
        {"a.weight": 6, "h.weight": 4},
        (2, 5),
        a=linear(5, 6),
        h=linear(5, 24),
        b=linear(4, 2),
    ),
    "einsum": product(
        "einsum",
        lambda s, x: s.b(torch.einsum("btc,cd->btd", s.a(x), s.w)),
        {"a.weight": 6, "w": 4},
        a=linear(5, 6),
        w=weight(6, 4),
        b=linear(4, 2),
    ),
    "einsum of heads": product(
        "einsum",
        lambda s, x: s.b(torch.einsum("bthd,hde->bthe", s.a(x).unflatten(-1, (2, 3)), s.w).flatten(2)),
        {"a.weight": 2, "a.weight#2": 3, "w": 4},
        a=linear(5, 6),
        w=weight(2, 3, 4),
        b=linear(8, 2),
    ),
    "einsum of attention": product(
        "einsum softmax",
        lambda s, x: s.b(
            torch.einsum(
                "bhts,bshd->bthd",
                torch.einsum("bthd,bshd->bhts", s.a(x).unflatten(-1, (2, 3)), s.c(x).unflatten(-1, (2, 3))).softmax(-1),
                s.v(x).unflatten(-1, (2, 4)),
            ).flatten(2)
        ),
        {"a.weight": 2, "a.weight#2": 3, "v.weight": 4},
        a=linear(5, 6),
        c=linear(5, 6),
        v=linear(5, 8),
        b=linear(8, 2),
    ),
    "einsum without an arrow": product(
        "einsum",
        lambda s, x: s.b(torch.einsum("btc,cd", s.a(x), s.w).transpose(1, 2)),
        {"a.weight": 6, "w": 4},
        a=linear(5, 6),
        w=weight(6, 4),
        b=linear(4, 2),
    ),
    "einsum with dots": product(
        "einsum",
        lambda s, x: s.b(torch.einsum("...c,dc->...d", s.a(x), s.w)),
        {"a.weight": 6, "w": 4},
        a=linear(5, 6),
        w=weight(4, 6),
        b=linear(4, 2),
    ),
    "einsum of three": product(
        "einsum",
        lambda s, x: s.b(torch.einsum("btc,btd,cde->bte", s.a(x), s.c(x), s.w)),
        {"a.weight": 6, "c.weight": 3, "w": 4},
        a=linear(5, 6),
        c=linear(5, 3),
        w=weight(6, 3, 4),
        b=linear(4, 2),
    ),
    "einsum that is elementwise": product(
        "einsum",
        lambda s, x: s.b(torch.einsum("btc,btc->bct", s.a(x), s.c(x)).transpose(1, 2)),
        {"a.weight": 6},
        a=linear(5, 6),
        c=linear(5, 6),
        b=linear(6, 2),
    ),
    "einsum that sums": product(
        "einsum",
        lambda s, x: s.b(torch.einsum("btc,bsc->bc", s.a(x), s.c(x))),
        {"a.weight": 6},
        a=linear(5, 6),
        c=linear(5, 6),
        b=linear(6, 2),
    ),
}


def attention(families, groups, heads=2, dims=3, values=4, shared=None, mask=None, **how):
    """Queries ``a``, keys ``k``, values ``v`` of ``heads`` (keys and values: ``shared``) heads, then ``b``."""
    few = shared or heads

    def forward(s, x):
        q, k, v = (y.unflatten(-1, (n, -1)).transpose(1, 2) for y, n in ((s.a(x), s.heads), (s.k(x), s.few), (s.v(x), s.few)))
        given = mask(s, x) if mask else None
        return s.b(F.scaled_dot_product_attention(q, k, v, attn_mask=given, **how).transpose(1, 2).flatten(2))

    def layers():
        return {
            "heads": heads,
            "few": few,
            "a": nn.Linear(5, heads * dims),
            "k": nn.Linear(5, few * dims),
            "v": nn.Linear(5, few * values),
            "b": nn.Linear(heads * values, 2),
            "table": nn.Parameter(torch.randn(heads, 3, 3)),
        }

    return own(families, forward, layers, (2, 3, 5), groups)


HEADS = {"a.weight": 2, "a.weight#2": 3, "v.weight": 4}
SDPA = "scaled_dot_product_attention"
ATTENTION = {
    "attention": attention(SDPA, HEADS),
    "attention with a scale": attention(SDPA, HEADS, scale=0.7),
    "causal attention": attention(SDPA, HEADS, is_causal=True),
    "attention with a mask": attention(SDPA, HEADS, mask=lambda s, x: torch.tril(torch.ones(3, 3, dtype=torch.bool))),
    "attention with a bias of each head": attention(SDPA, HEADS, mask=lambda s, x: s.table[None]),
    "attention with a mask of the input": attention(SDPA, HEADS, mask=lambda s, x: x[:, None, :1, :3] * 0.5),
    "grouped queries": attention(SDPA, {"a.weight": 2, "a.weight#2": 3, "v.weight": 4}, heads=4, shared=2, enable_gqa=True),
    "one key for all queries": attention(SDPA, {"a.weight": 4, "a.weight#2": 3, "v.weight": 4}, heads=4, shared=1, enable_gqa=True),
    "packed": own(
        f"{SDPA} unbind",
        lambda s, x: s.b(
            F.scaled_dot_product_attention(*s.a(x).unflatten(-1, (3, s.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))
            .transpose(1, 2)
            .flatten(2)
        ),
        lambda: {"heads": 2, "a": nn.Linear(5, 24), "b": nn.Linear(8, 2)},
        (2, 3, 5),
        {"a.weight": 2, "a.weight#2": 4},
    ),
    "one head": attention(SDPA, {"a.weight": 3, "v.weight": 4}, heads=1),
}


def normed(families, norm, layer="Conv2d", groups=None, shape=(2, 2, 3, 3), units=6):
    """A normalization between two layers."""
    make = {"Conv2d": lambda n, m: nn.Conv2d(n, m, 1), "Linear": nn.Linear}[layer]
    return own(
        families,
        lambda s, x: s.b(s.n(s.a(x)).tanh()),
        lambda: {"a": make(shape[1] if layer == "Conv2d" else shape[-1], units), "n": norm(), "b": make(units, 2)},
        shape,
        {"a.weight": units} if groups is None else groups,
    )


NORMS = {
    "batch_norm": normed("batch_norm", lambda: nn.BatchNorm2d(6)),
    "batch_norm without affine": normed("batch_norm", lambda: nn.BatchNorm2d(6, affine=False)),
    "batch_norm without statistics": normed("batch_norm", lambda: nn.BatchNorm2d(6, track_running_stats=False)),
    "batch_norm of vectors": normed("batch_norm", lambda: nn.BatchNorm1d(6), "Linear", shape=(2, 5)),
    "_native_batch_norm_legit_no_training": own(
        "_native_batch_norm_legit_no_training",
        lambda s, x: s.b(aten._native_batch_norm_legit_no_training(s.a(x), s.g, s.h, s.m, s.v, 0.1, 1e-5)[0].tanh()),
        lambda: {
            "a": nn.Conv2d(2, 6, 1),
            "b": nn.Conv2d(6, 2, 1),
            "g": nn.Parameter(torch.randn(6)),
            "h": nn.Parameter(torch.randn(6)),
            "m": torch.randn(6),
            "v": torch.rand(6) + 0.5,
        },
        (2, 2, 3, 3),
        {"a.weight": 6},
    ),
    "instance_norm": normed("instance_norm", lambda: nn.InstanceNorm2d(6, affine=True)),
    "instance_norm with statistics": normed("instance_norm", lambda: nn.InstanceNorm2d(6, track_running_stats=True)),
    "group_norm": own(
        "group_norm",
        lambda s, x: s.b(F.group_norm(s.a(x), 2, s.gain, s.shift).tanh()),
        lambda: {
            "a": nn.Conv2d(2, 6, 1),
            "b": nn.Conv2d(6, 2, 1),
            "gain": nn.Parameter(torch.randn(6)),
            "shift": nn.Parameter(torch.randn(6)),
        },
        (2, 2, 3, 3),
        {"a.weight": 2, "a.weight#2": 3},
    ),
    "group_norm of one group": normed("group_norm", lambda: nn.GroupNorm(1, 6)),
    "group_norm of each channel": normed("group_norm", lambda: nn.GroupNorm(6, 6)),
    "group_norm without affine": normed("group_norm", lambda: nn.GroupNorm(2, 6, affine=False), groups={"a.weight": 2, "a.weight#2": 3}),
    "layer_norm": normed("layer_norm", lambda: nn.LayerNorm(6), "Linear", shape=(2, 3, 5)),
    "layer_norm without affine": normed("layer_norm", lambda: nn.LayerNorm(6, elementwise_affine=False), "Linear", shape=(2, 3, 5)),
    "layer_norm without bias": normed("layer_norm", lambda: nn.LayerNorm(6, bias=False), "Linear", shape=(2, 3, 5)),
    "layer_norm of several axes": normed("layer_norm", lambda: nn.LayerNorm((6, 3, 3))),
    "layer_norm beside the axis": image("layer_norm", lambda x: F.layer_norm(x, (4, 4))),
    "rms_norm": normed("rms_norm", lambda: nn.RMSNorm(6), "Linear", shape=(2, 3, 5)),
    "rms_norm of several axes": normed("rms_norm", lambda: nn.RMSNorm((3, 6), elementwise_affine=False), "Linear", shape=(2, 3, 5)),
    "rms_norm by hand": sequence("mean mul", lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)),
    "_weight_norm": own(
        "_weight_norm",
        lambda s, x: s.b(F.linear(x, torch._weight_norm(s.v, s.g, 0)).tanh()),
        lambda: {"v": nn.Parameter(torch.randn(6, 5)), "g": nn.Parameter(torch.rand(6, 1) + 0.5), "b": nn.Linear(6, 2)},
        (2, 5),
        {"v": 6},
    ),
    "_weight_norm over inputs": own(
        "_weight_norm",
        lambda s, x: s.b(F.linear(s.a(x), torch._weight_norm(s.v, s.g, 0)).tanh()),
        lambda: {
            "a": nn.Linear(5, 4),
            "v": nn.Parameter(torch.randn(6, 4)),
            "g": nn.Parameter(torch.rand(6, 1) + 0.5),
            "b": nn.Linear(6, 2),
        },
        (2, 5),
        {"a.weight": 4, "v": 6},
    ),
}


def recurrent(families, layer, groups, out=4, **how):
    """``a``, the recurrent layer ``m``, ``b``."""
    return own(
        families,
        lambda s, x: s.b(s.m(s.a(x))[0]),
        lambda: {"a": nn.Linear(5, 6), "m": layer(6, 4, batch_first=True, **how), "b": nn.Linear(out, 2)},
        (2, 3, 5),
        groups,
    )


def stepped(families, cell):
    def forward(s, x):
        h = s.h(x[:, 0]), s.h(x[:, 0])
        for i in (1, 2):
            h = s.m(s.a(x[:, i]), h if cell is nn.LSTMCell else h[0])
            h = h if isinstance(h, tuple) else (h, h)
        return s.b(h[0])

    return own(
        families,
        forward,
        lambda: {"a": nn.Linear(5, 6), "h": nn.Linear(5, 4), "m": cell(6, 4), "b": nn.Linear(4, 2)},
        (2, 3, 5),
        {"a.weight": 6, "h.weight": 4},
    )


RECURRENT = {
    "lstm": recurrent("lstm", nn.LSTM, {"a.weight": 6, "m.weight_ih_l0": 4}),
    "lstm of two layers and directions": recurrent(
        "lstm", nn.LSTM, {"a.weight": 6, "m.weight_ih_l0": 4}, 8, num_layers=2, bidirectional=True
    ),
    "gru": recurrent("gru", nn.GRU, {"a.weight": 6, "m.weight_ih_l0": 4}),
    "rnn_tanh": recurrent("rnn_tanh", nn.RNN, {"a.weight": 6, "m.weight_ih_l0": 4}),
    "rnn_relu": recurrent("rnn_relu", nn.RNN, {"a.weight": 6, "m.weight_ih_l0": 4}, nonlinearity="relu"),
    "lstm_cell": stepped("lstm_cell", nn.LSTMCell),
    "gru_cell": stepped("gru_cell", nn.GRUCell),
    "rnn_tanh_cell": stepped("rnn_tanh_cell", nn.RNNCell),
    "rnn_relu_cell": stepped("rnn_relu_cell", lambda n, m: nn.RNNCell(n, m, nonlinearity="relu")),
}
EMBEDDINGS = {
    "embedding": own(
        "embedding",
        lambda s, i: s.b(s.e(i).tanh()),
        lambda: {"e": nn.Embedding(7, 6), "b": nn.Linear(6, 2)},
        lambda: (torch.tensor([[1, 2, 3], [4, 0, 6]]),),
        {"e.weight": 6},
    ),
    "tied embedding": own(
        "embedding linear",
        lambda s, i: F.linear(s.b(s.e(i)).tanh(), s.e.weight),
        lambda: {"e": nn.Embedding(7, 6), "b": nn.Linear(6, 6)},
        lambda: (torch.tensor([[1, 2, 3], [4, 0, 6]]),),
        {"e.weight": 6},
    ),
}
EXAMPLES = {**CONVOLUTIONS, **PRODUCTS, **ATTENTION, **NORMS, **RECURRENT, **EMBEDDINGS}
