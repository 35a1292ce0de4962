"""Callbacks for ``train(..., callbacks=[...])`` that write each epoch down: a text file, TensorBoard, MLflow."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from shohin.errors import RunError
from shohin.training.config import EpochRecord

Callback = Callable[[EpochRecord], None]


def jsonl(path: str | Path) -> Callback:
    """One JSON object a line and epoch (`EpochRecord.to_json`).

    A record replaces what the file holds of its own and of later epochs, and a line cut short by a kill: a resumed training
    leaves each epoch once, a training begun anew on the same path begins the file anew.

    Args:
        path: of the file; its folder is made.
    """
    target = Path(path)

    def write(record: EpochRecord) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = target.read_text(encoding="utf-8").splitlines() if target.exists() else []
        kept = [line for line in lines if _epoch(line) < record.epoch]
        text = "".join(f"{line}\n" for line in [*kept, json.dumps(record.to_json())])
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)

    return _named(write, f"jsonl({str(path)!r})")


def tensorboard(folder: str | Path) -> Callback:
    """Loss, terms, quality, learning rate and seconds as TensorBoard scalars, one point an epoch.

    Args:
        folder: of the event files. A resumed training purges the points from its first epoch on.

    Raises:
        RunError: if the package is not installed.
    """
    library = _library("torch.utils.tensorboard", "tensorboard")
    writer: list[Any] = []

    def write(record: EpochRecord) -> None:
        if not writer:
            writer.append(library.SummaryWriter(str(folder), purge_step=record.epoch))
        for name, value in scalars(record).items():
            writer[0].add_scalar(name, value, record.epoch)
        writer[0].flush()

    return _named(write, f"tensorboard({str(folder)!r})")


def mlflow(**run: Any) -> Callback:
    """Loss, terms, quality, learning rate and seconds as metrics of the active MLflow run.

    Args:
        run: keywords of ``mlflow.start_run``, which is called at the first epoch if no run is active.

    Raises:
        RunError: if the package is not installed.
    """
    library = _library("mlflow", "mlflow")

    def write(record: EpochRecord) -> None:
        if library.active_run() is None:
            library.start_run(**run)
        library.log_metrics(scalars(record), step=record.epoch)

    return _named(write, "mlflow")


def scalars(record: EpochRecord) -> dict[str, float]:
    """The numbers of an epoch by name; what is None is left out."""
    named = {"loss": record.loss, "quality": record.quality, "lr": record.lr, "seconds": record.seconds}
    return {**{k: v for k, v in named.items() if v is not None}, **{f"terms/{k}": v for k, v in record.terms.items()}}


def _library(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(f"logging to {package} needs a package that cannot be imported ({error}); pip install {package}") from None


def _named(callback: Callback, name: str) -> Callback:
    callback.__qualname__ = name
    return callback


def _epoch(line: str) -> float:
    """The epoch of a line; infinity if the line is not whole."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
