"""Checkpoints: one safetensors file, replaced in one step, so that a kill at any moment leaves the old one or the new one.

Tensors are named ``model/...``, ``best/...``, ``ema/...`` and ``optimizer/...``; all scalars (also the
optimizer's) are JSON in the file's metadata.
Random states are not stored: every epoch seeds them from (seed, epoch). Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shohin.errors import RunError
from shohin.training.config import EpochRecord, TrainConfig

VERSION = 1


@dataclass
class Position:
    """Where a training stands, between two epochs.

    Args:
        epoch: the next one to run.
        step: optimizer steps done.
        batches: optimizer steps in an epoch, or None before it is known.
        best_epoch, best_quality, best_loss: of the state to be returned; the loss is None for the start.
        stale: epochs since the best one.
        stopped: why the training ended ("finished", "patience"), or None.
        history: one record for each epoch.
    """

    epoch: int = 0
    step: int = 0
    batches: int | None = None
    best_epoch: int = -1
    best_quality: float | None = None
    best_loss: float | None = None
    stale: int = 0
    stopped: str | None = None
    history: list[EpochRecord] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; floats are exact."""
        return {**self.__dict__, "history": [record.to_json() for record in self.history]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Position:
        """The inverse of `to_json`."""
        return Position(**{**data, "history": [EpochRecord(**record) for record in data["history"]]})


def signature(
    config: TrainConfig, start: Mapping[str, Tensor], lower_is_better: bool, method: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a resumed training must share with the one that wrote the checkpoint.

    Args:
        config: all of it.
        start: the starting weights.
        lower_is_better: direction of quality.
        method: what is not the default and not in the config: the user's optimizer, the number of processes.

    The starting weights count by their norms, to be compared with a tolerance: they may have been computed anew.
    """
    floating = {name: t for name, t in start.items() if t.is_floating_point()}
    return {
        "config": config.to_json(),
        "method": dict(method or {}),
        "lower_is_better": lower_is_better,
        "shapes": {name: [str(t.dtype), *t.shape] for name, t in start.items()},
        "norms": {name: float(t.double().norm()) for name, t in floating.items()},
    }


def save_checkpoint(
    path: Path,
    position: Position,
    parts: Mapping[str, Mapping[str, Tensor]],
    sign: Mapping[str, Any],
    plain: Mapping[str, Any] | None = None,
) -> None:
    """Replaces the checkpoint.

    Args:
        path: of the file.
        position: scalars.
        parts: "model", "best", "ema", "optimizer" -> tensors by name.
        sign: see `signature`.
        plain: JSON-able state of the optimizer and the loss scaler.
    """
    tensors = {f"{part}/{name}": t.detach().cpu().contiguous().clone() for part, named in parts.items() for name, t in named.items()}
    text = json.dumps({"version": VERSION, "position": position.to_json(), "signature": sign, "plain": dict(plain or {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, str(temporary), metadata={"training": text})
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, sign: Mapping[str, Any]) -> tuple[Position, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The position, the tensors by part and the plain state, or None if there is no checkpoint. Leftovers of killed writers are removed.

    Raises:
        RunError: if the file is damaged, or was written by a training with another model, start or configuration.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    if not path.exists():
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt") as f:
            head = json.loads(f.metadata()["training"])
            for key in f.keys():  # noqa: SIM118 (not a dict)
                part, name = key.split("/", 1)
                parts.setdefault(part, {})[name] = f.get_tensor(key)
        version, there, position = head["version"], head["signature"], Position.from_json(head["position"])
    except Exception as error:  # safetensors raises its own types, which differ between versions
        raise RunError(f"the checkpoint {path} is damaged ({error}); delete it to train from the start") from None
    if version != VERSION:
        raise RunError(f"the checkpoint {path} has version {version}, this is version {VERSION}; delete it to train from the start")
    _compare(path, there, json.loads(json.dumps(sign)))
    return position, parts, head.get("plain", {})


def _compare(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for kind in ("config", "method", "shapes"):
        usual = TrainConfig().to_json() if kind == "config" else {}  # of settings that are younger than the file
        old, new = {**usual, **there.get(kind, {})}, {**usual, **asked.get(kind, {})}
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                what = f"tensor {key}" if kind == "shapes" else key
                raise RunError(
                    f"the checkpoint {path} belongs to another training: {what} is {old.get(key)!r} there, "
                    f"{new.get(key)!r} here; delete it or choose another path"
                )
    if asked["lower_is_better"] != there["lower_is_better"]:
        raise RunError(f"the checkpoint {path} belongs to a training with the other direction of quality; delete it or choose another path")
    for name, norm in asked["norms"].items():
        if not abs(norm - there["norms"][name]) <= 1e-4 * abs(norm) + 1e-8:
            raise RunError(
                f"the checkpoint {path} began from other weights: the norm of {name} was {there['norms'][name]:.6g}, is {norm:.6g}; "
                "delete it or choose another path"
            )
