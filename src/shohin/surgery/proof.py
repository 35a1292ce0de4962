"""Proof: in float64, a cut module equals the view, outputs and gradients: on the example with its own weights, and on random inputs
of another batch with random weights.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shohin.program import Program
from shohin.surgery.precision import double_precision, widen

#: largest relative error of a proof (DESIGN section 2)
TOLERANCE = 1e-10
#: a gradient is compared at no finer scale than this share of the largest one: some are zero but for rounding (a key's bias)
FLOOR = 1e-4
#: numbers of one sample up to which the random batch is of this many samples, so that what is seldom alive is seen
FEW, MANY = 2048, 24


@dataclass(frozen=True)
class Proof:
    """The result of a comparison.

    Args:
        holds: True if the error is within the tolerance.
        error: largest relative error of outputs and gradients.
        where: what differs most, or why nothing could be compared.
    """

    holds: bool
    error: float
    where: str


def prove(
    program: Program,
    module: nn.Module,
    view: nn.Module,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    gradients: bool = True,
    relate: Callable[[str, Tensor], Tensor] | None = None,
) -> Proof:
    """Compares ``module`` with ``view`` in float64.

    Args:
        program: gives the shapes and types of inputs.
        module, view: with equal signatures and parameter names; copies are compared, the originals stay as they are.
        gradients: False compares outputs only.
        relate: (name, the view's value) -> the module's value of a parameter, where they are not equal.
    """
    generator = torch.Generator().manual_seed(seed)
    fixed = any("batch" in remark for remark in program.remarks)
    worst, where = 0.0, ""
    try:
        a, b = (widen(copy.deepcopy(m)).eval() for m in (module, view))
        for lively in (False, True):  # units that the model's own weights leave dead must be alive once
            if lively:
                _enliven(a, b, generator, relate)
            inputs, batch = _inputs(program, b, lively, fixed, generator)
            with double_precision():
                error, place = _compare(program, a, b, inputs, generator, gradients)
                if any(isinstance(m, nn.MultiheadAttention) for m in a.modules()):  # without gradients torch runs another kernel
                    with torch.no_grad():
                        error, place = max((error, place), _compare(program, a, b, inputs, generator, False), key=_size)
            if not error <= worst:
                worst, where = error, f"{place} at batch {batch}{' with random weights' if lively else ''}"
    except Exception as error:  # whatever the user's forward raises is a reason, not a crash
        text = str(error).splitlines()[0] if str(error) else ""
        return Proof(False, float("inf"), f"the module fails: {type(error).__name__}: {text}{user_line(error)}")
    return Proof(worst <= tolerance, worst, where)


def _inputs(program: Program, view: nn.Module, lively: bool, fixed: bool, generator: torch.Generator) -> tuple[list[Any], int]:
    """The example's own numbers first, then random ones of another batch; the example again where the program cannot take these (indices
    that point into another input).
    """
    example = [x.detach().cpu().double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in program.example]
    if not lively:
        return example, program.batch
    numbers = sum(x.numel() for x in program.example if isinstance(x, Tensor)) // max(program.batch, 1)
    batch = program.batch if fixed else MANY if numbers <= FEW else 3
    inputs = [random_input(x, batch, generator, program.batch) for x in program.example]
    try:
        with torch.no_grad(), double_precision():
            args, kwargs = pytree.tree_unflatten(inputs, program.in_spec)
            view(*args, **kwargs)
    except Exception:  # of whatever kind: such inputs prove nothing
        return example, program.batch
    return inputs, batch


def _enliven(a: nn.Module, b: nn.Module, generator: torch.Generator, relate: Callable[[str, Tensor], Tensor] | None) -> None:
    """Gives parameters and normalization statistics of the same names the same random values, large enough that no part hides another."""
    mine, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (a, b))
    done: set[int] = set()
    with torch.no_grad():
        for name in sorted(mine.keys() & theirs.keys()):
            x, y = mine[name], theirs[name]
            if id(x) in done or x.shape != y.shape or not x.is_floating_point() or not x.numel():
                continue
            done.add(id(x))
            spread = 0.7 * x[0].numel() ** -0.5 if x.dim() > 1 else 0.3
            noise = spread * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            value = noise + (x.mean() if x.dim() <= 1 else 0.0)
            x.copy_(value if relate is None else relate(name, value))
            y.copy_(value)
        own, other = dict(a.named_buffers()), dict(b.named_buffers())
        for name in sorted(own.keys() & other.keys()):
            if own[name].shape != other[name].shape or name.rpartition(".")[2] not in ("running_mean", "running_var"):
                continue
            random = torch.rand(own[name].shape, generator=generator, dtype=torch.float64).to(own[name])
            value = 0.5 + random if name.endswith("running_var") else 0.5 * (random - 0.5)
            own[name].copy_(value)
            other[name].copy_(value)


def _size(found: tuple[float, str]) -> float:
    return found[0] if found[0] == found[0] else float("inf")


def user_line(error: BaseException) -> str:
    """Where an exception was raised, in the innermost line that is neither torch's nor Shohin's; "" if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "/shohin/" not in frame.filename and not frame.filename.startswith("<"):
            return f" at {frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} in {frame.name}: {frame.line}"
    return ""


