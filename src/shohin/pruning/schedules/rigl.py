"""RigL: a sparse network that drops small weights and grows those with the steepest gradients (Evci et al., 2020, arXiv 1911.11134)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.errors import DataError, PlanError
from shohin.pruning.schedules.beside import Beside, Training, steps_in, train_with
from shohin.pruning.schedules.masks import MASK, Masks, Sparse, apply, finished, hold, lowest, quiet, weights_of
from shohin.pruning.sparse.allocation import erk, uniform
from shohin.training import Objective, TrainConfig


def rigl(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    masks: Masks,
    every: int = 100,
    fraction: float = 0.3,
    end: int | None = None,
    **training: Unpack[Training],
) -> Sparse:
    """Trains ``model`` in place with as many weights in each layer as the given masks have, always.

    Every so many steps the smallest of the weights that are on are dropped, and as many of the others are grown where the loss
    falls steepest; a dropped weight may win its place again and keeps its value then. Others start at zero, with the optimizer's
    averages of them at zero. The paper leaves out the weights' own update on such steps; here it is made too.

    Args:
        masks: to begin with, by parameter name; see `random_masks`.
        every: steps between two changes.
        fraction: alpha: at step t, ``alpha / 2 (1 + cos(pi t / end))`` of the weights that are on are dropped.
        end: the first step without changes; None: three quarters of the training.
        training: see `gradual`.

    Raises:
        DataError: if a value is outside its range, or ``end`` is None and the loader does not tell its length.
        PlanError: if a mask is not for a trainable parameter, or not of its shape.
        RunError: if the checkpoint belongs to another training or another pruning.
    """
    config = config or TrainConfig()
    last = _end(data, config, end)
    if every < 1 or not 0 <= fraction < 1:
        raise DataError(f"rigl needs every >= 1 and fraction in [0, 1); got every={every}, fraction={fraction}")
    weights = weights_of(model, list(masks))
    names = list(weights)
    for name, weight in weights.items():
        if masks[name].shape != weight.shape:
            raise PlanError(f"the mask of {name!r} has shape {tuple(masks[name].shape)}; the weight has {tuple(weight.shape)}")
    first = {name: mask.detach().bool().clone() for name, mask in masks.items()}
    apply(weights, first)
    slopes: dict[str, Tensor] = {}

    def changes(step: int) -> bool:
        return step % every == 0 and 0 < step < last

    def before(beside: Beside) -> None:
        for name in names:
            p = beside.parameters[name]
            if beside.get(name, MASK) is None:
                beside.put(name, MASK, first[name].to(p.device))
            if changes(beside.steps + 1):
                slopes[name] = torch.zeros_like(p) if p.grad is None else p.grad.abs()
        quiet(beside, names)

    def after(beside: Beside) -> None:
        hold(beside, names)
        if not changes(beside.steps):
            return
        share = dropped_share(beside.steps, last, fraction)
        for name in names:
            mask = beside.get(name, MASK)
            if mask is not None:
                new = rewired(beside.parameters[name], slopes.pop(name), mask, share)
                beside.put(name, MASK, new)
                for moment in beside.moments(name):
                    moment.masked_fill_(new & ~mask, 0.0)
        hold(beside, names)

    settings = {
        "method": "rigl",
        "every": every,
        "fraction": fraction,
        "end": last,
        "masks": {name: int(mask.sum()) for name, mask in first.items()},
    }
    result, beside = train_with(model, data, objective, config, settings, after, before, **training)
    return finished(model, result, beside, names)


def dropped_share(step: int, end: int, fraction: float) -> float:
    """The share of the weights that are on that a change at ``step`` drops: a cosine from ``fraction`` to zero at ``end``."""
    return fraction / 2 * (1 + math.cos(math.pi * min(step / end, 1.0)))


def rewired(weight: Tensor, slope: Tensor, mask: Tensor, share: float) -> Tensor:
    """The mask after one change, with as many weights on as before.

    Args:
        weight, slope, mask: of one shape; the slope is the size of the loss's gradient.
        share: of the weights that are on, to be dropped.
    """
    on = int(mask.sum())
    count = min(int(share * on), mask.numel() - on)
    stays = mask & ~lowest(weight.detach().abs().masked_fill(~mask, float("inf")), count)
    return stays | lowest((-slope).masked_fill(stays, float("inf")), count)


def random_masks(
    weights: Mapping[str, Tensor], density: float, *, sizes: Literal["erk", "uniform"] = "erk", seed: int = 0
) -> dict[str, Tensor]:
    """Random masks with a given share of all elements on.

    Args:
        weights: by name.
        density: share of elements that stays, in [0, 1].
        sizes: "erk": larger layers are sparser, as in the paper (`shohin.pruning.sparse.allocation.erk`); "uniform": all alike.
        seed: of the places.

    Raises:
        PlanError: if the density is outside its range.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    counts = erk(shapes, density) if sizes == "erk" else uniform({name: w.numel() for name, w in weights.items()}, density)
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, weight in weights.items():
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel(), generator=generator)[: counts[name]]] = True
        out[name] = mask.view(weight.shape).to(weight.device)
    return out


def _end(data: Data, config: TrainConfig, end: int | None) -> int:
    steps = steps_in(data, config)
    if end is None and steps is None:
        raise DataError("the training loader does not tell its length: say when the changes end, end=1000")
    found = end if end is not None else max(3 * (steps or 0) // 4, 1)
    if found < 1:
        raise DataError(f"rigl needs end >= 1, in steps; got {found}")
    return found
