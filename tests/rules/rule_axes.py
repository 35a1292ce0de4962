# mypy: ignore-errors
"""Operators that work along some axes (space, time, order, reductions), and tensors that forward makes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from rule_kit import aten, image, own, sequence, whole
from torch import nn


def grid(x, *space):
    """Places to sample at, in [-1, 1], from the input."""
    return torch.tanh(x.flatten(1)[:, : math.prod(space) * len(space)].unflatten(1, (*space, len(space))))


def sampled(families, function, dims=2):
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
    return own(
        families,
        lambda s, x: s.b(function(s.a(x), grid(x, *[2] * dims))),
        lambda: {"a": conv(3, 6, 1), "b": conv(6, 2, 1)},
        (2, 3, *[3] * dims),
        {"a.weight": 6},
    )


SPATIAL = {
    **{f"max_pool{n}d": image(f"max_pool{n}d", lambda x, n=n: getattr(F, f"max_pool{n}d")(x, 2), dims=n) for n in (1, 2, 3)},
    **{f"avg_pool{n}d": image(f"avg_pool{n}d", lambda x, n=n: getattr(F, f"avg_pool{n}d")(x, 2), dims=n) for n in (1, 2, 3)},
    **{
        f"adaptive_{kind}_pool{n}d": image(
            f"adaptive_{kind}_pool{n}d", lambda x, n=n, k=kind: getattr(F, f"adaptive_{k}_pool{n}d")(x, 2), dims=n
        )
        for n in (1, 2, 3)
        for kind in ("avg", "max")
    },
    **{
        f"max_pool{n}d_with_indices": image(
            f"max_pool{n}d_with_indices", lambda x, n=n: getattr(aten, f"max_pool{n}d_with_indices")(x, [2] * n)[0], dims=n
        )
        for n in (1, 2, 3)
    },
    **{
        f"{kind}_pad{n}d": image(f"{kind}_pad{n}d", lambda x, n=n, k=kind: getattr(aten, f"{k}_pad{n}d")(x, [1] * 2 * n), dims=n, size=3)
        for n in (1, 2, 3)
        for kind in ("reflection", "replication")
    },
    "pad by reflection": image("pad", lambda x: F.pad(x, (1, 1, 2, 0), mode="reflect")),
    "pad of space": image("pad", lambda x: F.pad(x, (1, 2, 0, 1), value=0.5)),
    "pad of channels behind": image("pad", lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)), out=8, groups={"a.weight": 6, "b.weight": 2}),
    "pad of channels on both sides": image(
        "pad", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5), out=9, groups={"a.weight": 6, "b.weight": 3}
    ),
    "pad of channels that are added": own(
        "pad",
        lambda s, x: s.b(s.a(x) + F.pad(s.c(x), (0, 0, 0, 0, 2, 0))),
        lambda: {"a": nn.Conv2d(2, 6, 1), "c": nn.Conv2d(2, 4, 1), "b": nn.Conv2d(6, 2, 1)},
        (2, 2, 3, 3),
        {"a.weight": 2, "a.weight#2": 4},
    ),
    "constant_pad_nd": image("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [1, 1], 0.5)),
    "upsample_nearest1d": image("upsample_nearest1d", lambda x: F.interpolate(x, scale_factor=2), dims=1),
    "upsample_nearest2d": image("upsample_nearest2d", lambda x: F.interpolate(x, size=(6, 5))),
    "upsample_nearest3d": image("upsample_nearest3d", lambda x: F.interpolate(x, scale_factor=2), dims=3, size=2),
    "upsample_linear1d": image("upsample_linear1d", lambda x: F.interpolate(x, scale_factor=2, mode="linear"), dims=1),
    "upsample_bilinear2d": image("upsample_bilinear2d", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)),
    "upsample_bicubic2d": image("upsample_bicubic2d", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    "upsample_trilinear3d": image("upsample_trilinear3d", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), dims=3, size=2),
    "_upsample_nearest_exact1d": image("_upsample_nearest_exact1d", lambda x: F.interpolate(x, size=6, mode="nearest-exact"), dims=1),
    "_upsample_nearest_exact2d": image("_upsample_nearest_exact2d", lambda x: F.interpolate(x, size=6, mode="nearest-exact")),
    "_upsample_bilinear2d_aa": image("_upsample_bilinear2d_aa", lambda x: F.interpolate(x, size=2, mode="bilinear", antialias=True)),
    "_upsample_bicubic2d_aa": image("_upsample_bicubic2d_aa", lambda x: F.interpolate(x, size=2, mode="bicubic", antialias=True)),
    "grid_sampler": sampled("grid_sampler", lambda x, g: F.grid_sample(x, g, align_corners=False)),
    "grid_sampler_2d": sampled("grid_sampler_2d", lambda x, g: aten.grid_sampler_2d(x, g, 0, 0, False)),
    "grid_sampler_3d": sampled("grid_sampler_3d", lambda x, g: aten.grid_sampler_3d(x, g, 0, 0, False), 3),
    "im2col": own(
        "im2col",
        lambda s, x: s.b(F.unfold(s.a(x), 2).transpose(1, 2)),
        lambda: {"a": nn.Conv2d(2, 6, 1), "b": nn.Linear(24, 2)},
        (2, 2, 3, 3),
        {"a.weight": 6},
    ),
    "col2im": own(
        "col2im",
        lambda s, x: s.b(F.fold(s.a(x).transpose(1, 2), (3, 3), 2)),
        lambda: {"a": nn.Linear(5, 12), "b": nn.Conv2d(3, 2, 1)},
        (2, 4, 5),
        {"a.weight": 3},
    ),
    "pooled and joined": image(
        "cat adaptive_avg_pool2d expand", lambda x: torch.cat([x, F.adaptive_avg_pool2d(x, 1).expand(-1, -1, 4, 4)], 1), out=12
    ),
}


def transform(name, *, size=4):
    """A Fourier transform over the places of an image, and its absolute value."""
    return image(name, lambda x: getattr(torch.fft, name.removeprefix("fft_"))(x).abs(), size=size)


FOURIER = {
    **{
        name: transform(name)
        for name in ["fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2"]
    },
    "fft_hfft": image("fft_hfft", lambda x: torch.fft.hfft(x)),
    **{
        name: image(name, lambda x, n=name: getattr(torch.fft, n.removeprefix("fft_"))(x, dim=(2, 3)).abs())
        for name in ["fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn"]
    },
    "a filter of frequencies": own(
        "fft_rfft2 fft_irfft2 mul view_as_complex",
        lambda s, x: s.b(torch.fft.irfft2(torch.fft.rfft2(s.a(x)) * torch.view_as_complex(s.w), s=(4, 4))),
        lambda: {"a": nn.Conv2d(2, 6, 1), "w": nn.Parameter(torch.randn(6, 4, 3, 2)), "b": nn.Conv2d(6, 2, 1)},
        (2, 2, 4, 4),
        {"a.weight": 6},
    ),
    "view_as_complex": sequence(
        "view_as_complex",
        lambda x: torch.view_as_complex(torch.stack([x, x + 1], -1)).abs() * torch.view_as_complex(torch.stack([x, x], -1)).imag,
    ),
    "view_as_real": sequence("view_as_real", lambda x: torch.view_as_real(torch.complex(x, x.sin())).flatten(2), out=12),
    "rotary complex": own(
        "view_as_complex view_as_real mul",
        lambda s, x: s.b(
            torch.view_as_real(
                torch.view_as_complex(s.a(x).unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(s.angle), s.angle)
            ).flatten(2)
        ),
        lambda: {"a": nn.Linear(5, 8), "angle": torch.rand(3, 4), "b": nn.Linear(8, 2)},
        (2, 3, 5),
        {"a.weight": 4},
    ),
}
TRIANGLES = {
    "tril": image("tril", torch.tril),
    "triu": image("triu", lambda x: x.triu(1)),
}
SELECTION = {
    "sort": sequence("sort", lambda x: x.sort(1)[0]),
    "sort with places": sequence("sort", lambda x: (lambda v, i: v * i)(*x.sort(dim=1, descending=True))),
    "topk": sequence("topk", lambda x: x.topk(2, 1)[0]),
    "argsort": sequence("argsort", lambda x: x * x.argsort(1)),
    "kthvalue": sequence("kthvalue", lambda x: x.kthvalue(2, 1, keepdim=True)[0] + x),
    "gather": sequence("gather", lambda x: x.gather(1, x.argsort(1))),
    "gather of one index": own(
        "gather",
        lambda s, x, i: s.b(s.a(x).gather(1, i[:, None, None].expand(-1, 1, 6))),
        lambda: {"a": nn.Linear(5, 6), "b": nn.Linear(6, 2)},
        lambda: (torch.randn(2, 3, 5), torch.tensor([0, 2])),
        {"a.weight": 6},
    ),
    "take_along_dim": sequence("take_along_dim", lambda x: torch.take_along_dim(x, x.argsort(1), 1)),
    "take_along_dim with broadcast": sequence(
        "take_along_dim", lambda x: torch.take_along_dim(x, x.detach().sum(-1, keepdim=True).argsort(1), 1)
    ),
}


def reduced(families, function, **more):
    """A reduction over places, one over units with keepdim beside what is reduced."""
    return sequence(families, function, **more)


REDUCTION = {
    **{name: sequence(name, lambda x, n=name: getattr(x, n)(1)) for name in ["mean", "sum", "amax", "amin", "std", "var"]},
    **{
        f"{name} of the prunable axis": sequence(f"{name}", lambda x, n=name: x * getattr(x, n)(-1, keepdim=True))
        for name in ["mean", "sum", "amax", "amin"]
    },
    "std of the prunable axis": sequence("std", lambda x: x * x.std((1, 2), keepdim=True)),
    "var of the prunable axis": sequence("var", lambda x: x * x.var(-1, correction=0, keepdim=True)),
    "sum of several axes": image("sum", lambda x: x.sum((-1, 2), keepdim=True)),
    "mean of everything but the batch": image("mean", lambda x: x * x.mean((1, 2, 3), keepdim=True)),
    "logsumexp": sequence("logsumexp", lambda x: x.logsumexp(1)),
    "logsumexp of the prunable axis": sequence("logsumexp", lambda x: x - x.logsumexp(-1, keepdim=True)),
    "any": sequence("any", lambda x: x[:, 0] * (x > 0).any(1)),
    "all": sequence("all", lambda x: x[:, 0] * (x > 0).all(1)),
    "max": sequence("max", lambda x: x.max(1)[0]),
    "min": sequence("min", lambda x: x.min(1, keepdim=True)[0] + x),
    "max of two": sequence("max", lambda x: torch.max(x, x.sin())),
    "min of two": sequence("min", lambda x: torch.min(x, x.sin().mean(1, keepdim=True))),
    "linalg_vector_norm": sequence("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, dim=1)),
    "linalg_vector_norm of the prunable axis": sequence(
        "linalg_vector_norm", lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    ),
    "norm": sequence("norm", lambda x: aten.norm(x, 2, [1])),
    "frobenius_norm": image("frobenius_norm", lambda x: aten.frobenius_norm(x, [2, 3], True)),
    "std_mean": sequence("std_mean", lambda x: (lambda s, m: s * m)(*torch.std_mean(x, 1))),
    "var_mean": sequence("var_mean", lambda x: (lambda v, m: (x - m) / (v + 1).sqrt())(*torch.var_mean(x, -1, correction=0, keepdim=True))),
    "var_mean of places": sequence("var_mean", lambda x: (lambda v, m: (x - m) * v)(*torch.var_mean(x, 1, keepdim=True))),
    "log_softmax of places": sequence("log_softmax", lambda x: F.log_softmax(x, 1)),
    "argmax": sequence("argmax", lambda x: x[:, 0] * x.argmax(1)),
    "argmin": sequence("argmin", lambda x: x * x.argmin(1, keepdim=True)),
    "prod": sequence("prod", lambda x: x.prod(1)),
    "median": sequence("median", lambda x: x.median(1)[0]),
    "mode": sequence("mode", lambda x: x.mode(1)[0]),
    "softmax": sequence("softmax", lambda x: x.softmax(1)),
    "softmax of the prunable axis": sequence("softmax", lambda x: x.softmax(-1)),
    "log_softmax": sequence("log_softmax", lambda x: F.log_softmax(x, -1)),
    "_softmax": sequence("_softmax", lambda x: aten._softmax(x, 1, False)),
    "_log_softmax": sequence("_log_softmax", lambda x: aten._log_softmax(x, 1, False)),
    "cumsum": sequence("cumsum", lambda x: x.cumsum(1)),
    "cumprod": sequence("cumprod", lambda x: x.cumprod(-2)),
    "logcumsumexp": sequence("logcumsumexp", lambda x: x.logcumsumexp(1)),
    "cummax": sequence("cummax", lambda x: x.cummax(1)[0]),
    "cummin": sequence("cummin", lambda x: x.cummin(1)[0] + x),
}


def positions(x, width):
    """Sines and cosines of places, built where they are used."""
    place = torch.arange(x.shape[1], device=x.device).double()[:, None]
    rate = torch.exp(torch.arange(0, width, 2).double() * (-math.log(100.0) / width))
    table = torch.zeros(x.shape[1], width, dtype=x.dtype)
    table[:, 0::2] = torch.sin(place * rate)
    table[:, 1::2] = torch.cos(place * rate)
    return table


CONSTANTS = {
    "arange": sequence("add", lambda x: x + torch.arange(6).double()),
    "arange of places": sequence("add", lambda x: x + torch.arange(x.shape[1]).double()[:, None]),
    "linspace": sequence("mul", lambda x: x * torch.linspace(0.5, 1.5, 6, dtype=x.dtype)),
    "zeros": sequence("cat", lambda x: torch.cat([torch.zeros(x.shape[0], 1, 6, dtype=x.dtype), x], 1)),
    "full": sequence("maximum", lambda x: torch.maximum(x, torch.full((6,), 0.1, dtype=x.dtype))),
    "eye": sequence("matmul", lambda x: x @ torch.eye(6, dtype=x.dtype), groups={"a.weight": 6, "b.weight": 6}),
    "positions": sequence("add", lambda x: x + positions(x, 6)),
    "positions of halves": sequence(
        "add", lambda x: x + torch.cat([torch.outer(torch.arange(3.0), torch.arange(3.0)).sin(), torch.ones(3, 3)], -1).to(x.dtype)
    ),
    "new_zeros": sequence("new_zeros cat", lambda x: torch.cat([x.new_zeros(x.shape[0], 1, 6), x], 1)),
    "new_ones": sequence("new_ones mul", lambda x: x * x.new_ones(6)),
    "new_full": sequence("new_full add", lambda x: x + x.new_full((3, 6), 0.5)),
    "a table of places for each head": own(
        "softmax add",
        lambda s, x: s.b(
            (
                (
                    s.a(x).unflatten(-1, (2, 3)).permute(0, 2, 1, 3) @ s.c(x).unflatten(-1, (2, 3)).permute(0, 2, 3, 1)
                    + torch.linspace(0, 1, 18, dtype=x.dtype).view(2, 3, 3)
                ).softmax(-1)
                @ s.v(x)[:, None]
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        lambda: {"a": nn.Linear(5, 6), "c": nn.Linear(5, 6), "v": nn.Linear(5, 4), "b": nn.Linear(8, 2)},
        (2, 3, 5),
        {"a.weight": 2, "a.weight#2": 3, "v.weight": 4},
    ),
}
EXAMPLES = {**SPATIAL, **FOURIER, **TRIANGLES, **SELECTION, **REDUCTION, **CONSTANTS}

#: functions that mix the units of the last axis
FROZEN = {
    "sort": whole(lambda x: x.sort(-1)[0]),
    "sort that is stable": whole(lambda x: x.sort(dim=-1, stable=True)[0]),
    "sort that is stable of channels": whole(lambda x: x.transpose(1, 2).sort(dim=1, stable=True)[0].transpose(1, 2)),
    "argsort that is stable of channels": whole(lambda x: x * x.transpose(1, 2).argsort(dim=1, stable=True).transpose(1, 2)),
    "topk": whole(lambda x: x.topk(2, -1)[0], out=2),
    "kthvalue": whole(lambda x: x + x.kthvalue(2, -1, keepdim=True)[0]),
    "gather": whole(lambda x: x.gather(2, x.argsort(1).clamp(max=2))),
    "take_along_dim": whole(lambda x: torch.take_along_dim(x, x.argsort(1), 2)),
    "cumsum": whole(lambda x: x.cumsum(-1)),
    "cumsum of channels": whole(lambda x: x.transpose(1, 2).cumsum(1).transpose(1, 2)),
    "cumprod": whole(lambda x: x.cumprod(2)),
    "logcumsumexp": whole(lambda x: x.logcumsumexp(-1)),
    "cummax": whole(lambda x: x.cummax(-1)[0]),
    "cummin": whole(lambda x: x.cummin(-1)[0]),
    "argmax": whole(lambda x: x * x.argmax(-1, keepdim=True)),
    "median with places": whole(lambda x: x * x.median(-1, keepdim=True)[1]),
    "max with places": whole(lambda x: x * x.max(-1, keepdim=True)[1]),
    "fft": whole(lambda x: torch.fft.fft(x).abs()),
    "fft of channels": whole(lambda x: torch.fft.fft(x.transpose(1, 2), dim=1).abs().transpose(1, 2)),
    "fft2": whole(lambda x: torch.fft.fft2(x).real),
    "fftn": whole(lambda x: torch.fft.fftn(x, dim=(1, -1)).real),
    "tril": whole(torch.tril),
    "avg_pool1d": whole(lambda x: F.avg_pool1d(x, 2), out=3),
    "max_pool1d": whole(lambda x: F.max_pool1d(x, 3, 1, 1)),
    "avg_pool2d": whole(lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "upsample": whole(lambda x: F.interpolate(x, scale_factor=2), out=12),
    "pad by reflection": whole(lambda x: F.pad(x, (1, 1), mode="reflect"), out=8),
    "pad by what goes round": whole(lambda x: F.pad(x, (1, 1), mode="circular"), out=8),
    "conv1d along units": whole(lambda x: F.conv1d(x, torch.ones(3, 3, 3, dtype=x.dtype), padding=1)),
    "rolled through places": whole(lambda x: x.roll(1)),
}
