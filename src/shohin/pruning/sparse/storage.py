"""Sparse models on disk: safetensors files in which zeros take one bit or less.

Of n elements of b bytes with a share d that is not zero, a tensor takes ``n * (1/8 + b * d)`` bytes (half of float32: 0.531 of
dense), or ``n * d * (b + 1)`` where that is less (5 % of float32: 0.063 of dense), and never more than dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from shohin.errors import RunError
from shohin.pruning.sparse.packing import Key, packed, unpacked
from shohin.run import write_atomic

_FORMAT, _VERSION = "shohin sparse", "1"


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name as dense tensors by ``field/name``, each in its smallest form (see `packing.packed`).

    A tensor that is the same memory as an earlier one is stored as ``same/name``: the other's name.

    Raises:
        RunError: if a value is no plain tensor (a quantized, sparse or meta one, or extra state).
    """
    out: dict[str, Tensor] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = f"{tensor.layout} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise RunError(f"{name} is a {kind} and cannot be stored as a sparse file; leave it out")
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and seen.setdefault(key, name) != name:
            out[str(Key("same", name))] = torch.tensor(list(seen[key].encode()), dtype=torch.uint8)
            continue
        out |= {str(Key(field, name)): t for field, t in packed(tensor).items()}
    return out


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack`, bit for bit, on the CPU; shared tensors are shared again. Names come sorted.

    Raises:
        RunError: if fields are missing, unknown or contradict each other.
    """
    fields: dict[str, dict[str, Tensor]] = {}
    for text, tensor in stored.items():
        key = Key.parse(text)
        fields.setdefault(key.name, {})[key.field] = tensor
    shared = {name: f["same"] for name, f in fields.items() if set(f) == {"same"}}
    out = {name: unpacked(f, name) for name, f in fields.items() if name not in shared}
    own = dict(out)
    for name, code in shared.items():
        try:
            other = bytes(code.tolist()).decode() if code.dtype == torch.uint8 and code.dim() == 1 else ""
        except UnicodeDecodeError:
            other = ""
        if other not in own:
            raise RunError(f"the sparse file is damaged: {name} is said to be another tensor, {other!r}, which is not there")
        out[name] = own[other]
    return dict(sorted(out.items()))


def write(path: str | Path, model: nn.Module | Mapping[str, Tensor]) -> int:
    """Writes a model's state dict, or tensors by name, and returns the size of the file in bytes.

    The file is replaced as a whole: a kill leaves the old one or the new one.

    Raises:
        RunError: if something in it is no plain tensor, or of a type that safetensors does not know.
    """
    data = _serialized(model)
    write_atomic(Path(path), data)
    return len(data)


def stored_bytes(model: nn.Module | Mapping[str, Tensor]) -> int:
    """The size in bytes of the file that `write` would write. Raises RunError as it does."""
    return len(_serialized(model))


def _serialized(model: nn.Module | Mapping[str, Tensor]) -> bytes:
    tensors: Mapping[str, Tensor] = model.state_dict() if isinstance(model, nn.Module) else model
    try:
        return save({n: t.clone() for n, t in pack(tensors).items()}, {"format": _FORMAT, "version": _VERSION})
    except (KeyError, ValueError) as error:
        kinds = sorted({str(t.dtype) for t in tensors.values()})
        raise RunError(f"the tensors cannot be stored as safetensors ({error!r}); their types are {', '.join(kinds)}") from None


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that `write` wrote, on the CPU: for ``model.load_state_dict``.

    Raises:
        RunError: if there is no such file, it is damaged, or it is of another kind or version. Nothing larger than 64 times the file
            is allocated, whatever it says.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as f:
            head = f.metadata() or {}
            stored = {key: f.get_tensor(key) for key in f.keys()} if head.get("format") == _FORMAT else {}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own types, which differ between versions
        raise RunError(f"the sparse file {path} is damaged ({error}); write it again") from None
    if head.get("format") != _FORMAT:
        raise RunError(f"{path} is no sparse file of shohin: read it with safetensors")
    if head.get("version") != _VERSION:
        raise RunError(f"{path} has version {head.get('version')!r} of the sparse format; this shohin reads {_VERSION}")
    return unpack(stored)
