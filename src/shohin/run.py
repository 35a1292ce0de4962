"""The run folder: everything that a job made, written so that any stop leaves it whole.

Layout::

    config.json                 what was asked; a resumed run must ask the same
    journal.jsonl               one line per finished stage, appended and flushed: {"stage", "key", "data", "time"}
    candidates/<name>/          candidate.json (plan, metrics, notes, checksums), model.safetensors, model.onnx, model.parity.*
    work/                       caches and checkpoints; may be deleted
    .lock                       held by the job at work, where the system has advisory locks; empty
    report.html

Files are written to a temporary name and renamed, so that a reader never sees half a file. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from shohin.errors import RunError

#: in the folder of one step: its training, as far as it came
CHECKPOINT = "training.safetensors"


def write_atomic(path: Path, data: bytes) -> None:
    """Writes ``data`` so that ``path`` holds either the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    _replace(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes new names in a folder durable, where the platform lets a folder be synchronized."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> Any:
    """Reads JSON. Raises RunError if the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} is missing: the run folder is incomplete or not a run folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by name as safetensors, atomically. Shared storage is copied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, str(temporary))
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    _replace(temporary, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads safetensors. Raises RunError if the file is missing or damaged."""
    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run folder is incomplete") from None
    except Exception as error:  # safetensors raises its own types, which differ between versions
        raise RunError(f"{path} is damaged: {error}") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


#: descriptors of the locks that this process holds
_LOCKS: set[int] = set()


def _lock(folder: Path) -> int | None:
    """Takes the lock of a run folder; it goes with the process. None where there are no such locks (some systems and networks).

    Raises:
        RunError: if it is taken.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    number = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        if isinstance(error, BlockingIOError):
            raise RunError(f"another job is at work in {folder}: wait for its end, stop it, or use another folder") from None
        return None
    _LOCKS.add(number)
    return number


def _unlock(number: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has no lock: its copy was closed when it began
        _LOCKS.discard(number)
        os.close(number)


def _after_fork() -> None:
    """A child, such as a worker of a DataLoader, may outlive a killed job and must not hold its lock."""
    for number in _LOCKS:
        os.close(number)
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _ours(path: Path) -> bool:
    """True for what a run that was killed at its start may leave: its work folder, its lock and half-written files."""
    return path.name in ("work", ".lock") or (path.name.startswith(".") and path.name.endswith(".tmp"))


class Run:
    """A run folder, new or to be resumed.

    With a configuration it is a job's: it holds the folder's lock until `close`, the end of a ``with`` block, or the end of the
    object or the process. Reading takes no lock.

    Args:
        folder: created if missing.
        config: what was asked, JSON-able; compared with what the folder holds. None reads an existing folder.

    Raises:
        RunError: if the folder holds a run with another configuration, is damaged, or is not a run folder, or if another job
            is at work in it.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self._release: Callable[[], Any] | None = None
        if config is None:
            self.config = self._read_config()
            self.entries = self._read_journal()
            return
        asked: dict[str, Any] = json.loads(json.dumps(config))
        self._may_use(asked)  # before the lock's file is made: the folder may be no run's
        self.folder.mkdir(parents=True, exist_ok=True)
        number = _lock(self.folder)
        if number is not None:
            self._release = weakref.finalize(self, _unlock, number, os.getpid())
        try:
            self._begin(asked)
        except BaseException:
            self.close()
            raise

    def _may_use(self, asked: Mapping[str, Any]) -> bool:
        """True if the folder holds this job already. Raises RunError if it holds anything else."""
        if (self.folder / "config.json").exists():
            self.config = self._read_config()
            self._same(asked)
            return True
        if self.folder.exists() and (not self.folder.is_dir() or any(not _ours(p) for p in self.folder.iterdir())):
            raise RunError(f"{self.folder} exists and is not a run folder; choose another 'out' or an empty folder")
        return False

    def _begin(self, asked: dict[str, Any]) -> None:
        if self._may_use(asked):  # asked again under the lock: another job may have come first
            for leftover in self.folder.rglob(".*.tmp"):  # half-written files of a killed job
                leftover.unlink(missing_ok=True)
        else:
            self.config = asked
            write_json(self.folder / "config.json", asked)
        self.entries = self._read_journal()

    def close(self) -> None:
        """Gives the folder free for another job. What is read stays usable."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        found = read_json(path)
        if not isinstance(found, dict):
            raise RunError(f"{path} is damaged: it holds no configuration")
        return found

    def _same(self, asked: Mapping[str, Any]) -> None:
        hints = {"fingerprint": "it belongs to another model", "weights": "it belongs to another model", "data": "it looks at other data"}
        for key in [*hints, *sorted((asked.keys() | self.config.keys()) - hints.keys())]:  # the gravest difference is named
            if asked.get(key) != self.config.get(key):
                hint = hints.get(key, "to change it, use another folder")
                raise RunError(
                    f"{self.folder} holds a run with another {key}: {hint} (there {self.config.get(key)!r}, asked {asked.get(key)!r})"
                )

    def _read_journal(self) -> list[dict[str, Any]]:
        path = self.folder / "journal.jsonl"
        if not path.exists():
            return []
        entries = []
        # what follows the last line's end was cut off by a kill, or is being written: its stage has not finished
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                if not {"stage", "key", "data", "time"} <= entry.keys():
                    raise ValueError("not an entry")
            except (ValueError, AttributeError):
                raise RunError(f"{path} is damaged in line {number}; restore it or use another folder") from None
            entries.append(entry)
        return entries

    def append(self, stage: str, key: str, data: Any) -> None:
        """Journals a finished step; durable when this returns."""
        entry = {"stage": stage, "key": key, "data": data, "time": time.time()}
        line = json.dumps(entry)
        path = self.folder / "journal.jsonl"
        raw = path.read_bytes() if path.exists() else b""
        if not raw.endswith(b"\n") and raw:
            write_atomic(path, raw[: raw.rfind(b"\n") + 1])  # half a line from a kill
        new = not path.exists()
        with open(path, "a") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
        if new:
            _sync_folder(self.folder)
        self.entries.append(json.loads(line))

    def find(self, stage: str, key: str = "") -> dict[str, Any] | None:
        """The journaled entry of a step, or None if it has not finished."""
        return next((e for e in self.entries if e["stage"] == stage and e["key"] == key), None)

    def once(self, stage: str, key: str, work: Callable[[], Any]) -> Any:
        """The journaled result of a step; it is done and journaled first if it has not been. Results must be JSON-able."""
        entry = self.find(stage, key)
        if entry is None:
            self.append(stage, key, work())
            entry = self.entries[-1]
        return entry["data"]

    def work(self, name: str) -> Path:
        """A path for a cache or a checkpoint."""
        path = self.folder / "work"
        path.mkdir(parents=True, exist_ok=True)
        return path / name
