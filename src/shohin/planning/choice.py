"""A point of the planning space: how many units each group keeps, which regions are skipped, what runs in int8."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from shohin.errors import PlanError


@dataclass(frozen=True)
class Choice:
    """One choice at every site, by counts; which units stay is decided by saliency (`shohin.planning.loss.kept_units`).

    Args:
        kept: unit group -> number of units that stay.
        skipped: names of the regions that are skipped.
        int8: addresses of the operations that run in int8; all others run in float32.
    """

    kept: Mapping[str, int]
    skipped: frozenset[str] = field(default_factory=frozenset)
    int8: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        kept = {name: int(count) for name, count in sorted(self.kept.items())}
        for name, count in kept.items():
            if count < 1:
                raise PlanError(f"group {name!r}: a choice must keep at least one unit, got {count}")
        object.__setattr__(self, "kept", MappingProxyType(kept))
        object.__setattr__(self, "skipped", frozenset(self.skipped))
        object.__setattr__(self, "int8", frozenset(self.int8))

    def __hash__(self) -> int:
        return hash((tuple(self.kept.items()), self.skipped, self.int8))

    @property
    def digest(self) -> str:
        """A short hash, the same on every machine; a key for caches."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {"kept": dict(self.kept), "skipped": sorted(self.skipped), "int8": sorted(self.int8)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Choice:
        """The inverse of `to_json`. Raises PlanError on missing fields."""
        try:
            return Choice(dict(data["kept"]), frozenset(data["skipped"]), frozenset(data["int8"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the choice's JSON is damaged: {error!r}") from None
