"""Gradual pruning: zeros grow while the network trains, and are exact after every step (Zhu & Gupta, 2017, arXiv 1710.01878)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Unpack

from torch import nn

from shohin.data import Data
from shohin.errors import DataError
from shohin.pruning.schedules.beside import Beside, Training, name_of, steps_in, train_with
from shohin.pruning.schedules.cubic import Ramp, Shares, cubic
from shohin.pruning.schedules.masks import MASK, Score, Sparse, finished, grown, hold, magnitude, patterns_of, quiet
from shohin.pruning.sparse.patterns import Pattern
from shohin.training import Objective, TrainConfig


def gradual(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    pattern: str | Pattern | Mapping[str, str | Pattern],
    shares: Shares | None = None,
    score: Score = magnitude,
    **training: Unpack[Training],
) -> Sparse:
    """Trains ``model`` in place and prunes it on the way.

    What is gone stays gone. Called again with the same arguments after a kill, it goes on to the same bits: masks are in
    training's checkpoint. The last state counts, since earlier ones have fewer zeros; with ``ema`` its average, masked.

    Args:
        model, data, objective, config: see `shohin.training.train`.
        pattern: of all linear layers and convolutions that it fits, or of the named parameters each ("2:4"; see `Pattern`).
        shares: share of elements that is gone after each step, not above its pattern's own; None: cubic over the first two thirds
            of the training, to the largest share of the patterns.
        score: what is low goes first; by magnitude.
        training: ``checkpoint``, ``deadline``, ``progress``, ``optimizer``, ``schedule``, ``callbacks``, as for `train`.

    Raises:
        DataError: if ``shares`` is None and the loader does not tell its length, and as `train` does.
        PlanError: if a parameter or pattern is not known.
        RunError: if the checkpoint belongs to another training or another pruning.
    """
    config = config or TrainConfig()
    patterns = patterns_of(model, pattern)
    ramp = shares or ramp_over(data, config, patterns)
    warn_of_an_early_end(ramp, data, config)
    names = list(patterns)

    def after(beside: Beside) -> None:
        share = ramp(beside.steps)
        for name, kind in patterns.items():
            mask = beside.get(name, MASK)
            if mask is None or share != ramp(beside.steps - 1):
                parameter = beside.parameters[name]
                beside.put(name, MASK, grown(kind, score(name, parameter), share, mask))
        hold(beside, names)

    settings = {
        "method": "gradual",
        "patterns": {name: str(kind) for name, kind in patterns.items()},
        "shares": name_of(ramp),
        "score": name_of(score),
    }
    result, beside = train_with(model, data, objective, config, settings, after, lambda b: quiet(b, names), **training)
    return finished(model, result, beside, names)


def ramp_over(data: Data, config: TrainConfig, patterns: Mapping[str, Pattern]) -> Shares:
    """The cubic schedule over the first two thirds of a training, in a hundred steps or more, to the share of the sparsest pattern.

    Raises:
        DataError: if the loader does not tell its length.
    """
    steps = steps_in(data, config)
    if steps is None:
        raise DataError("the training loader does not tell its length: say when the zeros come, shares=cubic(0.9, begin=0, end=1000)")
    end = max(2 * steps // 3, 1)
    return cubic(max(pattern.zeros for pattern in patterns.values()), 0, end, every=max(end // 100, 1))


def warn_of_an_early_end(shares: Shares, data: Data, config: TrainConfig) -> None:
    """Warns if the training is over before a ramp is."""
    steps = steps_in(data, config)
    if isinstance(shares, Ramp) and steps is not None and steps < shares.end:
        warnings.warn(
            f"the training ends after {steps} steps with {shares(steps):.1%} gone; the ramp goes on to {shares.final:.1%} at step "
            f"{shares.end}: train longer, or let it end earlier",
            stacklevel=3,
        )
