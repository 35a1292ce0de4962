"""What the benchmarks share: a run in a process of its own, records merged in a JSON file, a table beside it, means with intervals."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from shohin.run import write_atomic

HERE = Path(__file__).parent
Record = dict[str, Any]
Cell = tuple[Any, ...]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of runs, and its 95 % interval by Student's t; NaN where there are too few."""
    if not values:
        return math.nan, math.nan, math.nan
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def known(*values: float) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(value) else value for value in values]


def interpreter(environment: str | None) -> str:
    """The Python of an environment ``.venv-NAME`` at the root of the repository; None is the one that runs."""
    return sys.executable if environment is None else str(HERE.parent / f".venv-{environment}" / "bin" / "python")


def process(module: str, arguments: Sequence[Any], environment: str | None, target: str) -> Record | str:
    """The JSON record that ``python -m module arguments`` prints last, run with one thread; or what it said last.

    Args:
        target: of make, that sets the environment up.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [interpreter(environment), "-m", module, *map(str, arguments)]
    if not Path(command[0]).exists():
        return f"{command[0]} does not exist: make {target} sets it up"
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()[-500:]
    record: Record = json.loads(done.stdout.strip().splitlines()[-1])
    return record


@dataclass(frozen=True)
class Book:
    """Records of runs in a JSON file, and their table.

    Args:
        results, table: the two files.
        key: what a record is of.
        whole: name of the values that are not of one run, by task.
        figures, text: of the records and these values.
    """

    results: Path
    table: Path
    key: Callable[[Record], Cell]
    whole: str
    figures: Callable[[list[Record], dict[str, Any]], dict[str, Any]]
    text: Callable[[list[Record], dict[str, Any]], str]

    def read(self) -> tuple[dict[str, Any], dict[Cell, Record]]:
        """The values that are not of one run, and the records in order of their keys."""
        held = json.loads(self.results.read_text()) if self.results.exists() else {self.whole: {}, "runs": []}
        records = {self.key(record): record for record in held["runs"]}
        return held[self.whole], {cell: records[cell] for cell in sorted(records)}

    def add(self, *new: Record, whole: dict[str, Any] | None = None) -> None:
        """Writes both files, with what is new; other processes may have written them since they were read."""
        values, records = self.read()
        values, records = {**values, **(whole or {})}, {**records, **{self.key(record): record for record in new}}
        runs = [records[cell] for cell in sorted(records)]
        found = {self.whole: values, "figures": self.figures(runs, values), "runs": runs}
        write_atomic(self.results, (json.dumps(found, indent=1) + "\n").encode())
        write_atomic(self.table, self.text(runs, values).encode())

    def show(self) -> None:
        """Prints table and figures."""
        values, records = self.read()
        print(self.text(list(records.values()), values))
        print(json.dumps(self.figures(list(records.values()), values), indent=1))


def run_all(
    todo: Sequence[Cell], attempt: Callable[[Any], Record | str], book: Book, jobs: int, told: Callable[[Record], str]
) -> list[Cell]:
    """Runs cells, ``jobs`` at a time, each recorded when it is done. Returns those that failed."""
    failed = []
    with ThreadPoolExecutor(jobs) as executor:  # its threads only wait for the processes
        cells = {executor.submit(attempt, cell): cell for cell in todo}
        for future in as_completed(cells):
            cell, record = cells[future], future.result()
            if isinstance(record, str):
                failed.append(cell)
                print(*cell, "failed:", record, flush=True)
                continue
            print(*cell, told(record), flush=True)
            book.add(record)
    return failed
