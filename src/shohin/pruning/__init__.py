"""Criteria, allocation, schedules and compensation; `masked` for training a sparse model in a loop of one's own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shohin.pruning.criteria import CRITERIA as CRITERIA
    from shohin.pruning.sparse import Pattern as Pattern
    from shohin.pruning.sparse import masked as masked
    from shohin.pruning.sparse import masks_of as masks_of

_HOMES = {"CRITERIA": "criteria", "Pattern": "sparse", "masked": "sparse", "masks_of": "sparse"}
_ROOMS = frozenset(("criteria", "schedules", "sparse"))
__all__ = ["CRITERIA", "Pattern", "masked", "masks_of"]


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used: importing the package alone costs nothing."""
    if name in _ROOMS:
        return importlib.import_module(f"shohin.pruning.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'shohin.pruning' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"shohin.pruning.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
