"""Sparse files: exact round trips, sizes, and damage that is told instead of believed."""

import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shohin.errors import RunError
from shohin.pruning.sparse import Pattern, pack, read, stored_bytes, unpack, write

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def sparse(shape: tuple[int, ...], density: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=g) * 5
    values = values * (torch.rand(shape, generator=g) < density)
    return (values + 0.0).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """The same type, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_every_type_and_density(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        f"{shape}/{density}": sparse(shape, density, i, dtype)
        for i, (shape, density) in enumerate(
            (s, d) for s in ((), (0,), (3, 0), (1,), (7,), (33, 65), (4, 3, 5, 2)) for d in (0.0, 0.02, 0.1, 0.5, 1.0)
        )
    }
    write(tmp_path / "a.safetensors", tensors)
    back = read(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    assert all(same(back[n], t) for n, t in tensors.items())


def test_minus_zero_nan_and_infinity_come_back_bit_for_bit() -> None:
    odd = torch.zeros(100)
    odd[3], odd[50], odd[51], odd[99] = -0.0, math.nan, -math.inf, 1e-45
    payload = torch.zeros(100, dtype=torch.int32)
    payload[7] = 0x7FC00001  # a NaN that is not the usual one
    both = {"odd": odd, "payload": payload.view(torch.float32)}
    assert all(same(unpack(pack(both))[n], t) for n, t in both.items())
    assert len(pack(both)) > 2  # neither was simply kept dense


@pytest.mark.parametrize(
    ("density", "least", "most"), [(1.0, 1.0, 1.002), (0.5, 0.52, 0.54), (0.25, 0.27, 0.29), (0.05, 0.055, 0.07), (0.0, 0.0, 0.035)]
)
def test_sizes_are_as_documented(density: float, least: float, most: float, tmp_path: Path) -> None:
    tensor = sparse((500, 1000), density, 1)
    size = write(tmp_path / "a", {"w": tensor})
    assert size == (tmp_path / "a").stat().st_size == stored_bytes({"w": tensor})
    assert least <= size / (4 * tensor.numel()) <= most


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int8], ids=str)
def test_zeros_left_by_multiplication_are_zeros(dtype: torch.dtype, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tensor = torch.randn(100, 200, generator=g) * (torch.rand(100, 200, generator=g) < 0.4)
    assert bool((tensor == 0).logical_and(tensor.signbit()).any())
    tensor = (tensor * 3).to(dtype)
    size = write(tmp_path / "a", {"w": tensor})
    assert same(read(tmp_path / "a")["w"], tensor)
    b = tensor.element_size()
    assert size <= tensor.numel() * min(0.4 * b + 1 / 8 + 0.6 / 8 + 0.03, b) + 500


def test_two_of_four_in_half_precision(tmp_path: Path) -> None:
    tensor = torch.randn(128, 256).half()
    tensor = tensor * Pattern.parse("2:4").select(tensor.float()) + 0.0
    assert write(tmp_path / "a", {"w": tensor}) / (2 * tensor.numel()) < 0.575


def test_a_model_and_its_tied_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight *= Pattern.unstructured(0.7).select(model[0].weight.abs())
    size = write(tmp_path / "deep" / "a", model)
    state = read(tmp_path / "deep" / "a")
    other = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    other.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr()
    assert size < 0.5 * 4 * 64 * 64 + 4000


def test_views_strides_and_conjugates() -> None:
    base = sparse((8, 6, 4, 4), 0.3)
    views = {
        "transposed": base.transpose(0, 1), "part": base[1:3], "last": base.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 3).expand(5, 3), "conjugate": sparse((4, 4), 0.4, dtype=torch.complex64).mul(1 + 1j).conj(),
    }  # fmt: skip
    back = unpack(pack(views))
    assert all(torch.equal(back[n], t.resolve_conj()) for n, t in views.items())


@pytest.mark.parametrize(
    "fields",
    [
        {"bits/w": [255], "values/w": 8, "shape/w": [2, 8]},
        {"bits/w": [255], "values/w": 7, "shape/w": [8]},
        {"bits/w": [255], "values/w": 4, "shape/w": [4]},
        {"bits/w": [1], "values/w": 1, "shape/w": [-8]},
        {"bits/w": [1], "values/w": 1, "shape/w": [1 << 40]},
        {"bits/w": [1], "values/w": 1, "shape/w": [1 << 32, 1 << 32, 0]},
        {"bits/w": [1], "values/w": 1, "shape/w": [1 << 62, 1 << 62]},
        {"bits/w": [1], "values/w": 1, "shape/w": [1] * 65},
        {"gaps/w": [3, 200], "values/w": 1, "shape/w": [1 << 40]},
        {"gaps/w": [3, 200], "values/w": 1, "shape/w": [100]},
        {"gaps/w": [3, 3, 3], "values/w": 1, "shape/w": [11]},
        {"gaps/w": [], "values/w": 0, "shape/w": [1]},
        {"bits/w": [1], "values/w": 1},
        {"bits/w": [1], "values/w": 1, "shape/w": [8], "negative/w": [1, 1]},
        {"bits/w": [1], "values/w": 1, "shape/w": [8], "negative/w": [255]},
        {"dense/w": [1], "negative/w": [1]},
        {"bits/w": [1], "gaps/w": [1], "values/w": 1, "shape/w": [8]},
        {"what/w": [1]},
        {"w": [1]},
        {"same/w": [119]},
        {"same/w": [255, 254]},
    ],
    ids=str,
)
def test_lies_are_refused_before_anything_is_allocated(fields: dict[str, object], tmp_path: Path) -> None:
    kinds = {"shape": torch.int64}
    stored = {
        key: torch.ones(value) if isinstance(value, int) else torch.tensor(value, dtype=kinds.get(key.split("/")[0], torch.uint8))
        for key, value in fields.items()
    }
    with pytest.raises(RunError, match="damaged"):
        unpack(stored)
    save_file(stored, str(tmp_path / "a"), metadata={"format": "shohin sparse", "version": "1"})
    with pytest.raises(RunError, match="damaged"):
        read(tmp_path / "a")


def test_true_fields_of_the_same_kind_are_read() -> None:
    stored = {"gaps/w": torch.tensor([3, 200], dtype=torch.uint8), "values/w": torch.ones(1), "shape/w": torch.tensor([4, 51])}
    found = unpack(stored)["w"]
    assert found.shape == (4, 51) and found.nonzero().tolist() == [[0, 3]]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    tensors = {"w": sparse((40, 30), 0.4), "b": torch.randn(30)}
    write(path, tensors)
    whole = path.read_bytes()
    draw, refused = random.Random(0), 0
    for cut in (0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(RunError, match="damaged"):
            read(path)
    for _ in range(200):  # a changed byte is told, or changes values only
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            read(path)
        except RunError:
            refused += 1
    assert refused > 5


def test_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no file"):
        read(tmp_path / "none")
    save_file({"w": torch.ones(3)}, str(tmp_path / "plain"))
    with pytest.raises(RunError, match="no sparse file"):
        read(tmp_path / "plain")
    save_file({"dense/w": torch.ones(3)}, str(tmp_path / "later"), metadata={"format": "shohin sparse", "version": "9"})
    with pytest.raises(RunError, match="version '9'"):
        read(tmp_path / "later")


def test_what_is_no_plain_tensor_is_refused(tmp_path: Path) -> None:
    for value in (torch.ones(3).to_sparse(), torch.empty(3, device="meta"), "extra"):
        with pytest.raises(RunError, match="w is a"):
            pack({"w": value})  # type: ignore[dict-item]
    with pytest.raises(RunError, match="complex128"):
        write(tmp_path / "a", {"w": torch.ones(3, dtype=torch.complex128)})
    assert not (tmp_path / "a").exists()