def random_input(x: Any, batch: int, generator: torch.Generator, whole: int) -> Any:
    """A random value like an example input, with another batch: normal floats, integers from rows of the example.

    Args:
        whole: batch of the example: what has another length along axis 0 keeps its length.

    Integers may mean something together (the corners of a box, the places of an image in a text), so rows stay whole.
    """
    if not isinstance(x, Tensor) or not x.dim():
        return x
    if len(x) != whole:
        batch = len(x)
    shape = (batch, *x.shape[1:])
    if x.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.cpu()[torch.randint(0, len(x), (batch,), generator=generator)]


def _compare(
    program: Program, a: nn.Module, b: nn.Module, inputs: list[Any], generator: torch.Generator, gradients: bool
) -> tuple[float, str]:
    results = []
    weights: list[Tensor] = []
    for module in (a, b):
        flat = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        args, kwargs = pytree.tree_unflatten(flat, program.in_spec)
        outputs = [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)]
        if not weights:
            weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
        found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        loss = sum(((t * w).sum() for t, w in zip(outputs, weights, strict=True) if t.requires_grad), torch.zeros(()))
        if gradients and isinstance(loss, Tensor) and loss.requires_grad:
            named = {n: p for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
            distinct = list({id(p): p for p in named.values()}.values())
            leaves = [t for t in flat if isinstance(t, Tensor) and t.requires_grad]
            grads = torch.autograd.grad(loss, [*distinct, *leaves], allow_unused=True, retain_graph=True)  # some models cache
            of = {id(p): g for p, g in zip(distinct, grads, strict=False)}
            keyed = {f"gradient of {n}": of[id(p)] for n, p in named.items()}
            keyed |= {f"gradient of input {i}": g for i, g in enumerate(grads[len(distinct) :])}
            found.update({k: g for k, g in keyed.items() if g is not None})
        results.append(found)
    worst, where = 0.0, ""
    first, second = results
    if not any(k.startswith("output") for k in first):
        return float("inf"), "no tensor output"
    missing = {k for k in set(first) ^ set(second) if float({**first, **second}[k].abs().sum()) != 0.0}
    if missing:
        return float("inf"), f"{sorted(missing)[0]} exists on one side only"
    largest = max((float(t.abs().max()) for k, t in second.items() if k.startswith("gradient") and t.numel()), default=0.0)
    for key in sorted(set(first) & set(second)):
        if first[key].shape != second[key].shape:
            return float("inf"), f"{key} has shape {tuple(first[key].shape)}, expected {tuple(second[key].shape)}"
        if not first[key].numel():
            continue
        scale = max(float(second[key].abs().max()), FLOOR * largest if key.startswith("gradient") else 0.0) + 1e-30
        error = float((first[key] - second[key]).abs().max()) / scale
        if not error <= worst:
            worst, where = error, key
    return worst, where
