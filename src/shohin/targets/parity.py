"""Parity: two ways to run one model, compared on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shohin.data import Call
from shohin.errors import TargetError
from shohin.targets.base import Target


def parity(
    reference: Callable[..., Any], runner: Callable[..., Any], inputs: Sequence[tuple[Any, ...] | Call], tolerance: float
) -> dict[str, Any]:
    """Compares all output tensors of two callables.

    Args:
        reference, runner: callables of one signature and output structure.
        inputs: positional arguments of each call, or the call itself.
        tolerance: largest relative error that passes: largest absolute difference divided by the largest absolute
            reference value of the same output, over all inputs.

    Returns:
        JSON-able: ``max_abs``, ``max_rel``, ``snr_db`` (of all outputs together; None if equal), ``argmax_agree`` and
        ``argmax_total`` (of floating outputs whose last axis has at least 2 entries and that have at least 2 dimensions), ``calls``, ``tolerance``, ``passes``.

    Raises:
        TargetError: if the outputs differ in number or shape, or there is no input.
    """
    if not inputs:
        raise TargetError("parity needs at least one input")
    worst_abs: list[float] = []
    largest: list[float] = []
    agree = total = 0
    signal = noise = 0.0
    finite = True
    for args in inputs:
        with torch.no_grad():
            a, b = (_tensors(f(*args.args, **args.kwargs) if isinstance(args, Call) else f(*args)) for f in (reference, runner))
        if [x.shape for x in a] != [x.shape for x in b]:
            raise TargetError(f"outputs differ in shape: {[tuple(x.shape) for x in a]} and {[tuple(x.shape) for x in b]}")
        worst_abs = worst_abs or [0.0] * len(a)
        largest = largest or [0.0] * len(a)
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            if not x.numel():
                continue
            p, q = x.detach().cpu().double(), y.detach().cpu().double()
            finite &= bool(p.isfinite().all() and q.isfinite().all()) or torch.equal(p, q)
            difference = torch.nan_to_num(p - q, nan=float("inf"))
            worst_abs[index] = max(worst_abs[index], float(difference.abs().max()))
            largest[index] = max(largest[index], float(torch.nan_to_num(p).abs().max()))
            signal, noise = signal + float((p**2).sum()), noise + float((difference**2).sum())
            if x.is_floating_point() and x.dim() >= 2 and x.shape[-1] >= 2:
                same = p.argmax(-1) == q.argmax(-1)
                agree, total = agree + int(same.sum()), total + same.numel()
    relative = [d / m if m else (0.0 if d == 0 else float("inf")) for d, m in zip(worst_abs, largest, strict=True)]
    snr = None if noise == 0 or signal == 0 else 10 * float(torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))
    return {
        "max_abs": max(worst_abs, default=0.0),
        "max_rel": max(relative, default=0.0),
        "snr_db": snr,
        "argmax_agree": agree,
        "argmax_total": total,
        "calls": len(inputs),
        "tolerance": tolerance,
        "passes": finite and max(relative, default=0.0) <= tolerance,
    }


def boundaries(
    view: Callable[..., Any], path: Path, target: Target, inputs: Sequence[tuple[Any, ...] | Call], tolerance: float
) -> dict[str, dict[str, Any]]:
    """Parity at each boundary of a lowering: view == ONNX file == runtime.

    Args:
        view: the torch module that simulates all bits (or the float module).
        path: the ONNX file. "File" is the file's own semantics (ONNX Runtime with all optimizations off), "runtime" is what ships.
        target: whose runtime that is.

    Returns:
        ``view_file``, ``file_runtime`` and ``view_runtime``, each as `parity` gives it.
    """
    from shohin.targets.onnxruntime.session import Runner

    plain, ships = Runner(path, threads=target.threads, level="none"), target.runner(path)
    return {
        "view_file": parity(view, plain, inputs, tolerance),
        "file_runtime": parity(plain, ships, inputs, tolerance),
        "view_runtime": parity(view, ships, inputs, tolerance),
    }


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
