"""Rows of answers on disk: a safetensors file for the new rows of each batch, whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shohin.distillation.keys import row_digests

#: files that stay mapped for rows read one by one
OPEN = 1024

#: bytes up to which a file is read whole for some of its rows, which is faster than slices
SMALL = 1 << 18


@dataclass(frozen=True)
class Rows:
    """Answers of some samples.

    Args:
        keys: 16 bytes for each.
        tensors: ``[len(keys), ...]`` each.
        note: of whoever wrote them, the same for all rows.
    """

    keys: Sequence[bytes]
    tensors: list[Tensor]
    note: str


class Shards:
    """Rows in a folder of their own, which other processes may write at the same time.

    A file holds keys ``[n, 16]`` (uint8), a digest of each row ``[n, 16]`` and the rows; its name is the digest of keys, digests, note and
    owner, so a file that was damaged, renamed or moved here from elsewhere is found out. Such a file is taken away with a warning.

    Args:
        root: bounded by ``bytes_`` in all; holds the folder.
        own: whose rows these are, a part of the folder's name.

    ``where``: the file and row of each key.
    """

    def __init__(self, root: Path, own: str, bytes_: int) -> None:
        self.folder, self.own, self.writes = root / f"teacher-{own}", own, True
        self.where: dict[bytes, tuple[str, int]] = {}
        self.free = bytes_ - sum(_size(path) for path in root.glob("teacher-*/*.safetensors"))
        self._sizes: dict[str, int] = {}
        self._open: dict[str, Any] = {}
        self._changed = -1
        for leftover in root.glob("teacher-*/*.tmp"):  # of killed writers; others may be writing now
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 3600:
                    leftover.unlink()
        self.refresh(counted=True)

    def refresh(self, counted: bool = False) -> None:
        """Reads the keys of files that came since the last time; ``counted`` if the bound knows of them already."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except OSError:  # nothing was written yet
            return
        if changed == self._changed:
            return
        self._changed = changed  # noted before the look, so that nothing can come unseen after it
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._sizes and self._admit(path) and not counted:
                self.free -= self._sizes[path.name]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._sizes[name]

    def read(self, name: str, rows: Sequence[int] | None = None) -> Rows | None:
        """Rows of a file, all by default; None if they are damaged."""
        try:
            if self._sizes[name] <= SMALL:
                found, note = _loaded(self.folder / name)
                tensors = [
                    found[key] if rows is None else found[key].index_select(0, torch.tensor(rows))
                    for key in ("keys", "sums", *_names(found))
                ]
            else:
                file = self._opened(name, rows is not None)
                tensors = [_taken(file, key, rows) for key in ("keys", "sums", *_names(file.keys()))]
                note = file.metadata()["note"]
            if _sums(self.own, note, tensors[0], tensors[2:]) != _split(tensors[1]):
                raise ValueError("its contents do not fit their digests")
            return Rows(_split(tensors[0]), tensors[2:], note)
        except Exception as error:  # safetensors raises its own types, which differ between versions
            self._drop(self.folder / name, error)
            return None

    def write(self, rows: Rows) -> None:
        """Under another name first, so that a reader finds all of it or nothing. What cannot be written only warns."""
        from safetensors.torch import save

        if not self.writes:
            return
        temporary = ""
        try:
            keys = torch.frombuffer(bytearray(b"".join(rows.keys)), dtype=torch.uint8).reshape(-1, 16)
            tensors = [t.detach().cpu().contiguous() for t in rows.tensors]
            sums = b"".join(_sums(self.own, rows.note, keys, tensors))
            found = {"keys": keys, "sums": torch.frombuffer(bytearray(sums), dtype=torch.uint8).reshape(-1, 16)}
            # Clones, for two answers may share memory.
            data = save(found | {str(i): t.clone() for i, t in enumerate(tensors)}, {"note": rows.note})
            if len(data) > self.free:
                raise OSError(f"disk_bytes is reached with {len(data)} bytes more; raise it or delete folders of other teachers")
            self.folder.mkdir(parents=True, exist_ok=True)
            number, temporary = tempfile.mkstemp(suffix=".tmp", dir=self.folder)
            with open(number, "wb") as file:
                file.write(data)
            path = self.folder / self._name(b"".join(rows.keys), sums, rows.note)
            os.replace(temporary, path)
            self.free -= len(data)
            self._know(path.name, len(data), rows.keys)
        except Exception as error:
            warnings.warn(f"the teacher's answers are no longer written to {self.folder}: {error}", stacklevel=6)
            self.writes = False
            if temporary:
                Path(temporary).unlink(missing_ok=True)

    def _admit(self, path: Path) -> bool:
        """Reads the keys of a file. False if it is damaged."""
        from safetensors import safe_open

        try:
            if _size(path) <= SMALL:
                found, note = _loaded(path)
                keys, sums = found["keys"], found["sums"]
            else:
                with safe_open(str(path), framework="pt") as file:
                    keys, sums, note = file.get_tensor("keys"), file.get_tensor("sums"), file.metadata()["note"]
            if self._name(keys.numpy().tobytes(), sums.numpy().tobytes(), note) != path.name:
                raise ValueError("its keys do not fit its name")
            self._know(path.name, _size(path), _split(keys))
            return True
        except Exception as error:
            self._drop(path, error)
            return False

    def _know(self, name: str, size: int, keys: Sequence[bytes]) -> None:
        self._sizes[name] = size
        for i, key in enumerate(keys):
            self.where.setdefault(key, (name, i))

    def _drop(self, path: Path, error: Exception) -> None:
        warnings.warn(f"the teacher's answers {path} are damaged and computed anew: {error}", stacklevel=8)
        self.free += _size(path)
        self._open.pop(path.name, None)
        self._sizes.pop(path.name, None)
        self.where = {key: place for key, place in self.where.items() if place[0] != path.name}
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _opened(self, name: str, again: bool) -> Any:
        """A file, kept open if it is to be read ``again``."""
        from safetensors import safe_open

        if (file := self._open.get(name)) is None:
            file = safe_open(str(self.folder / name), framework="pt")
            if again:
                if len(self._open) >= OPEN:
                    self._open.pop(next(iter(self._open)))
                self._open[name] = file
        return file

    def _name(self, keys: bytes, sums: bytes, note: str) -> str:
        digest = hashlib.blake2b(b"".join([self.own.encode(), b"\0", note.encode(), b"\0", keys, sums]), digest_size=16)
        return f"{digest.hexdigest()}.safetensors"


def _names(keys: Iterable[str]) -> list[str]:
    return sorted((key for key in keys if key.isdigit()), key=int)


def _loaded(path: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a small file, and its note; in half the time that mapping it takes."""
    from safetensors.torch import load

    data = path.read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), head["__metadata__"]["note"]


def _taken(file: Any, name: str, rows: Sequence[int] | None) -> Tensor:
    """Rows of a tensor in a file, by slices unless all are wanted."""
    if rows is None:
        whole: Tensor = file.get_tensor(name)
        return whole
    view = file.get_slice(name)
    return torch.cat([view[i : i + 1] for i in rows])


def _sums(own: str, note: str, keys: Tensor, tensors: Sequence[Tensor]) -> list[bytes]:
    """A digest of each row, which tells its key and its teacher too."""
    shapes = [f"{t.dtype}{tuple(t.shape[1:])}" for t in tensors]
    return row_digests("\0".join([own, note, *shapes]).encode(), [keys, *tensors])


def _split(keys: Tensor) -> list[bytes]:
    data = keys.numpy().tobytes()
    return [data[i : i + 16] for i in range(0, len(data), 16)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # another process took it away
        return 0
