"""Seconds to score and cut: ``python benchmarks/cutting/speed.py [MODEL...] [--budget 0.5] [--rounds 7]``.

Torch-Pruning's Taylor run (gradients of the samples, its dependency graph, one step at a ratio found beforehand) beside `shohin.prune`
without recovery, and what compensation adds, on the same samples: interleaved in one process, CPU time of the thread, medians and
quartiles of the ratios within each round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import shohin
from cutting import depgraph
from cutting.common import Work, work
from cutting.originals import ORIGINALS
from shohin.errors import ShohinError

PEER, OURS, COMPENSATED = "torch-pruning:taylor", "shohin, recover=None", "shohin, compensated"
#: compensation may add this share of the peer's whole time
PROMISE, MORE = 1.0, 0.5


def peer(given: Work, ratio: float) -> nn.Module:
    """The whole of Torch-Pruning's run at a known ratio; the copy is counted, as `shohin.prune` makes one too."""
    model = copy.deepcopy(given.model)
    depgraph.accumulate(model, given)
    with depgraph.quiet():
        depgraph.pruner(model, given, depgraph.importance_of("taylor"), ratio).step()
    return model


def ours(given: Work, recover: str | None) -> shohin.Candidate:
    """`shohin.prune` over the samples alone, so that both are given them ready."""
    return shohin.prune(given.model, given.samples, given.budget, criterion="taylor", recover=recover, seed=given.seed)


def measured(timed: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds by name and round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(-1, rounds):
        for name, once in timed.items():
            began = time.thread_time()
            once()
            if round_ >= 0:
                seconds[name].append(time.thread_time() - began)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios of each round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return low, middle, high


def main() -> None:
    """Prints some lines for each network."""
    parser = argparse.ArgumentParser(prog="speed", description=__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *ORIGINALS], default=[])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    for name in settings.models or ORIGINALS:
        given = work(ORIGINALS[name], settings.budget, 0)
        known = depgraph.one_shot(given, "taylor").notes["ratio"]
        timed: dict[str, Callable[[], Any]] = {PEER: partial(peer, given, known), OURS: partial(ours, given, None)}
        try:
            ours(given, "compensate")
            timed[COMPENSATED] = partial(ours, given, "compensate")
        except ShohinError as error:
            print(f"{name}: not compensated: {error}")
        seconds = measured(timed, settings.rounds)
        print(f"{name}, {settings.budget} of multiplications, {sum(call.size for call in given.calls)} samples, {settings.rounds} rounds")
        for method, found in seconds.items():
            print(f"  {method:22} {statistics.median(found):7.3f} s")
        low, middle, high = ratio(seconds[OURS], seconds[PEER])
        print(f"  score and cut: {middle:.2f}x [{low:.2f}, {high:.2f}] of Torch-Pruning's, demanded {PROMISE:.1f}x")
        if COMPENSATED in seconds:
            more = [a - b for a, b in zip(seconds[COMPENSATED], seconds[OURS], strict=True)]
            low, middle, high = ratio(more, seconds[PEER])
            print(f"  compensation more: {middle:.2f}x [{low:.2f}, {high:.2f}], demanded {MORE:.1f}x")


if __name__ == "__main__":
    main()
