# mypy: ignore-errors
"""Data movement: joins, pieces, places, repetitions and windows, along prunable axes and beside them."""

from __future__ import annotations

import torch
from rule_kit import aten, image, own, sequence, vector, whole
from torch import nn


def two(families, function, out, groups=None, first=4, second=6):
    """``[batch, 3, 5] -> a, c -> function(a, c) -> b``."""
    layers = lambda: {"a": nn.Linear(5, first), "c": nn.Linear(5, second), "b": nn.Linear(out, 2)}  # noqa: E731
    return own(families, lambda s, x: s.b(function(s.a(x), s.c(x))), layers, (2, 3, 5), groups or {"a.weight": first, "c.weight": second})


def halves(families, function, sizes=(3, 3), groups=None, shape=(2, 5)):
    """``[..., 5] -> a -> function -> pieces -> one layer each``, added up."""

    def forward(s, x):
        return sum(layer(piece.tanh()) for layer, piece in zip((getattr(s, k, None) for k in "bcd"), function(s.a(x)), strict=False))

    layers = lambda: {"a": nn.Linear(5, sum(sizes)), **{k: nn.Linear(n, 2) for k, n in zip("bcd", sizes, strict=False)}}  # noqa: E731
    found = {"a.weight" + (f"#{i + 1}" if i else ""): n for i, n in enumerate(sizes)}
    return own(families, forward, layers, shape, found if groups is None else groups)


def last(x, index):
    return torch.tensor(index)


def shared(families, function, heads=2, dims=3, groups=None, out=None):
    """``[batch, 3, 5] -> a -> [batch, 3, heads, dims] -> function -> flatten -> b``: two choices on two axes."""
    groups = {"a.weight": heads, "a.weight#2": dims} if groups is None else groups
    return sequence(families, lambda x: function(x.unflatten(-1, (heads, dims))).flatten(2), heads * dims, out, groups)


