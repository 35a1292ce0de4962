"""Lottery tickets: train, prune, put the kept weights back to those of an early step, train again (Frankle & Carbin, 2019,
arXiv 1803.03635; late rewinding: Frankle et al., 2019, arXiv 1903.01611).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from shohin.data import Data
from shohin.errors import DataError
from shohin.pruning.schedules.beside import Beside, Training, name_of, train_with
from shohin.pruning.schedules.masks import MASK, Masks, Score, apply, gone_share, grown, hold, magnitude, patterns_of, quiet
from shohin.pruning.schedules.rounds import Rounds
from shohin.pruning.sparse.patterns import Pattern
from shohin.training import Objective, TrainConfig, TrainResult, copy_state, load_state
from shohin.training.state import live_state, norm_of

_EARLY = "early"


@dataclass(frozen=True, eq=False)
class Ticket:
    """A winning ticket, trained.

    Args:
        masks: parameter name -> what stays.
        early: parameters and buffers of the step that was rewound to, unmasked.
        shares: the share that was gone in each whole round of training, 0 first.
        training: of the last round.
        finished: False if a deadline ended it before the last round was whole.
    """

    masks: dict[str, Tensor]
    early: dict[str, Tensor]
    shares: tuple[float, ...]
    training: TrainResult | None
    finished: bool


def rewinding(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    pattern: str | Pattern | Mapping[str, str | Pattern],
    shares: Sequence[float],
    early: int = 0,
    score: Score = magnitude,
    folder: str | Path | None = None,
    **training: Unpack[Training],
) -> Ticket:
    """Trains ``model`` in place ``1 + len(shares)`` times: dense, then once for each share, from the early weights under the masks.

    Every training runs the whole schedule of ``config``. What is gone stays gone. In ``model`` are the weights of the last whole
    round, with exact zeros.

    Args:
        pattern: as in `gradual`; its own share of zeros is the most that is reached: "unstructured 0.9" with shares up to 0.9.
        shares: gone after each pruning, ascending; see `geometric`.
        early: the step of the dense training whose state is gone back to; 0 is the start. Normalization statistics go back, too.
        score: of the trained weights; what is low goes first.
        folder: each round's weights and masks are kept there; called again, it goes on after the last whole round, and within a
            round after the last whole epoch.
        training: see `gradual`; ``checkpoint`` is taken from the folder.

    Raises:
        DataError: if the shares do not ascend, or the dense training is shorter than ``early``.
        RunError: if the folder belongs to another job.
    """
    config = config or TrainConfig()
    patterns = patterns_of(model, pattern)
    if list(shares) != sorted(shares) or not all(0 <= s < 1 for s in shares) or early < 0:
        raise DataError(f"rewinding needs ascending shares in [0, 1) and early >= 0; got shares={list(shares)}, early={early}")
    start = copy_state(model)
    settings = _settings(config, patterns, shares, early, score, start)
    rounds = Rounds(folder, settings)
    masks = {name: torch.ones_like(start[name], dtype=torch.bool) for name in patterns}
    state, rewound, done = start, start, list[float]()
    result: TrainResult | None = None
    for number, share in enumerate((0.0, *shares)):
        found = rounds.read(number)
        if found is not None:
            state, masks, rewound = (_part(found[0], part) for part in ("weights", "mask", "early"))
        else:
            new = masks
            if number:
                new = _pruned(model, patterns, masks, share, score)
                load_state(model, rewound)
                apply(live_state(model), new)
            training["checkpoint"] = rounds.checkpoint(number)
            result, caught = _train(model, data, objective, config, new, 0 if number else early, {**settings, "round": number}, **training)
            if result.stopped == "deadline":
                load_state(model, state)
                break
            if early and not number:
                rewound = _caught(caught, early)
            state, masks = copy_state(model), new
            rounds.write(number, _packed(state, masks, rewound), {"share": share, "gone": gone_share(masks)})
        load_state(model, state)
        done.append(gone_share(masks))
    whole = len(done) == 1 + len(shares)
    return Ticket(masks, rewound, tuple(done), result, whole)


def _caught(state: dict[str, Tensor] | None, early: int) -> dict[str, Tensor]:
    if state is None:
        raise DataError(f"the dense training ended before step {early}, to which it should be gone back: lower early or train longer")
    return state


def _settings(
    config: TrainConfig, patterns: Mapping[str, Pattern], shares: Sequence[float], early: int, score: Score, start: Mapping[str, Tensor]
) -> dict[str, Any]:
    return {
        "method": "rewinding",
        "config": config.to_json(),
        "patterns": {name: str(kind) for name, kind in patterns.items()},
        "shares": list(shares),
        "early": early,
        "score": name_of(score),
        "start": norm_of(start),
    }


def _train(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig,
    masks: Masks,
    early: int | None,
    settings: Mapping[str, Any],
    **training: Unpack[Training],
) -> tuple[TrainResult, dict[str, Tensor] | None]:
    """One training under masks, and the state after its step ``early``, which is kept in the checkpoint from then on."""
    names = list(masks)
    rest = [name for name in live_state(model) if name not in {n for n, p in model.named_parameters() if p.requires_grad}]

    def before(beside: Beside) -> None:
        for name in names:
            if beside.get(name, MASK) is None:
                beside.put(name, MASK, masks[name].to(beside.parameters[name].device))
        quiet(beside, names)

    def after(beside: Beside) -> None:
        hold(beside, names)
        if beside.steps == early:
            live = live_state(model)
            first = next(iter(beside.parameters))
            for name in beside.parameters:
                beside.put(name, _EARLY, live[name].clone())
            for name in rest:
                beside.put(first, f"{_EARLY}:{name}", live[name].clone())

    result, beside = train_with(model, data, objective, config, settings, after, before, **training)
    apply(live_state(model), masks)
    apply(result.state, masks)
    first = next(iter(beside.parameters))
    caught = {n: beside.get(n, _EARLY) for n in beside.parameters} | {n: beside.get(first, f"{_EARLY}:{n}") for n in rest}
    state = {name: tensor for name, tensor in caught.items() if tensor is not None}
    return result, state if len(state) == len(caught) and early else None


def _pruned(
    model: nn.Module, patterns: Mapping[str, Pattern], masks: Mapping[str, Tensor], share: float, score: Score
) -> dict[str, Tensor]:
    """The masks of the next round, from the trained weights in the model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        return {name: grown(kind, score(name, parameters[name]), share, masks[name]) for name, kind in patterns.items()}


def _packed(state: Mapping[str, Tensor], masks: Masks, early: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {"weights": state, "mask": masks, "early": early}
    return {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.partition("/")[0] == part}
