"""One model through both tools, interleaved, in one process."""

from __future__ import annotations

import copy
import gc
import statistics
import time
import warnings
from typing import Any

import torch

from sweep.entry import Entry
from understanding import ours, peer
from understanding.limits import Late, limit, peaks
from understanding.models import build, short, sizes

#: seconds after which no further pass of a model is started
ENOUGH = 30


def trial(entry: Entry, repeat: int, seconds: int, with_peer: bool = True) -> dict[str, Any]:
    """What is recorded of a model: sizes, and for each tool a verdict, seconds (medians) and memory in MB.

    Args:
        repeat: passes of each tool that are timed (fewer of models that take long).
        seconds: limit on each pass.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = build(entry)
    parameters, size = sizes(model)
    record: dict[str, Any] = {"name": entry.name, "family": entry.family, "note": entry.note, "parameters": parameters}
    record["megabytes"] = round(size / 2**20, 1)
    tools: dict[str, Any] = {"shohin": ours, "torch_pruning": peer} if with_peer else {"shohin": ours}
    for name in tools:
        record[name] = _judged(name, entry, seconds)
    passes: dict[str, list[dict[str, Any]]] = {name: [] for name in tools}
    started = time.perf_counter()
    for done in range(repeat):
        if done and time.perf_counter() - started > ENOUGH:
            break
        for name, tool in tools.items():
            if record[name]["verdict"] in ("raised", "timeout"):
                continue
            own = copy.deepcopy(model) if name == "torch_pruning" else model  # it prunes in place
            gc.collect()
            try:
                with limit(seconds):
                    passes[name].append(tool.timed(own, entry))
            except (Exception, Late) as error:
                record[name]["timing"] = short(error)
    for name, tool in tools.items():
        found = passes[name]
        record[name]["passes"] = len(found)
        record[name]["seconds"] = {k: round(statistics.median(p[k] for p in found), 4) for k in found[0]} if found else {}
        if found:
            record[name]["peak_mb"] = peaks(tool.steps(model, entry), seconds)
    return record


def _judged(name: str, entry: Entry, seconds: int) -> dict[str, Any]:
    if name == "torch_pruning":
        return peer.judged(entry, seconds)
    try:
        with limit(2 * seconds):  # understands twice and compares twice
            return ours.judged(entry)
    except Late as error:
        return {"verdict": "timeout", "detail": str(error)}
