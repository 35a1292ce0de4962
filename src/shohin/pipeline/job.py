"""What every stage of a job needs, and how it asks the model and the data."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shohin.budget import Budget
from shohin.candidate import Candidate
from shohin.data import Call, Data
from shohin.errors import DataError
from shohin.evidence import Divergence, answers
from shohin.graph import Graph
from shohin.run import Run
from shohin.targets import Target
from shohin.training.randomness import generators_of, isolated, mix, seed_everything

#: most samples used for calibration, saliency and losses of views
CALIBRATION = 256
#: fewest samples for a loss of a view, and the seconds that one forward pass over its samples may take
LEAST, VIEW_SECONDS = 48, 2.0


@dataclass(eq=False)
class Job:
    """One call of `optimize`.

    Args:
        run: the folder.
        model: the user's model, never changed.
        data, target, budget, seed: as asked.
        graph: what can be chosen.
        deadline: `time.monotonic()` value after which no new long step begins, or None.
        methods: what may be chosen: "prune", "quantize", "skip", "distill".
        progress: show progress.
        candidates: finished ones by name.
    """

    run: Run
    model: nn.Module
    data: Data
    target: Target
    budget: Budget
    seed: int
    graph: Graph
    deadline: float | None
    methods: frozenset[str]
    progress: bool
    candidates: dict[str, Candidate] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the deadline."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    @contextmanager
    def seeded(self, *parts: object) -> Iterator[None]:
        """Inside, everything random comes from the job's seed and ``parts``; afterwards it is as before."""
        generators = generators_of(self.data.train, self.data.validation)
        with isolated(generators):
            seed_everything(mix(self.seed, *parts), generators)
            yield

    @cached_property
    def calibration(self) -> list[Call]:
        """Batches for calibration: the first of ``train`` in the job's order, at most `CALIBRATION` samples."""
        if not self.data.has_batches:
            raise DataError("this job needs batches: give Data(train=loader, validation=loader2)")
        with self.seeded("calibration"):
            return list(self.data.calls("train", CALIBRATION))

    @cached_property
    def held_out(self) -> list[Call]:
        """Other batches of ``train`` (some may be the same), for losses of views: they choose between plans, so validation stays fresh.

        A loader that does not shuffle gives its first batches to calibration: these are the last `CALIBRATION` of twice as many.
        """
        kept: deque[Call] = deque()
        total = 0
        with self.seeded("held out"):
            for call in self.data.calls("train", 2 * CALIBRATION):
                kept.append(call)
                total += call.size
                while total - kept[0].size >= CALIBRATION:
                    total -= kept.popleft().size
        return list(kept)

    @cached_property
    def view_samples(self) -> int:
        """Samples for a loss of a view (journaled): as many as the model runs in `VIEW_SECONDS`, `LEAST` to `CALIBRATION`."""
        found: int = self.run.once("view samples", "", self._view_samples)
        return found

    def _view_samples(self) -> int:
        call = self.held_out[0]
        began = time.monotonic()
        answers(self.model, [call])
        per_sample = (time.monotonic() - began) / call.size
        return max(LEAST, min(CALIBRATION, int(VIEW_SECONDS / max(per_sample, 1e-9))))

    @cached_property
    def view_calls(self) -> list[Call]:
        """The first held-out batches, of `view_samples` samples or a little more."""
        return first(self.held_out, self.view_samples)

    @cached_property
    def example(self) -> tuple[Any, ...]:
        """The example call's positional arguments."""
        return self.data.example().args

    @cached_property
    def example_kwargs(self) -> dict[str, Any]:
        """The example call's keyword arguments."""
        return self.data.example().kwargs

    @cached_property
    def divergence(self) -> Divergence:
        """How far a module's answers to the view batches are from the original's."""
        return Divergence(self.model, self.view_calls)

    def folder(self, name: str) -> Path:
        """The folder of a candidate."""
        path = self.run.folder / "candidates" / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def first(calls: list[Call], samples: int) -> list[Call]:
    """The first whole batches that hold at least ``samples`` samples."""
    out: list[Call] = []
    for call in calls:
        if sum(c.size for c in out) >= samples:
            break
        out.append(call)
    return out


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies values into a module's parameters and buffers by name, in place. Names that it lacks are left out."""
    own = _named(model)
    with torch.no_grad():
        for name, value in tensors.items():
            if name in own:
                own[name].copy_(value)


def own_tensors(model: nn.Module, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """A module's parameters and buffers, of the given names."""
    own = _named(model)
    return {name: own[name].detach() for name in names if name in own}


def cache_folder() -> Path:
    """Where measurements are kept between runs: ``$SHOHIN_CACHE``, or ``~/.cache/shohin``."""
    return Path(os.environ.get("SHOHIN_CACHE") or Path.home() / ".cache" / "shohin")
