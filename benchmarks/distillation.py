"""Distillation beside its peers: plain training, Hinton's, torchdistill's losses, ModelOpt's kd_loss, Shohin's default, at equal steps.

``python benchmarks/distillation.py [--task fashion] [--student 1/20] [--method shohin] [--seeds 5] [--jobs 2] [--again] [--list]``;
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shohin.run import write_atomic

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
RESULTS, TABLE = HERE / "distillation.json", HERE / "distillation.md"
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


def interpreter(method: str) -> str:
    """The Python that runs a method."""
    if method not in PEERS:
        return sys.executable
    return str(HERE.parent / f".venv-{PEERS[method]}" / "bin" / "python")


def attempt(cell: Cell) -> dict[str, Any] | str:
    """The record of one run in a process of its own, or what it said last."""
    task, student, method, seed = cell
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [interpreter(method), "-m", "distilling", task, student, method, str(seed)]
    if not Path(command[0]).exists():
        return f"{command[0]} does not exist: make benchmark-distillation sets it up"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()[-500:]
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return record


def key(record: dict[str, Any]) -> Cell:
    """What a record is of."""
    return record["task"], record["student"], record["method"], record["seed"]


def kept(teachers: dict[str, float] | None = None, *new: dict[str, Any]) -> tuple[dict[str, float], dict[Cell, dict[str, Any]]]:
    """What the file of results holds, with what is new, which is written there: other processes may write it too."""
    from distilling.summary import figures, table

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"teachers": {}, "runs": []}
    qualities = {**known["teachers"], **(teachers or {})}
    records = {key(record): record for record in (*known["runs"], *new)}
    records = {cell: records[cell] for cell in sorted(records)}
    if teachers is not None:
        runs = list(records.values())
        found = {"teachers": qualities, "figures": figures(runs, qualities), "runs": runs}
        write_atomic(RESULTS, (json.dumps(found, indent=1) + "\n").encode())
        write_atomic(TABLE, table(runs, qualities).encode())
    return qualities, records


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

    from distilling.summary import figures, table

    cells = all_cells(options.seeds)
    wanted = {i: getattr(options, name) for i, name in enumerate(("task", "student", "method"))}
    cells = [cell for cell in cells if all(not names or cell[i] in names for i, names in wanted.items())]
    if options.list:
        print("\n".join(" ".join(map(str, cell)) for cell in cells))
        return 0
    teachers, records = kept()
    for name in dict.fromkeys(cell[0] for cell in cells):
        if name not in teachers:
            kept({name: teacher_quality(name)})
    todo = [cell for cell in cells if options.again or cell not in records]
    failed = []
    with ThreadPoolExecutor(options.jobs) as executor:  # its threads only wait for the processes
        for cell, record in zip(todo, executor.map(attempt, todo), strict=True):
            if isinstance(record, str):
                failed.append(cell)
                print(*cell, "failed:", record, flush=True)
                continue
            print(*cell, f"{record['test']:.4f}, {record['seconds']:.0f} s", flush=True)
            kept({}, record)
    teachers, records = kept()
    print(table(list(records.values()), teachers))
    print(json.dumps(figures(list(records.values()), teachers), indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
