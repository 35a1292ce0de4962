"""Batches that `quantizing.tasks.packed` put into an npz, for environments without Shohin. It imports nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def batches(path: str | Path) -> list[dict[str, NDArray[Any]]]:
    """The batches of an npz ("0:name"), in order."""
    held, found = np.load(path), dict[int, dict[str, NDArray[Any]]]()
    for name in held.files:
        number, _, own = name.partition(":")
        found.setdefault(int(number), {})[own] = held[name]
    return [found[i] for i in sorted(found)]
