"""Movement pruning: what moves towards zero during training goes (Sanh, Wolf & Rush, 2020, arXiv 2005.07683).

A score for each weight follows the straight-through gradient of its mask, ``d loss / d mask = w g``, downwards: it rises while a
weight grows away from zero. Forward passes use the masked weights; the values under the mask are kept aside, as the paper keeps
them, since a weight that is off may come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.errors import DataError
from shohin.pruning.schedules.beside import Beside, Training, name_of, train_with
from shohin.pruning.schedules.cubic import Shares
from shohin.pruning.schedules.gradual import ramp_over, warn_of_an_early_end
from shohin.pruning.schedules.masks import MASK, Sparse, finished, grown, hold, patterns_of, quiet, weights_of
from shohin.pruning.sparse.patterns import Pattern
from shohin.training import Objective, TrainConfig

SCORE, UNDER = "score", "under"
_BETAS, _EPS = (0.9, 0.999), 1e-8


def hard_movement(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    pattern: str | Pattern | Mapping[str, str | Pattern],
    shares: Shares | None = None,
    **training: Unpack[Training],
) -> Sparse:
    """Trains ``model`` in place; of each weight the elements with the highest scores stay, at a share that grows (hard top-v).

    Scores are sums of ``-w g`` over the steps, from zero; masks are chosen anew after each step, so what is off may come back.

    Args:
        pattern, shares, training: see `gradual`.

    Raises:
        DataError, PlanError, RunError: as `gradual`.
    """
    config = config or TrainConfig()
    patterns = patterns_of(model, pattern)
    ramp = shares or ramp_over(data, config, patterns)
    warn_of_an_early_end(ramp, data, config)

    def learn(score: Tensor, slope: Tensor, beside: Beside, name: str) -> None:
        score.sub_(slope)

    def choose(name: str, score: Tensor, beside: Beside) -> Tensor:
        return grown(patterns[name], score, ramp(beside.steps))

    settings = {
        "method": "hard movement",
        "patterns": {name: str(kind) for name, kind in patterns.items()},
        "shares": name_of(ramp),
    }
    return _movement(model, data, objective, config, list(patterns), settings, learn, choose, **training)


def soft_movement(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    penalty: float,
    threshold: float = 0.1,
    rate: float = 1e-2,
    start: float = 0.0,
    weights: Sequence[str] | None = None,
    **training: Unpack[Training],
) -> Sparse:
    """Trains ``model`` in place; the elements whose score is above a threshold stay, and a penalty pulls scores down.

    The loss gains ``penalty * mean(sigmoid(score))``; a weight stays while ``sigmoid(score) > threshold``. Scores are trained by Adam
    with a constant rate of their own, as in the paper's experiments. How many stay follows from the penalty.

    Args:
        penalty: lambda, at least 0.
        threshold: tau in (0, 1).
        rate: learning rate of the scores.
        start: of the scores.
        weights: names of parameters; None: the weights of linear layers and convolutions.
        training: see `gradual`.

    Raises:
        DataError: if a value is outside its range, and as `shohin.training.train` does.
        PlanError, RunError: as `gradual`.
    """
    config = config or TrainConfig()
    if not (penalty >= 0 and 0 < threshold < 1 and rate > 0):
        raise DataError(f"soft movement needs penalty >= 0, 0 < threshold < 1, rate > 0; got {penalty}, {threshold}, {rate}")
    chosen = weights_of(model, weights)
    elements = sum(p.numel() for p in chosen.values())
    line = math.log(threshold / (1 - threshold))

    def learn(score: Tensor, slope: Tensor, beside: Beside, name: str) -> None:
        on = torch.sigmoid(score + start)
        _adam(score, slope + penalty / elements * on * (1 - on), rate, beside, name)

    def choose(name: str, score: Tensor, beside: Beside) -> Tensor:
        return score + start > line

    settings = {
        "method": "soft movement",
        "weights": list(chosen),
        "penalty": penalty,
        "threshold": threshold,
        "rate": rate,
        "start": start,
    }
    return _movement(model, data, objective, config, list(chosen), settings, learn, choose, **training)


def _movement(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig,
    names: list[str],
    settings: Mapping[str, Any],
    learn: Callable[[Tensor, Tensor, Beside, str], None],
    choose: Callable[[str, Tensor, Beside], Tensor],
    **training: Unpack[Training],
) -> Sparse:
    """The training that both share: scores learn before each step, masks are chosen after it."""

    def before(beside: Beside) -> None:
        for name in names:
            p = beside.parameters[name]
            if p.grad is None:
                continue
            score, under = beside.get(name, SCORE), beside.get(name, UNDER)
            if score is None:
                score = torch.zeros_like(p)
                beside.put(name, SCORE, score)
            learn(score, p.grad * (p if under is None else under), beside, name)
        quiet(beside, names)

    def after(beside: Beside) -> None:
        for name in names:
            p, score, mask, under = beside.parameters[name], beside.get(name, SCORE), beside.get(name, MASK), beside.get(name, UNDER)
            if score is None:
                continue
            under = p.detach().clone() if under is None or mask is None else torch.where(mask, p, under)
            beside.put(name, MASK, choose(name, score, beside))
            beside.put(name, UNDER, under)
            p.copy_(under)
        hold(beside, names)

    result, beside = train_with(model, data, objective, config, settings, after, before, **training)
    return finished(model, result, beside, names)


def _adam(score: Tensor, slope: Tensor, rate: float, beside: Beside, name: str) -> None:
    """One step of Adam (Kingma & Ba, 2015, arXiv 1412.6980) on the scores."""
    first, second = beside.get(name, "score_mean"), beside.get(name, "score_square")
    if first is None or second is None:
        first, second = torch.zeros_like(score), torch.zeros_like(score)
        beside.put(name, "score_mean", first)
        beside.put(name, "score_square", second)
    step = beside.steps + 1
    first.lerp_(slope, 1 - _BETAS[0])
    second.lerp_(slope.square(), 1 - _BETAS[1])
    mean, square = first / (1 - _BETAS[0] ** step), second / (1 - _BETAS[1] ** step)
    score.sub_(rate * mean / (square.sqrt() + _EPS))
