"""Pruning beside its peers: Torch-Pruning, ModelOpt's FastNAS and torch's own sparsity, at equal multiplications, samples and steps.

``python benchmarks/pruning.py [--model smartwatch] [--budget 0.5] [--method shohin] [--seeds 3] [--jobs 2] [--untrained] [--again]
[--list] [--show]``; goes on where it stopped. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from records import HERE, Book, Record, process, run_all

Cell = tuple[str, str, str, int]


def all_cells(seeds: int) -> list[Cell]:
    """Every run, the cheapest network first."""
    from cutting.methods import BUDGETS
    from cutting.originals import ORIGINALS

    return [
        (model, budget, method, seed)
        for model in reversed(ORIGINALS)
        for seed in range(seeds)
        for budget, (_, methods) in BUDGETS.items()
        for method in methods
    ]


def original_quality(name: str) -> dict[str, float]:
    """On validation and test; the network is trained here, once, before several processes ask for it."""
    from cutting.originals import ORIGINALS

    model, data = ORIGINALS[name].model(), ORIGINALS[name].data()
    return {split: data.quality(model, split) for split in ("validation", "test")}


def attempt(cell: Cell, *, untrained: bool) -> Record | str:
    """The record of one run in a process of its own, or what it said last."""
    return process("cutting", [*cell, *(["untrained"] if untrained else [])], None, "benchmark-pruning")


def key(record: dict[str, Any]) -> Cell:
    """What a record is of."""
    return record["model"], record["budget"], record["method"], record["seed"]


def book() -> Book:
    """Where the records are kept."""
    from cutting.summary import figures, table

    return Book(HERE / "pruning.json", HERE / "pruning.md", key, "originals", figures, table)


def whole(record: Record | None, untrained: bool) -> bool:
    """Whether a run needs no repetition: what could not be reached, or was not there yet, is tried again."""
    return record is not None and ("trained" in record or (untrained and "raw" in record))


def told(record: Record) -> str:
    """A line for the terminal; no figure of the test split."""
    if "unreachable" in record:
        return f"not reached: {record['unreachable']}"
    stages = ", ".join(f"{stage} {record[stage]['validation']:.4f}" for stage in ("raw", "recalibrated", "trained") if stage in record)
    return f"{stages} on validation, {record['whole_seconds']:.0f} s"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="pruning", description=__doc__)
    for name in ("model", "budget", "method"):
        parser.add_argument(f"--{name}", action="append", default=[], help="only this (several may be given)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--untrained", action="store_true", help="without the training after the cut; a later call adds it")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--list", action="store_true", help="only names")
    parser.add_argument("--show", action="store_true", help="only what is known already")
    options = parser.parse_args()

    from cutting.methods import DISTILLED

    cells = all_cells(options.seeds)
    wanted = {i: getattr(options, name) for i, name in enumerate(("model", "budget", "method"))}
    cells = [cell for cell in cells if all(not names or cell[i] in names for i, names in wanted.items())]
    if options.list:
        print("\n".join(" ".join(map(str, cell)) for cell in cells))
        return 0
    kept = book()
    if options.show:
        kept.show()
        return 0
    originals, records = kept.read()
    for name in dict.fromkeys(cell[0] for cell in cells):
        if name not in originals:
            kept.add(whole={name: original_quality(name)})
    if options.untrained:  # what differs from another method in its training alone
        cells = [cell for cell in cells if cell[2] != DISTILLED]
    todo = [cell for cell in cells if options.again or not whole(records.get(cell), options.untrained)]
    failed = run_all(todo, partial(attempt, untrained=options.untrained), kept, options.jobs, told)
    kept.show()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
