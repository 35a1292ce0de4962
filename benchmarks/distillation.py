"""Distillation beside its peers: plain training, Hinton's, torchdistill's losses, ModelOpt's kd_loss, Shohin's default, at equal steps.

``python benchmarks/distillation.py [--task fashion] [--student 1/20] [--method shohin] [--seeds 5] [--jobs 2] [--again] [--list]``;
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from records import HERE, Book, process, run_all

#: method -> the environment that holds its peer
PEERS = {
    "torchdistill:kd_even": "torchdistill",
    "torchdistill:logit_std": "torchdistill",
    "torchdistill:dist": "torchdistill",
    "modelopt:kd_loss": "modelopt",
    "modelopt:kd_loss_batchmean": "modelopt",
}
METHODS = ("plain", "hinton", "shohin", "shohin, not inherited", *PEERS)
#: tasks with methods of their own: "mse" of embeddings is what torchdistill and sentence-transformers do
OTHER = {"fashion cut": ("shohin", "scratch x3"), "minilm": ("start", "mse", "shohin")}
Cell = tuple[str, str, str, int]


def all_cells(seeds: int) -> list[Cell]:
    """Every run; of the texts, whose runs are long, two seeds at most, and one of what isn't trained."""
    from distilling.minilm import STUDENTS
    from distilling.tasks import TASKS

    students = {name: tuple(task.students) for name, task in TASKS.items()} | {"minilm": tuple(STUDENTS)}
    return [
        (task, student, method, seed)
        for task in students
        for student in students[task]
        for seed in range(seeds)
        for method in OTHER.get(task, METHODS)
        if task != "minilm" or seed < (1 if method == "start" else 2)
    ]


def teacher_quality(task: str) -> float:
    """On the test split; the teacher is trained here, once, before several processes ask for it."""
    if task == "minilm":
        from distilling.minilm import evaluated, load_teacher

        return evaluated(load_teacher()).figures().mean
    from distilling.tasks import TASKS

    return TASKS[task].data().quality(TASKS[task].teacher(), "test")


def attempt(cell: Cell) -> dict[str, Any] | str:
    """The record of one run in a process of its own, or what it said last."""
    return process("distilling", cell, PEERS.get(cell[2]), "benchmark-distillation")


def key(record: dict[str, Any]) -> Cell:
    """What a record is of."""
    return record["task"], record["student"], record["method"], record["seed"]


def book() -> Book:
    """Where the records are kept."""
    from distilling.summary import figures, table

    return Book(HERE / "distillation.json", HERE / "distillation.md", key, "teachers", figures, table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="distillation", description=__doc__)
    for name in ("task", "student", "method"):
        parser.add_argument(f"--{name}", action="append", default=[], help="only this (several may be given)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--list", action="store_true", help="only names")
    options = parser.parse_args()

    cells = all_cells(options.seeds)
    wanted = {i: getattr(options, name) for i, name in enumerate(("task", "student", "method"))}
    cells = [cell for cell in cells if all(not names or cell[i] in names for i, names in wanted.items())]
    if options.list:
        print("\n".join(" ".join(map(str, cell)) for cell in cells))
        return 0
    kept = book()
    teachers, records = kept.read()
    for name in dict.fromkeys(cell[0] for cell in cells):
        if name not in teachers:
            kept.add(whole={name: teacher_quality(name)})
    todo = [cell for cell in cells if options.again or cell not in records]
    failed = run_all(todo, attempt, kept, options.jobs, lambda record: f"{record['test']:.4f}, {record['seconds']:.0f} s")
    kept.show()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
