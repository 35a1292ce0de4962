"""Rounds on disk: what each whole round left, so that a second call goes on after the last one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shohin.errors import RunError
from shohin.run import read_json, read_tensors, write_json, write_tensors


class Rounds:
    """A folder with ``settings.json`` and, for each round, ``<number>/weights.safetensors`` and, written last, ``<number>/round.json``.

    Args:
        folder: made if missing; None keeps nothing.
        settings: of the job, JSON-able; a folder of another job is refused.

    Raises:
        RunError: if the folder holds another job, or is damaged.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        asked = json.loads(json.dumps(settings))
        path = self.folder / "settings.json"
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(not p.name.endswith(".tmp") for p in self.folder.iterdir())):
                raise RunError(f"{self.folder} exists and holds no rounds of pruning; choose another or an empty folder")
            write_json(path, asked)
        there = read_json(path)
        if there != asked:
            key = next(k for k in sorted(there.keys() | asked.keys()) if there.get(k) != asked.get(k))
            raise RunError(
                f"{self.folder} belongs to another job: {key} is {there.get(key)!r} there, {asked.get(key)!r} here; use another folder"
            )

    def read(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Weights and record of a whole round, or None."""
        if self.folder is None or not (self.folder / str(number) / "round.json").exists():
            return None
        return read_tensors(self.folder / str(number) / "weights.safetensors"), read_json(self.folder / str(number) / "round.json")

    def write(self, number: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Makes a round whole: durable when this returns. Its training's checkpoint is removed."""
        if self.folder is None:
            return
        write_tensors(self.folder / str(number) / "weights.safetensors", tensors)
        write_json(self.folder / str(number) / "round.json", record)
        shutil.rmtree(self.folder / str(number) / "work", ignore_errors=True)

    def checkpoint(self, number: int) -> Path | None:
        """Where the training of a round keeps its checkpoint."""
        return None if self.folder is None else self.folder / str(number) / "work" / "training.safetensors"