SHAPES = {
    "view": shared("unflatten flatten", lambda x: x.view(x.shape[0], 3, 2, 3)),
    "view of a literal": sequence("view", lambda x: x.view(-1, 3, 2, 3).sin().view(-1, 3, 6), groups={"a.weight": 2, "a.weight#2": 3}),
    "view that flattens": sequence("view", lambda x: x.view(x.shape[0], 18), out=18),
    "reshape": sequence("reshape", lambda x: x.transpose(1, 2).reshape(x.shape[0], 18), out=18),
    "reshape to -1": sequence("reshape", lambda x: x.transpose(1, 2).reshape(x.shape[0], -1), out=18),
    "flatten": image("flatten", lambda x: x.flatten(1)[..., None, None], out=96),
    "unflatten": sequence("unflatten", lambda x: x.unflatten(-1, (2, 3)).sin().flatten(-2), groups={"a.weight": 2, "a.weight#2": 3}),
    "view_as": sequence("view_as", lambda x: aten.view_as(x, x.exp())),
    "reshape_as": sequence("reshape_as", lambda x: aten.reshape_as(x, x.exp())),
    "ravel": own(
        "ravel",
        lambda s, x: s.b(torch.ravel(s.a(x).mean((0, 1)))) + x.sum((1, 2))[:, None],
        lambda: {"a": nn.Linear(5, 6), "b": nn.Linear(6, 2)},
        (2, 3, 5),
        {"a.weight": 6},
    ),
    "atleast_2d": own(
        "atleast_2d",
        lambda s, x: s.b(torch.atleast_2d(s.a(x).mean(0))) + x.sum(1)[:, None],
        lambda: {"a": nn.Linear(5, 6), "b": nn.Linear(6, 2)},
        (2, 5),
        {"a.weight": 6},
    ),
    "atleast_3d": sequence("atleast_3d", torch.atleast_3d),
    "unsqueeze": vector("unsqueeze", lambda x: x.unsqueeze(-2).unsqueeze(1).squeeze(-2).sum(1)),
    "squeeze": vector("squeeze", lambda x: x[:, None].squeeze(1)),
    "squeeze of every axis": vector("squeeze", lambda x: x[:, None, :, None].squeeze()),
    "squeeze_copy": vector("squeeze_copy", lambda x: aten.squeeze_copy.dim(x[:, None], 1)),
}
ORDER = {
    "permute": sequence("permute", lambda x: x.permute(0, -1, 1).sin().permute(0, 2, 1)),
    "transpose": sequence("transpose", lambda x: x.transpose(-1, -2).sin().transpose(1, 2)),
    "t": vector("t", lambda x: x.t().sin().t()),
    "movedim": sequence("movedim", lambda x: x.movedim(-1, 1).sin().movedim(1, -1)),
    "moveaxis": sequence("moveaxis", lambda x: torch.moveaxis(torch.moveaxis(x, 2, 0), 0, 2)),
    "swapaxes": sequence("swapaxes", lambda x: torch.swapaxes(torch.swapaxes(x, 2, 1), 1, 2)),
    "swapdims": sequence("swapdims", lambda x: torch.swapdims(torch.swapdims(x, 2, 1), 1, 2)),
    "adjoint": sequence("adjoint", lambda x: x.adjoint().sin().adjoint()),
    "mT": sequence("mT", lambda x: x.mT.sin().mT),
    "numpy_T": vector("numpy_T", lambda x: aten.numpy_T(aten.numpy_T(x).sin())),
    "flip": sequence("flip", lambda x: x.flip(1)),
    "flip of the prunable axis": sequence("flip", lambda x: x.flip([-1, 1])),
    "flip of one half": sequence("cat slice", lambda x: torch.cat([x[..., :3].flip(-1), x[..., 3:]], -1) * x, groups={"a.weight#3": 3}),
    "fliplr": vector("fliplr", torch.fliplr),
    "flipud": sequence("flipud", lambda x: torch.flipud(x.transpose(0, 1)).transpose(0, 1)),
    "rot90": sequence("rot90", lambda x: torch.rot90(x, 1, [1, 2]).transpose(1, 2)),
    "roll": sequence("roll", lambda x: x.roll(1, 1)),
    "roll of the prunable axis": sequence("roll", lambda x: x.roll(2, -1), groups={"a.weight": 6}),
}
JOINS = {
    "cat": two("cat", lambda x, y: torch.cat([x, y], -1), 10),
    "cat along another axis": two("cat", lambda x, y: torch.cat([x, y], 1), 6, {"a.weight": 6}, 6),
    "cat with itself": sequence("cat", lambda x: torch.cat([x, x], -1), out=12),
    "cat with a constant": sequence(
        "cat", lambda x: torch.cat([x, torch.ones(x.shape[0], 3, 2, dtype=x.dtype)], -1), out=8, groups={"a.weight": 6, "b.weight": 2}
    ),
    "register tokens": own(
        "cat",
        lambda s, x: s.b(torch.cat([s.tokens.expand(x.shape[0], -1, -1), s.a(x)], 1)),
        lambda: {"a": nn.Linear(5, 6), "b": nn.Linear(6, 2), "tokens": nn.Parameter(torch.randn(1, 4, 6))},
        (2, 3, 5),
        {"a.weight": 6},
    ),
    "concat": two("concat", lambda x, y: aten.concat([x, y], -1), 10),
    "concatenate": two("concatenate", lambda x, y: aten.concatenate([x, y], -1), 10),
    "stack": two("stack", lambda x, y: torch.stack([x, y], 1).flatten(1, 2), 6, {"a.weight": 6}, 6),
    "stack along the last axis": two("stack", lambda x, y: torch.stack([x, y], -1).flatten(2), 12, {"a.weight": 6}, 6),
    "hstack": own(
        "hstack",
        lambda s, x: s.b(torch.hstack([s.a(x), s.c(x)])),
        lambda: {"a": nn.Linear(5, 4), "c": nn.Linear(5, 6), "b": nn.Linear(10, 2)},
        (2, 5),
        {"a.weight": 4, "c.weight": 6},
    ),
    "vstack": two("vstack", lambda x, y: torch.vstack([x.transpose(0, 1), y.transpose(0, 1)]).transpose(0, 1), 6, {"a.weight": 6}, 6),
    "dstack": two("dstack", lambda x, y: torch.dstack([x, y]), 10),
    "column_stack": own(
        "column_stack",
        lambda s, x: s.b(torch.column_stack([s.a(x), s.c(x)])),
        lambda: {"a": nn.Linear(5, 4), "c": nn.Linear(5, 6), "b": nn.Linear(10, 2)},
        (2, 5),
        {"a.weight": 4, "c.weight": 6},
    ),
}
PIECES = {
    "split": halves("split", lambda x: x.split(3, -1)),
    "split that is uneven": halves("split", lambda x: x.split(4, -1), (4, 4, 2)),
    "split_with_sizes": halves("split_with_sizes", lambda x: torch.split_with_sizes(x, [2, 4], 1), (2, 4)),
    "chunk": halves("chunk", lambda x: x.chunk(2, -1)),
    "chunk that is uneven": halves("chunk", lambda x: x.chunk(2, -1), (4, 3)),
    "chunk of another axis": sequence("chunk", lambda x: torch.cat(x.chunk(3, 1)[::-1], 1)),
    "unsafe_split": halves("unsafe_split", lambda x: aten.unsafe_split(x, 3, -1)),
    "unsafe_chunk": halves("unsafe_chunk", lambda x: aten.unsafe_chunk(x, 2, -1)),
    "hsplit": halves("hsplit", lambda x: aten.hsplit(x, 2)),
    "vsplit": sequence("vsplit", lambda x: torch.cat(aten.vsplit(x.transpose(0, 1), [1, 2])[::-1]).transpose(0, 1)),
    "tensor_split": halves("tensor_split", lambda x: torch.tensor_split(x, 2, -1), (4, 3)),
    "tensor_split at places": halves(
        "tensor_split", lambda x: torch.tensor_split(x, [2, 3], -1), (2, 1, 4), {"a.weight": 2, "a.weight#3": 4}
    ),
    "unbind": sequence("unbind", lambda x: sum(x.unbind(1))),
    "unbind of parts": own(
        "unbind unflatten",
        lambda s, x: s.b((lambda q, k, v: q * k + v)(*s.a(x).unflatten(-1, (3, 4)).unbind(-2))),
        lambda: {"a": nn.Linear(5, 12), "b": nn.Linear(4, 2)},
        (2, 5),
        {"a.weight": 4},
    ),
    "slice": halves("slice", lambda x: (x[:, :2], x[:, -4:]), (2, 4)),
    "slice of another axis": sequence("slice", lambda x: x[:, :-1]),
    "slice with a stride": sequence("slice", lambda x: x[:, ::2]),
    "slice with a stride along the prunable axis": sequence("slice", lambda x: x[..., ::2], out=3, groups={"a.weight": 3, "a.weight#2": 3}),
    "rotary pairs": sequence(
        "slice stack flatten", lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) + x, 8, 8, {"a.weight": 4}
    ),
    "rotary halves": sequence("chunk cat neg", lambda x: torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) + x, 8, 8, {"a.weight": 4}),
    "narrow": halves("narrow", lambda x: (x.narrow(1, 0, 2), x.narrow(1, 2, 4)), (2, 4)),
    "select": sequence("select", lambda x: x[:, -1]),
    "select of parts": own(
        "select unflatten",
        lambda s, x: s.b((lambda y: y[:, 0] * y[:, 1].tanh())(s.a(x).unflatten(-1, (2, 4)))),
        lambda: {"a": nn.Linear(5, 8), "b": nn.Linear(4, 2)},
        (2, 5),
        {"a.weight": 4},
    ),
    "diagonal of space": image("diagonal", lambda x: x.diagonal(0, 2, 3).unsqueeze(-1)),
}
REPEATS = {
    "expand": vector("expand", lambda x: x[:, None].expand(-1, 4, -1)),
    "expand of heads": own(
        "expand",
        lambda s, x: s.b((s.a(x)[:, None].expand(-1, 3, -1) * s.c(x).unflatten(-1, (3, 4))).flatten(1)),
        lambda: {"a": nn.Linear(5, 4), "c": nn.Linear(5, 12), "b": nn.Linear(12, 2)},
        (2, 5),
        {"a.weight": 4, "c.weight": 3},
    ),
    "expand_as": own(
        "expand_as",
        lambda s, x: s.b(s.a(x)[:, None].expand_as(s.c(x[:, None].expand(-1, 3, -1)))),
        lambda: {"a": nn.Linear(5, 6), "c": nn.Linear(5, 6), "b": nn.Linear(6, 2)},
        (2, 5),
        {"a.weight": 6},
    ),
    "expand_copy": vector("expand_copy", lambda x: aten.expand_copy(x[:, None], [-1, 4, -1])),
    "broadcast_to": vector("broadcast_to", lambda x: aten.broadcast_to(x[:, None], [x.shape[0], 4, 6])),
    "repeat": vector("repeat", lambda x: x[:, None].repeat(1, 4, 1)),
    "repeat of the prunable axis": vector("repeat", lambda x: x.repeat(1, 2), out=12),
    "tile": vector("tile", lambda x: torch.tile(x[:, None], (1, 4, 1))),
    "tile of the prunable axis": vector("tile", lambda x: torch.tile(x, (2,)), out=12),
    "repeat_interleave": vector("repeat_interleave", lambda x: x.repeat_interleave(2, -1), out=12),
    "repeat_interleave of another axis": sequence("repeat_interleave", lambda x: x.repeat_interleave(2, 1)),
    "repeat_interleave by numbers": sequence(
        "repeat_interleave", lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 1]), dim=1, output_size=4)
    ),
}
CHANNELS = {
    "pixel_shuffle": image("pixel_shuffle", lambda x: aten.pixel_shuffle(x, 2), 8, 2, {"a.weight": 2}),
    "pixel_unshuffle": image("pixel_unshuffle", lambda x: aten.pixel_unshuffle(x, 2), 6, 24),
    "channel_shuffle": image("channel_shuffle", lambda x: aten.channel_shuffle(x, 2), groups={"a.weight": 2, "a.weight#2": 3}),
    "channel_shuffle of places": sequence("channel_shuffle", lambda x: aten.channel_shuffle(x[:, [0, 1, 2, 0]], 2)),
    "unfold": sequence("unfold", lambda x: x.unfold(1, 2, 1).transpose(-1, -2)),
    "unfold of the prunable axis": sequence("unfold", lambda x: x.unfold(2, 3, 3).flatten(2), groups={"a.weight": 2}),
    "slice_scatter": sequence("slice_scatter", lambda x: torch.slice_scatter(x, x[:, :2].tanh(), 1, 1, 3)),
    "slice_scatter along the prunable axis": sequence(
        "slice_scatter", lambda x: torch.slice_scatter(x, x[..., :2].tanh(), -1, 0, 2), groups={"a.weight": 2, "a.weight#2": 4}
    ),
    "select_scatter": sequence("select_scatter", lambda x: torch.select_scatter(x, x[:, 0].tanh(), 1, 1)),
    "select_scatter along the prunable axis": sequence(
        "select_scatter", lambda x: torch.select_scatter(x, x[..., 0].tanh(), 2, 0), groups={"a.weight#2": 5}
    ),
}
INDEX = {
    "index": sequence("index", lambda x: x[:, torch.tensor([2, 0, 0])]),
    "index along the prunable axis": sequence("index", lambda x: x[..., torch.tensor([5, 0, 1, 4, 3, 2])]),
    "index of some of the prunable axis": sequence(
        "index", lambda x: x[..., torch.tensor([5, 1])] + x[..., torch.tensor([0, 2])], out=2, groups={"a.weight": 2, "a.weight#2": 2}
    ),
    "index that is not known": own(
        "index",
        lambda s, x: s.b(s.a(x)[:, x[0, :, 0].argsort()]),
        lambda: {"a": nn.Linear(5, 6), "b": nn.Linear(6, 2)},
        (2, 3, 5),
        {"a.weight": 6},
    ),
    "index by two tensors": sequence("index", lambda x: x[torch.arange(x.shape[0])[:, None], torch.tensor([[1, 2]])]),
    "index by an input": own(
        "index",
        lambda s, x, i: s.b(s.a(x)[torch.arange(x.shape[0]), i]),
        lambda: {"a": nn.Linear(5, 6), "b": nn.Linear(6, 2)},
        lambda: (torch.randn(2, 3, 5), torch.tensor([0, 2])),
        {"a.weight": 6},
    ),
    "index of a table": own(
        "index",
        lambda s, x, i: s.b(s.a(x) + s.table[i]),
        lambda: {"a": nn.Linear(5, 6), "b": nn.Linear(6, 2), "table": nn.Parameter(torch.randn(4, 6))},
        lambda: (torch.randn(2, 3, 5), torch.tensor([[0, 2, 1], [3, 3, 0]])),
        {"a.weight": 6},
    ),
    "index_select": sequence("index_select", lambda x: x.index_select(1, torch.tensor([1, 1, 0]))),
    "index_select along the prunable axis": sequence("index_select", lambda x: x.index_select(-1, torch.tensor([5, 0, 1, 4, 3, 2]))),
}
EXAMPLES = {**SHAPES, **ORDER, **JOINS, **PIECES, **REPEATS, **CHANNELS, **INDEX}

#: movements that cannot follow a choice among the units of the last axis
FROZEN = {
    "unfold that overlaps": whole(lambda x: x.unfold(2, 2, 1).flatten(2), out=10),
    "index by places of the input": whole(lambda x: x[:, :, x[0, 0].argsort()]),
    "index_select by places of the input": whole(lambda x: x.index_select(2, x[0, 0].argsort())),
    "one axis of all": whole(lambda x: x.transpose(1, 2).flatten(1).unfold(1, 7, 1), (2, 3, 5), 7),
}
