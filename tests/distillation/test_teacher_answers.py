"""Rows of answers in memory and on disk beside a plain dictionary: what is found is right, bounded, whole, and shared between processes."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shohin.distillation import answers, shards
from shohin.distillation.answers import Answers, Found
from shohin.distillation.shards import Rows, Shards

torch.set_num_threads(1)

CPU = torch.device("cpu")


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def rows(numbers: list[int], width: int = 3) -> list[Tensor]:
    """Two tensors, of which the second has another type and shape."""
    base = torch.tensor(numbers, dtype=torch.float32)
    return [base[:, None] * 10 + torch.arange(width), (base[:, None, None] + torch.arange(4.0).reshape(2, 2)).bfloat16()]


def put(store: Answers, numbers: list[int], width: int = 3, note: str = "n") -> None:
    store.keep([key(i) for i in numbers], rows(numbers, width), note)


def check(store: Answers, numbers: list[int], expected: set[int], width: int = 3) -> None:
    found = store.find([key(i) for i in numbers], CPU)
    assert {numbers[i] for i in found.positions} == expected & set(numbers)
    assert sorted(found.positions) == [i for i, n in enumerate(numbers) if n in expected]
    check_rows(found, numbers, width)


def check_rows(found: Found, numbers: list[int], width: int = 3) -> None:
    if found.positions:
        assert found.note == "n"
        kept = [numbers[i] for i in sorted(found.positions)]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found.ordered(), rows(kept, width), strict=True))


@pytest.mark.parametrize("block", [1, 50, 16 << 20])
@pytest.mark.parametrize("memory", [0, 205, 1 << 20])
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("small", [0, 1 << 18])
def test_as_a_dictionary_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, memory: int, disk: bool, small: int) -> None:
    monkeypatch.setattr(answers, "BLOCK", block)
    monkeypatch.setattr(shards, "SMALL", small)
    monkeypatch.setattr(shards, "OPEN", 2)
    rng = random.Random(block + memory)
    store, known = Answers(memory, Shards(tmp_path, "own", 1 << 20) if disk else None), dict[int, None]()
    fit = memory // (3 * 4 + 4 * 2)
    for _ in range(40):
        numbers = [rng.randrange(60) for _ in range(rng.randint(1, 12))]
        remembered = set(known) if disk else set(list(known)[:fit])
        check(store, numbers, remembered)
        put(store, numbers)
        known.update(dict.fromkeys(numbers))
    assert len(known) > 50 and store.free >= 0
    if disk:
        other = Answers(memory, Shards(tmp_path, "own", 1 << 20))
        for _ in range(20):
            check(other, rng.sample(range(70), 9), set(known))
        assert not list(tmp_path.glob("*/*.tmp"))


def test_rows_of_other_kinds_do_not_mix(tmp_path: Path) -> None:
    store = Answers(1 << 20, Shards(tmp_path, "own", 1 << 20))
    put(store, [1, 2])
    put(store, [3, 4], width=5)
    put(store, [5, 6], note="another")
    for again in (store, Answers(1 << 20, Shards(tmp_path, "own", 1 << 20)), Answers(0, Shards(tmp_path, "own", 1 << 20))):
        check(again, [2, 1, 9], {1, 2})
        check(again, [4, 3], {3, 4}, width=5)
        for mixed in ([1, 3], [1, 5], [2, 4, 6]):
            assert again.find([key(i) for i in mixed], CPU).positions == []


def test_what_is_found_is_a_copy() -> None:
    store = Answers(1 << 20)
    put(store, [1, 2])
    for numbers in ([1, 2], [2], [1, 2]):
        check(store, numbers, {1, 2})
        store.find([key(i) for i in numbers], CPU).tensors[0].zero_()


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("small", [0, 1 << 18])
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_row_that_was_damaged_is_found_out_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int, memory: int
) -> None:
    monkeypatch.setattr(shards, "SMALL", small)
    put(Answers(0, Shards(tmp_path, "own", 1 << 20)), [1, 2, 3])
    (path,) = shard_paths(tmp_path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    harmed = 0
    for at in [*range(start, len(whole), 7), 3, start - 20, start // 2]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            store = Answers(memory, Shards(tmp_path, "own", 1 << 20))
            found = store.find([key(2), key(1), key(3)], CPU)
        if found.positions:  # padding, or a byte of the header that says nothing
            check(store, [2, 1, 3], {1, 2, 3})
        else:
            harmed += 1
            assert "damaged and computed anew" in str(said[0].message) and not path.exists()
    assert harmed >= (len(whole) - start) // 7
    path.write_bytes(whole)
    check(Answers(memory, Shards(tmp_path, "own", 1 << 20)), [2, 1, 3], {1, 2, 3})


def test_files_of_another_owner_or_name_are_refused(tmp_path: Path) -> None:
    put(Answers(0, Shards(tmp_path, "other", 1 << 20)), [1, 2])
    (foreign,) = shard_paths(tmp_path)
    own = tmp_path / "teacher-own"
    own.mkdir()
    for name in (foreign.name, "renamed.safetensors"):
        (own / name).write_bytes(foreign.read_bytes())
        with pytest.warns(UserWarning, match="keys do not fit its name"):
            check(Answers(1 << 20, Shards(tmp_path, "own", 1 << 20)), [1, 2], set())
    assert shard_paths(tmp_path) == [foreign]


def test_two_see_what_the_other_writes_and_both_are_bounded(tmp_path: Path) -> None:
    a, b = (Answers(1 << 20, Shards(tmp_path, "own", 1 << 20)) for _ in range(2))
    put(a, [1, 2])
    check(b, [1, 2, 3], {1, 2})
    put(b, [3, 4])
    check(a, [4, 2, 1], {1, 2, 4})
    put(a, [1, 2, 3, 4])  # nothing new
    assert len(shard_paths(tmp_path)) == 2
    assert a.disk is not None and b.disk is not None
    assert a.disk.free == b.disk.free == (1 << 20) - sum(path.stat().st_size for path in shard_paths(tmp_path))
    assert Shards(tmp_path, "third", 1 << 20).free == a.disk.free


def test_the_same_rows_written_by_two_are_one_file(tmp_path: Path) -> None:
    a, b = (Shards(tmp_path, "own", 1 << 20) for _ in range(2))
    for shard in (a, b):
        shard.write(Rows([key(1)], rows([1]), "n"))
    assert len(shard_paths(tmp_path)) == 1
    check(Answers(0, Shards(tmp_path, "own", 1 << 20)), [1, 2], {1})


WRITER = """
import sys, random, warnings, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_teacher_answers as t
warnings.simplefilter("error")
rng = random.Random(int(sys.argv[3]))
store = t.Answers(1 << 20, t.Shards(Path(sys.argv[2]), "own", 1 << 30))
seen = set()
for _ in range(150):
    numbers = [rng.randrange(300) for _ in range(8)]
    found = store.find([t.key(i) for i in numbers], t.CPU)
    t.check_rows(found, numbers)
    missing = [n for i, n in enumerate(numbers) if i not in found.positions]
    if missing:
        t.put(store, missing)
    seen.update(numbers)
print(len(seen))
"""


def test_two_processes_write_one_folder_at_the_same_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(tmp_path)]
    running = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for seed in range(2)]
    told = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    seen = set[int]()
    for seed in range(2):
        rng = random.Random(seed)
        seen.update(rng.randrange(300) for _ in range(150 * 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Answers(1 << 20, Shards(tmp_path, "own", 1 << 30)), list(range(300)), seen)
    assert not list(tmp_path.glob("*/*.tmp"))
