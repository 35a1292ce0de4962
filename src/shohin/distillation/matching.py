"""Which features of an unrelated teacher a student should follow: by name, by shape, or by how well one tells of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shohin.data import Call, first_output
from shohin.distillation.adapters import channel_dim
from shohin.distillation.features import FeatureTap
from shohin.errors import DataError, ModelError
from shohin.training.state import training_modes

#: samples from which a match is believed
LEAST = 16

#: score of a pair that no adapter can bridge
NEVER = -1e6


def match(
    student: nn.Module,
    teacher: nn.Module,
    calls: Sequence[Call],
    count: int = 3,
    by: Literal["predict", "cka", "shape", "name"] = "predict",
) -> tuple[FeatureTap, ...]:
    """Taps spread over the depth of the student, each with the teacher's module that fits it best, in the same order.

    Args:
        student, teacher: run on the batches in evaluation mode; any architectures.
        calls: batches, at least 16 samples together.
        count: how many taps, at most.
        by: "predict": how much of the teacher's feature a ridge regression finds in the student's (R^2 on held-out samples, features
            averaged over space); "cka": linear centred kernel alignment (Kornblith et al., 2019, 1905.00414, section 3); "shape":
            equal output shapes, in order; "name": equal module names and ranks.

    Raises:
        DataError: for too few samples. ModelError: if nothing matches.
    """
    ours, theirs = (_features(model, calls) for model in (student, teacher))
    if by in ("predict", "cka") and len(next(iter(ours.values()), _Seen()).pooled) < LEAST:
        raise DataError(f"matching features needs {LEAST} samples or more; give more batches")
    if by == "name":
        pairs = [(n, n) for n in ours if n in theirs and len(ours[n].shape) == len(theirs[n].shape)]
    elif by == "shape":
        pairs = _by_shape(ours, theirs)
    elif by in ("predict", "cka"):
        pairs = _by_score(ours, theirs, count, by)
    else:
        raise DataError(f"by={by!r} is not known; one of 'predict', 'cka', 'shape', 'name'")
    if not pairs:
        raise ModelError(f"no feature of the student matches one of the teacher by {by}")
    chosen = _spread(pairs, count)
    return tuple(FeatureTap(s, None, ours[s].dim, t) for s, t in chosen)


class _Seen:
    """What was seen of one module: pooled features ``[samples, channels]`` batch by batch, the shape of one sample, the channel axis."""

    def __init__(self, dim: int = 1, shape: tuple[int, ...] = ()) -> None:
        self.dim, self.shape, self.parts = dim, shape, list[Tensor]()

    @property
    def pooled(self) -> Tensor:
        return torch.cat(self.parts) if self.parts else torch.empty(0, 0)


def _features(model: nn.Module, calls: Sequence[Call]) -> dict[str, _Seen]:
    """Modules that ran once for each batch and gave ``[N, ...]``, in the order in which they finished, outermost of equals first."""
    found: dict[str, _Seen] = {}
    often: set[str] = set()
    names = {name: module for name, module in model.named_modules() if name}
    run: dict[str, int] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            try:
                value = first_output(output)
            except Exception:
                return  # a module that gives no tensor is no feature
            if value.dim() < 2 or not value.is_floating_point() or len(value) != run["size"]:
                return
            if run.get(name):
                often.add(name)
                return
            run[name] = 1
            dim = channel_dim(value, module)
            flat = value.movedim(dim, 1)
            pooled = flat.flatten(2).mean(2) if flat.dim() > 2 else flat
            found.setdefault(name, _Seen(dim, tuple(value.shape[1:]))).parts.append(pooled.detach().double())

        return hook

    for name, module in names.items():
        handles.append(module.register_forward_hook(keep(name)))
    try:
        with training_modes(model), torch.no_grad():
            model.eval()
            for call in calls:
                run.clear()
                run["size"] = call.size
                model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    whole = {n: s for n, s in found.items() if n not in often and len(s.parts) == len(calls)}
    distinct: dict[bytes, str] = {}
    for name, seen in whole.items():  # a block and its last layer give one tensor: the block's name says more
        key = seen.pooled.numpy().tobytes()
        distinct[key] = min(distinct.get(key, name), name, key=len)
    return {name: whole[name] for name in distinct.values()}


def _by_shape(ours: dict[str, _Seen], theirs: dict[str, _Seen]) -> list[tuple[str, str]]:
    """Pairs of equal shapes, both in order; of several teacher modules with one shape the last."""
    last = {seen.shape: name for name, seen in theirs.items()}
    own = {seen.shape: name for name, seen in ours.items()}
    return [(name, last[shape]) for shape, name in own.items() if shape in last]


def _by_score(ours: dict[str, _Seen], theirs: dict[str, _Seen], count: int, by: str) -> list[tuple[str, str]]:
    """Even depths of the student; the teacher's modules in order with the largest sum of scores."""
    mine = [name for name, _ in _spread([(n, n) for n in ours], count)]
    others = list(theirs)
    if not mine or not others:
        return []
    measure = _predictability if by == "predict" else cka
    scores = torch.tensor(
        [[float(measure(ours[s].pooled, theirs[t].pooled)) if _fits(ours[s], theirs[t]) else NEVER for t in others] for s in mine]
    )
    best, choice = scores[0].clone(), []
    for row in scores[1:]:
        reach, at = torch.cummax(best, 0)
        choice.append(at)
        best = row + reach
    place = int(best.argmax())
    path = [place]
    for at in reversed(choice):
        place = int(at[place])
        path.append(place)
    pairs = zip(mine, reversed(path), range(len(mine)), strict=True)
    return [(s, others[t]) for s, t, row in pairs if float(scores[row, t]) > NEVER]


def _fits(ours: _Seen, theirs: _Seen) -> bool:
    """True if a linear layer (and, over space, averaging) leads from one to the other."""
    return len(ours.shape) == len(theirs.shape) and ours.dim == theirs.dim and (ours.dim == 1 or ours.shape[:-1] == theirs.shape[:-1])


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of two features of the same samples ``[N, *]``, in [0, 1]; 0 where one is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    cross = (a.T @ b).square().sum()
    scale = (a.T @ a).norm() * (b.T @ b).norm()
    return float(cross / scale) if float(scale) > 0 else 0.0


def _predictability(source: Tensor, wanted: Tensor) -> float:
    """R^2 of a ridge regression on samples that it was not fitted to, in [-1, 1]: every other sample is held out."""
    x, y, x_new, y_new = source[::2], wanted[::2], source[1::2], wanted[1::2]
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_new = (x - centre) / scale, (x_new - centre) / scale
    mean = y.mean(0)
    gram = x @ x.T + 0.1 * len(x) * torch.eye(len(x), dtype=x.dtype)
    guess = x_new @ (x.T @ torch.linalg.solve(gram, y - mean)) + mean
    spread = (y_new - y_new.mean(0)).square().sum()
    return max(1 - float((y_new - guess).square().sum() / spread), -1.0) if float(spread) > 0 else 0.0


def _spread(items: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """At most ``count`` items, evenly over the list, the last one included."""
    if count < 1:
        raise DataError(f"count must be 1 or more; got {count}")
    if len(items) <= count:
        return items
    return [items[round((i + 1) * len(items) / count) - 1] for i in range(count)]
