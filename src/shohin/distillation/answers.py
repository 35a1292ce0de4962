"""Answers remembered row by row, in bounded memory and on disk; of models this file knows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shohin.distillation.shards import Rows, Shards

#: bytes up to which a block of rows grows; then another begins, so that little is copied
BLOCK = 16 << 20

Kind = tuple[object, ...]


@dataclass(frozen=True)
class Found:
    """Remembered rows.

    Args:
        positions: of their keys among those that were asked for.
        tensors: ``[len(positions), ...]`` each, in this order.
        note: what was kept with them.
        read: how many of them came from the disk now.
    """

    positions: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    note: str = ""
    read: int = 0

    def fits(self, tensors: Sequence[Tensor], note: str) -> bool:
        """True if these rows are of the same kind, or nothing was found."""
        return not self.positions or _kind(tensors, note) == _kind(self.tensors, self.note)

    def joined(self, positions: Sequence[int], tensors: Sequence[Tensor], note: str) -> Found:
        """With more rows, which fit."""
        if not self.positions:
            return Found(list(positions), list(tensors), note, self.read)
        together = [torch.cat(pair) for pair in zip(self.tensors, tensors, strict=True)]
        return Found([*self.positions, *positions], together, note, self.read)

    def ordered(self) -> list[Tensor]:
        """The tensors in the order of the positions."""
        order = sorted(range(len(self.positions)), key=self.positions.__getitem__)
        if order == list(range(len(order))):
            return self.tensors
        index = torch.tensor(order)
        return [t.index_select(0, index.to(t.device)) for t in self.tensors]


class Answers:
    """Rows by key. A row is one or more tensors; it is never changed or forgotten.

    Args:
        memory: bytes of rows, beside about 200 bytes for each key and at most half a `BLOCK` in reserve for each kind of row.
        disk: where rows are kept too, or None.
    """

    def __init__(self, memory: int, disk: Shards | None = None) -> None:
        self.free, self.disk = memory, disk
        self._where: dict[bytes, tuple[_Table, int]] = {}
        self._tables: dict[Kind, _Table] = {}

    def find(self, keys: Sequence[bytes], device: torch.device) -> Found:
        """What is known of ``keys``; nothing where their rows differ in note, types or shapes.

        A file of the disk is read whole into memory while it fits there, otherwise only the rows that are asked for are read.
        """
        places = [self._where.get(key) for key in keys]
        unknown = [i for i, place in enumerate(places) if place is None]
        pieces: list[Found] = []
        if unknown and self.disk is not None:
            pieces = self._from_disk(self.disk, keys, unknown, device)
            places = [self._where.get(key) for key in keys]
        read = sum(len(piece.positions) for piece in pieces) + sum(places[i] is not None for i in unknown)
        for table in {id(place[0]): place[0] for place in places if place}.values():
            positions = [i for i, place in enumerate(places) if place and place[0] is table]
            tensors = table.take([place[1] for place in places if place and place[0] is table])
            pieces.append(Found(positions, [t.to(device) for t in tensors], table.note))
        if not pieces or not all(pieces[0].fits(piece.tensors, piece.note) for piece in pieces):
            return Found()
        together = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*(piece.tensors for piece in pieces), strict=True)]
        return Found([i for piece in pieces for i in piece.positions], together, pieces[0].note, read)

    def keep(self, keys: Sequence[bytes], tensors: Sequence[Tensor], note: str) -> None:
        """Remembers rows ``[len(keys), ...]``; those that are known already stay as they are, those that do not fit are left out."""
        if self.disk is not None and (new := _chosen(Rows(keys, list(tensors), note), self.disk.where)).keys:
            self.disk.write(new)
        self._store(Rows(keys, list(tensors), note))

    def _store(self, rows: Rows) -> None:
        new = _chosen(rows, self._where)
        if not new.keys:
            return
        kind = (*_kind(new.tensors, new.note), new.tensors[0].device)
        if (table := self._tables.get(kind)) is None:
            table = self._tables[kind] = _Table(new)
        first = table.size
        count = min(len(new.keys), self.free // table.row_bytes)
        table.add([t[:count] for t in new.tensors])
        self.free -= count * table.row_bytes
        for i, key in enumerate(new.keys[:count]):
            self._where[key] = (table, first + i)

    def _from_disk(self, disk: Shards, keys: Sequence[bytes], unknown: list[int], device: torch.device) -> list[Found]:
        """Rows that do not fit into memory; those that do are there afterwards."""
        if any(keys[i] not in disk.where for i in unknown):
            disk.refresh()
        wanted: dict[str, list[int]] = {}
        for i in unknown:
            if (place := disk.where.get(keys[i])) is not None:
                wanted.setdefault(place[0], []).append(i)
        pieces = []
        for name, positions in wanted.items():
            fits = disk.size(name) <= self.free
            rows = disk.read(name, None if fits else [disk.where[keys[i]][1] for i in positions])
            if rows is None:
                continue
            tensors = [t.to(device) for t in rows.tensors]
            self._store(Rows(rows.keys, tensors, rows.note))
            left = [] if fits else [j for j, i in enumerate(positions) if keys[i] not in self._where]
            if left:
                pieces.append(Found([positions[j] for j in left], [t[left] for t in tensors], rows.note))
        return pieces


class _Table:
    """Rows of one kind, in blocks of one size; only the last block may be smaller, and grows by doubling."""

    def __init__(self, like: Rows) -> None:
        self.note, self.size = like.note, 0
        self.row_bytes = max(1, sum(t[0].numel() * t.element_size() for t in like.tensors))
        self._block = max(1, BLOCK // self.row_bytes)
        self._blocks: list[list[Tensor]] = []
        with torch.inference_mode(False):
            self._empty = [t.new_empty((0, *t.shape[1:])) for t in like.tensors]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Copies rows, all of them."""
        done = 0
        with torch.inference_mode(False), torch.no_grad():  # rows outlive the mode that they come in
            while done < len(tensors[0]):
                number, used = divmod(self.size, self._block)
                count = min(self._block - used, len(tensors[0]) - done)
                for own, new in zip(self._with_room(number, used, count), tensors, strict=True):
                    own[used : used + count].copy_(new[done : done + count])
                done, self.size = done + count, self.size + count

    def take(self, rows: Sequence[int]) -> list[Tensor]:
        """Copies of rows, ``[len(rows), ...]`` each."""
        index = torch.tensor(rows, device=self._empty[0].device)
        if len(self._blocks) == 1:
            return [own.index_select(0, index) for own in self._blocks[0]]
        numbers, offsets = index // self._block, index % self._block
        found = [own.new_empty((len(rows), *own.shape[1:])) for own in self._empty]
        for number in sorted(set(numbers.tolist())):
            at = (numbers == number).nonzero().squeeze(1)
            for out, own in zip(found, self._blocks[number], strict=True):
                out.index_copy_(0, at, own.index_select(0, offsets[at]))
        return found

    def _with_room(self, number: int, used: int, count: int) -> list[Tensor]:
        """A block that has room for ``count`` rows more."""
        if number == len(self._blocks):
            self._blocks.append(self._empty)
        block = self._blocks[number]
        if used + count > len(block[0]):
            room = min(max(used + count, 2 * used), self._block)
            grown = [own.new_empty((room, *own.shape[1:])) for own in block]
            for new, own in zip(grown, block, strict=True):
                new[:used].copy_(own[:used])
            self._blocks[number] = block = grown
        return block


def _kind(tensors: Sequence[Tensor], note: str) -> Kind:
    return (note, *((t.dtype, tuple(t.shape[1:])) for t in tensors))


def _chosen(rows: Rows, known: dict[bytes, tuple[str, int]] | dict[bytes, tuple[_Table, int]]) -> Rows:
    """The rows with keys that are not known, each once."""
    first: dict[bytes, int] = {}
    for i, key in enumerate(rows.keys):
        if key not in known:
            first.setdefault(key, i)
    if len(first) == len(rows.keys):
        return rows
    index = torch.tensor(list(first.values()), dtype=torch.long)
    return Rows(list(first), [t.index_select(0, index.to(t.device)) for t in rows.tensors], rows.note)
