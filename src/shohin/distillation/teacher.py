"""The teacher: run in eval mode without gradients, its answers remembered for batches that come again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shohin.data import Call, first_output
from shohin.distillation.features import Features, recorded
from shohin.errors import DataError
from shohin.training.state import training_modes

Answer = tuple[Tensor, Features]

#: relative error (of norms) up to which a faster form speaks for the model
AGREES = 1e-3


class Teacher:
    """Logits and features of a model for whole batches.

    Answers are remembered by the content of the batch, not by its position, so a shuffled or augmented loader only misses.
    A batch is one key: the same samples in another batch are computed anew, since their last bits may differ.
    The model must stay as it is while its answers are remembered.

    Args:
        model: put into eval mode for each call, and back.
        names: modules whose outputs are features.
        cache_bytes: memory for remembered answers; 0 remembers nothing there.
        folder: where answers are kept for other runs and processes too, in a folder of their own for each teacher (the weights, the
            settings of its modules and ``names`` make its name). A file that is damaged is computed anew, with a warning.
        lowered: a faster form, called as the model is, that answers where no features are asked: a runner of another runtime, a compiled
            module; it gives tensors or arrays. Compared with the model on the first batch, and refused with a warning if its logits
            differ by more than `AGREES`. A batch that it cannot run is run by the model.
        disk_bytes: of all files in ``folder``; nothing is written beyond.

    ``hits`` counts remembered answers (``reads`` of them from the disk), ``misses`` computed ones.

    Raises:
        DataError: if ``folder`` cannot be made.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str] = (),
        cache_bytes: int = 256 << 20,
        folder: Path | None = None,
        lowered: Callable[..., Any] | None = None,
        *,
        disk_bytes: int = 20 << 30,
    ) -> None:
        self.model, self.names, self.free = model, tuple(names), cache_bytes
        self.lowered = None if self.names else lowered
        self.hits = self.misses = self.reads = 0
        self._known: dict[bytes, Answer] = {}
        self._trusted = self._plain = False
        self._folder, self._disk_bytes = None if folder is None else Path(folder), disk_bytes
        self._disk: _Disk | None = None
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"the folder {self._folder} for the teacher's answers cannot be made: {error}") from None

    def __call__(self, call: Call) -> Answer:
        """Logits (the first tensor of the outputs) and ``{module name: [feature for each call]}`` of a batch; no gradients lead to them."""
        key = _digest((call.args, call.kwargs, _precision())) if self._remembers() else b""
        if key in self._known:
            self.hits += 1
            return self._known[key]
        disk = self._open() if key else None
        answer = disk.read(key, self.names) if disk else None
        if answer is not None:
            self.hits += 1
            self.reads += 1
            answer = _moved(answer, _device(call))
        else:
            self.misses += 1
            answer = self._compute(call)
            if disk:
                disk.write(key, answer, self.names)
        if key:
            self._remember(key, answer)
        return answer

    def _compute(self, call: Call) -> Answer:
        if self.lowered is None:
            return self._run(call)
        try:
            # A runner may give the same buffer each time, or numbers of another type.
            quick = _first(self.lowered(*call.args, **call.kwargs)).detach().clone().to(_device(call))
        except Exception as error:
            warnings.warn(f"the teacher's faster form cannot run a batch, the model does: {type(error).__name__}: {error}", stacklevel=4)
            if not self._trusted:
                self.lowered = None
            return self._run(call)
        if not self._trusted:
            logits, features = self._run(call)
            quick = quick.to(logits.dtype)
            if (wrong := _difference(quick, logits)) is not None:
                warnings.warn(f"the teacher's faster form {wrong}: the model is used instead", stacklevel=4)
                self.lowered = None
                return logits, features
            self._trusted, self._dtype = True, logits.dtype
        return quick.to(self._dtype), {}

    def _run(self, call: Call) -> Answer:
        """The model's answer, as tensors that a graph of the student may hold."""
        try:
            with training_modes(self.model):
                self.model.eval()
                try:
                    logits, features = self._forward(call)
                except RuntimeError as error:
                    if self._plain or "nference" not in str(error):
                        raise
                    self._plain = True  # operators that inference mode does not allow
                    logits, features = self._forward(call)
        finally:
            if not self._plain:
                _leave_inference(self.model)
        return _normal(logits), {name: [_normal(t) for t in tensors] for name, tensors in features.items()}

    def _forward(self, call: Call) -> Answer:
        with torch.no_grad() if self._plain else torch.inference_mode(), recorded(self.model, self.names) as features:
            return first_output(self.model(*call.args, **call.kwargs)), features

    def _remembers(self) -> bool:
        return bool(self._known) or self.free > 0 or self._folder is not None

    def _remember(self, key: bytes, answer: Answer) -> None:
        tensors = [answer[0], *(t for calls in answer[1].values() for t in calls)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size <= self.free:
            self._known[key] = answer
            self.free -= size

    def _open(self) -> _Disk | None:
        """The folder of this teacher, opened by the first call: until then its weights may be loaded."""
        if self._disk is None and self._folder is not None:
            own = fingerprint(self.model, self.names, self.lowered is not None)
            if own is None:
                warnings.warn("the teacher's answers are not kept on disk: it holds state that is no tensor or plain value", stacklevel=3)
                self._folder = None
            else:
                self._disk = _Disk(self._folder, own, self._disk_bytes)
        return self._disk


class _Disk:
    """Answers of one teacher, a safetensors file for each batch."""

    def __init__(self, root: Path, fingerprint: str, bytes_: int) -> None:
        self.folder, self.writes = root / f"teacher-{fingerprint}", True
        self.free = bytes_ - sum(_size(path) for path in root.glob("teacher-*/*.safetensors"))
        for leftover in root.glob("teacher-*/*.tmp"):  # of killed writers; others may be writing now
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 3600:
                    leftover.unlink()

    def read(self, key: bytes, names: Sequence[str]) -> Answer | None:
        from safetensors import safe_open

        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as f:
                found = {name: f.get_tensor(name) for name in sorted(f.keys())}
                head = f.metadata() or {}
            if head.get("digest") != _digest((key.hex(), found)).hex():
                raise ValueError("its contents do not fit their digest")
            counts = json.loads(head["counts"])
            return found["logits"], {name: [found[f"{i}.{j}"] for j in range(counts[i])] for i, name in enumerate(names)}
        except Exception as error:  # safetensors raises its own types, which differ between versions
            warnings.warn(f"the teacher's answer {path} is damaged and computed anew: {error}", stacklevel=4)
            self.free += _size(path)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None

    def write(self, key: bytes, answer: Answer, names: Sequence[str]) -> None:
        """Under another name first, so that a reader finds all of it or nothing. What cannot be written only warns."""
        from safetensors.torch import save

        if not self.writes:
            return
        path, temporary = self._path(key), ""
        try:
            tensors = {"logits": answer[0]} | {f"{i}.{j}": t for i, name in enumerate(names) for j, t in enumerate(answer[1][name])}
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
            counts = json.dumps([len(answer[1][name]) for name in names])
            data = save(tensors, {"counts": counts, "digest": _digest((key.hex(), dict(sorted(tensors.items())))).hex()})
            if len(data) > self.free:
                raise OSError(f"disk_bytes is reached with {len(data)} bytes more; raise it or delete folders of other teachers")
            self.folder.mkdir(parents=True, exist_ok=True)
            number, temporary = tempfile.mkstemp(suffix=".tmp", dir=self.folder)
            with open(number, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
            self.free -= len(data)
        except Exception as error:
            warnings.warn(f"the teacher's answers are no longer written to {self.folder}: {error}", stacklevel=4)
            self.writes = False
            if temporary:
                Path(temporary).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.safetensors"


def fingerprint(model: nn.Module, names: Sequence[str] = (), lowered: bool = False) -> str | None:
    """A digest of a model's weights, buffers and plain settings, and of the tapped names; None if it holds other state."""
    settings = []
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k != "training" and not k.startswith("_")}
        own = {k: getattr(v, "__qualname__", v) for k, v in sorted(own.items())}  # functions by name
        plain = {k: v for k, v in own.items() if _digest(v)}
        settings.append([name, f"{type(module).__module__}.{type(module).__qualname__}", plain])
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    seen = {name for name, _ in tensors}
    others = [[name, value] for name, value in model.state_dict().items() if name not in seen]
    return _digest((settings, tensors, others, tuple(names), lowered)).hex() or None


def _difference(quick: Tensor, logits: Tensor) -> str | None:
    """How a faster form's logits differ from the model's, or None."""
    if quick.shape != logits.shape:
        return f"gives shape {tuple(quick.shape)}, not {tuple(logits.shape)}"
    error = float((quick.double() - logits.double()).norm() / logits.double().norm().clamp(min=1e-12))
    return None if error <= AGREES else f"differs from it by {error:.2g} (relative), allowed is {AGREES:g}"


def _first(outputs: Any) -> Tensor:
    """`first_output` of tensors or arrays."""
    if isinstance(outputs, np.ndarray):
        return torch.from_numpy(outputs)
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return _first(outputs[0]) if isinstance(outputs, (tuple, list)) and outputs else first_output(outputs)


def _normal(tensor: Tensor) -> Tensor:
    """A copy that is no inference tensor; without inference mode the tensor itself, which nobody else writes to."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _leave_inference(model: nn.Module) -> None:
    """Tensors that a forward in inference mode left in a module (tables by length, masks) become normal: it may be trained later."""
    for module in model.modules():
        for holder in (module._buffers, vars(module)):
            for name, value in holder.items():
                if isinstance(value, Tensor) and value.is_inference():
                    holder[name] = value.clone()


def _precision() -> tuple[str, ...]:
    """The types of autocast here: the same batch has another answer in another precision."""
    return tuple(f"{kind} {torch.get_autocast_dtype(kind)}" for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))


def _device(call: Call) -> torch.device:
    return next((v.device for v in _leaves((call.args, call.kwargs))), torch.device("cpu"))


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)


def _moved(answer: Answer, device: torch.device) -> Answer:
    return answer[0].to(device), {name: [t.to(device) for t in tensors] for name, tensors in answer[1].items()}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # another process took it away
        return 0


def _digest(value: Any) -> bytes:
    """A digest of nested tensors and plain values; empty (never remembered) if something else is found."""
    digest = hashlib.blake2b(digest_size=16)
    return digest.digest() if _feed(digest, value) else b""


def _feed(digest: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            return False
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return True
    if isinstance(value, dict):
        digest.update(b"{")
        return all(_feed(digest, k) and _feed(digest, v) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        digest.update(f"[{len(value)}".encode())
        return all(_feed(digest, v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
        return True
    return False
