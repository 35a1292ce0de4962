"""A benchmark of one network, a row for each way to round its weights: those that are asked for are run, all others stay as they were."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from records import HERE, Record
from shohin.run import write_atomic

Run = Callable[[], Record]


@dataclass(frozen=True)
class Sheet:
    """What such a benchmark is.

    Args:
        name: of the command, and of the two files.
        ours: the row that is held against the best peer's (the rows that do not begin with "shohin").
        figure: the error by which it is, and its name.
        share: of the best peer's error, that is demanded.
        text: Markdown of the values that are not of one row, and the rows with the smallest error first.
    """

    name: str
    ours: str
    figure: Callable[[Record], float]
    error: str
    share: float
    text: Callable[[Record, Sequence[Record]], list[str]]

    @property
    def results(self) -> Path:
        """The JSON file; the table lies beside it."""
        return HERE / f"quantization_{self.name}.json"

    def verdict(self, records: Sequence[Record]) -> Record:
        """Ours beside the best peer."""
        mine = next((r for r in records if r["name"] == self.ours), None)
        peers = [r for r in records if not r["name"].startswith("shohin")]
        if mine is None or not peers:
            return {}
        best = min(peers, key=self.figure)
        ratio = self.figure(mine) / self.figure(best)
        return {"best_peer": best["name"], "ratio": ratio, "demanded": self.share, "met": ratio <= self.share}

    def table(self, whole: Record, records: Sequence[Record]) -> str:
        """Markdown, with the verdict."""
        lines = self.text(whole, sorted(records, key=self.figure))
        if found := self.verdict(records):
            said = "met" if found["met"] else "not met"
            beside = f"{found['ratio']:.2f}x the {self.error} of the best peer ({found['best_peer']})"
            lines = [*lines, "", f"- {self.ours}: {beside}, demanded {self.share}: {said}"]
        return "\n".join(lines) + "\n"

    def main(self, arguments: list[str], description: str | None, begin: Callable[[Path], tuple[Record, Mapping[str, Run]]]) -> int:
        """The command.

        Args:
            begin: with a folder that lasts while it runs, the values that are not of one row, and what makes the record of each row.
        """
        parser = argparse.ArgumentParser(prog=f"quantization {self.name}", description=description)
        parser.add_argument("--rows", nargs="+", default=None, help="names, or beginnings of names; all others stay as they were")
        parser.add_argument("--show", action="store_true", help="only what is known already")
        given = parser.parse_args(arguments)
        held = json.loads(self.results.read_text("utf-8")) if self.results.exists() else {"whole": {}, "records": []}
        if given.show:
            print(self.table(held["whole"], held["records"]))
            return 0
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        records = {r["name"]: r for r in held["records"]}
        with tempfile.TemporaryDirectory() as folder:
            whole, rows = begin(Path(folder))
            for name, run in rows.items():
                if given.rows is not None and not any(name.startswith(row) for row in given.rows):
                    continue
                records[name] = {"name": name, **run()}
                print(name, f"{self.error} {self.figure(records[name]):.6f}, {records[name]['seconds']:.0f} s", flush=True)
                ordered = list(records.values())
                found = {"whole": whole, "verdict": self.verdict(ordered), "records": ordered}
                write_atomic(self.results, (json.dumps(found, indent=1) + "\n").encode())
                write_atomic(self.results.with_suffix(".md"), self.table(whole, ordered).encode())
        print(self.results.with_suffix(".md").read_text("utf-8"))
        return 0
