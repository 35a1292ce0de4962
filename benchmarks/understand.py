"""Shohin's understanding beside Torch-Pruning's dependency graph: coverage, wrong results, time, memory.

``python benchmarks/understand.py [--only PATTERN] [--repeat 3] [--again] [--ours] [--list]``; goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "understand.json", HERE / "understand.md"
#: seconds of processor time for one pass of one tool; more is a failure
SECONDS = 60


def _child(name: str, repeat: int, with_peer: bool, pipe: Connection) -> None:
    from understanding.models import chosen
    from understanding.trial import trial

    pipe.send(trial(chosen()[name], repeat, SECONDS, with_peer))


def attempt(name: str, repeat: int, with_peer: bool = True) -> dict[str, Any] | None:
    """The record of a model, tried in a fork; None if the process died."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, repeat, with_peer, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] | None = receiver.recv() if receiver.poll(SECONDS * 10 * (repeat + 2)) else None
    except EOFError:
        found = None
    process.kill()
    process.join()
    return found


def warm() -> None:
    """Both tools once on a small model, so that imports and caches are not measured."""
    from torch import nn

    from sweep.entry import Entry, floats
    from understanding.trial import trial

    def small() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))

    trial(Entry("small", "classification", small, lambda batch, g: ((floats(g, batch, 3, 8, 8),), {})), 1, SECONDS)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="understand", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="a pattern of names (several may be given)")
    parser.add_argument("--repeat", type=int, default=3, help="timed passes of each tool")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time; more than one disturbs the timings")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--ours", action="store_true", help="Shohin again; what is known of the other tool, which has not changed, stays")
    parser.add_argument("--list", action="store_true", help="names only")
    options = parser.parse_args()
    import torch

    from sweep.torchvision_schemas import torchvision_models
    from understanding.models import chosen
    from understanding.summary import summary, table

    torch.set_num_threads(1)
    names = [n for n in chosen() if not options.only or any(fnmatch.fnmatch(n, f"*{p}*") for p in options.only)]
    if options.list:
        print("\n".join(names))
        return 0
    torchvision_models()
    if any(n.startswith("transformers/") for n in names):
        importlib.import_module("transformers")
    warm()
    records: dict[str, dict[str, Any]] = {}
    if RESULTS.exists():
        records = {r["name"]: r for r in json.loads(RESULTS.read_text())["models"]}
    missing = []
    todo = [n for n in names if (n in records) == options.ours or options.again]
    executor = ThreadPoolExecutor(options.jobs)  # its threads only wait for the forks
    for name, record in zip(todo, executor.map(lambda n: attempt(n, options.repeat, not options.ours), todo), strict=True):
        if record is None:
            missing.append(name)
            continue
        records[name] = {**records[name], **record} if options.ours else record
        ordered = [records[n] for n in chosen() if n in records]
        text = json.dumps({"summary": summary(ordered), "models": ordered}, indent=1)
        RESULTS.write_text(text + "\n")
        TABLE.write_text(table(ordered))
        print(
            f"{name:40} Shohin {records[name]['shohin']['verdict']}, Torch-Pruning {records[name]['torch_pruning']['verdict']}", flush=True
        )
    done = [records[n] for n in names if n in records]
    print(json.dumps(summary(done), indent=1))
    for name in missing:
        print(f"{name}: could not be built, or the process died or took too long: not recorded")
    return 1 if missing or any(r["shohin"]["verdict"] == "wrong" for r in done) else 0


if __name__ == "__main__":
    sys.exit(main())
