"""Comparing two models exactly: outputs and gradients in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shohin.program import Program
from shohin.surgery.oracle import gradients_agree
from shohin.surgery.rewritten import Rewritten

#: relative difference from the oracle, in float64
TOLERANCE = 1e-8


class Wrong(Exception):
    """Something differs that must be equal."""


class Exact(TorchFunctionMode):
    """Inside, models that cast to float32 on the way (norms, softmax) stay in float64: rounding does not hide or fake differences."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = pytree.tree_map_only(torch.dtype, _wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float32 else dtype


def doubled(arguments: Any) -> Any:
    """Floating tensors in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)


def single(arguments: Any) -> Any:
    """Floating tensors in float32."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, arguments)


def outputs_of(value: Any) -> list[Tensor]:
    """All floating tensors of an output, in order."""
    return [t for t in pytree.tree_leaves(_plain(value)) if isinstance(t, Tensor) and t.is_floating_point()]


def casts(program: Program) -> bool:
    """True if something is computed in float32 though the model is in float64: compare inside `Exact`."""
    values = [n.meta.get("val") for n in program.graph.nodes]
    return any(isinstance(v, Tensor) and v.dtype is torch.float32 for v in values)


def embedding_tables(model: nn.Module) -> set[str]:
    """Names of embedding weights; the program form has no classes that would tell."""
    return {f"{n}.weight" for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Embedding)}


def _plain(value: Any) -> Any:
    """What a file returns are mappings that torch does not look into."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value


def run(model: nn.Module, arguments: Any) -> tuple[list[Tensor], dict[str, Tensor | None], list[Tensor]]:
    """(outputs, gradients of parameters by name, gradients of inputs) for a fixed combination of the outputs."""
    flat, spec = pytree.tree_flatten(arguments)
    flat = [t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in flat]
    args, kwargs = pytree.tree_unflatten(flat, spec)
    outputs = outputs_of(model(*args, **kwargs))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True) if t.requires_grad)
    names: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    distinct = list({id(p): p for p in names.values()}.values())
    inputs = [t for t in flat if isinstance(t, Tensor) and t.requires_grad]
    found = torch.autograd.grad(loss, [*distinct, *inputs], allow_unused=True)
    by_id = {id(p): g for p, g in zip(distinct, found, strict=False)}
    return [t.detach() for t in outputs], {n: by_id[id(p)] for n, p in names.items()}, [g for g in found[len(distinct) :] if g is not None]


def against(reference: nn.Module, made: nn.Module, rewritten: Rewritten, arguments: Any) -> list[tuple[float, str]]:
    """(relative difference, where) of outputs, gradients of inputs and gradients of parameters of a cut from the oracle's.

    Raises:
        RuntimeError: if the oracle gives nothing finite to compare with.
    """
    expected, by_name, inputs = run(reference, arguments)
    got, gradients, own = run(made, arguments)
    gradients = {n: g for n, g in gradients.items() if n not in rewritten.scaled}
    if not all(bool(t.isfinite().any()) for t in expected if t.numel()):
        raise RuntimeError("the oracle's outputs are not finite")
    return [
        difference(got, expected, "output"),
        difference(own, inputs, "input gradient"),
        gradients_agree(by_name, gradients, rewritten.kept),
    ]


def difference(got: list[Tensor], wanted: list[Tensor], what: str) -> tuple[float, str]:
    """The largest difference relative to each tensor's largest value, and where; infinite if shapes differ or nothing is finite."""
    if len(got) != len(wanted):
        return float("inf"), f"{len(got)} {what}s instead of {len(wanted)}"
    worst, where = 0.0, ""
    floor = 1e-6 * max((float(b.abs()[b.isfinite()].max()) for b in wanted if b.isfinite().any()), default=0.0) + 1e-30
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if a.shape != b.shape:
            return float("inf"), f"{what} {i} has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        same = a == b  # also masked scores of -inf
        scale = max(float(b.abs()[b.isfinite()].max()) if b.isfinite().any() else 0.0, floor)
        error = float(torch.where(same, 0.0, (a - b).abs()).max()) / scale if a.numel() else 0.0
        if not error <= worst:
            worst, where = error, f"{what} {i}"
    return worst, where
