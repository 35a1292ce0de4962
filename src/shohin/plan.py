"""A plan: every choice that makes a small model out of a large one, as one frozen JSON value.

Choices are keyed by address, so that a plan survives cutting, recapture and torch versions:
widths (unit group -> kept units), skips (regions), formats (operation -> format name), sparsity (weight -> pattern of zeros).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from types import MappingProxyType
from typing import Any

from shohin.errors import PlanError, closest

#: a plan without sparsity is written as version 1, which earlier releases read
VERSIONS = (1, 2)


@dataclass(frozen=True)
class Plan:
    """All choices for one model.

    Args:
        fingerprint: of the program that the plan was made for; another model is refused.
        widths: unit group name -> ascending indices of the units that stay. A group that is absent keeps all units.
        skips: names of the regions that are skipped (their input goes to their consumers).
        formats: operation address -> format name ("int8"); an operation that is absent stays float32.
        sparsity: weight name -> pattern of its zeros ("2:4"; see `shohin.pruning.sparse.Pattern`). Which elements are zero is seen
            on the candidate's weights: a plan names the pattern.
    """

    fingerprint: str
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    skips: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    sparsity: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = {}
        for name, kept in sorted(self.widths.items()):
            listed = list(kept) if isinstance(kept, Iterable) and not isinstance(kept, (str, bytes)) else [None]
            if not all(map(_is_index, listed)):
                raise PlanError(
                    f"group {name!r}: kept units are indices, such as (0, 2, 5), not {kept!r} (of a mask, give the places of True)"
                )
            units = tuple(int(i) for i in listed)
            if not units or list(units) != sorted(set(units)) or units[0] < 0:
                raise PlanError(f"group {name!r}: kept units must be ascending, distinct, not negative and at least one; got {units[:8]}")
            widths[name] = units
        if isinstance(self.skips, str):
            raise PlanError(f"skips is a sequence of region names; for one region write ({self.skips!r},)")
        object.__setattr__(self, "widths", MappingProxyType(widths))
        object.__setattr__(self, "skips", tuple(sorted(set(self.skips))))
        for name in ("formats", "sparsity"):
            object.__setattr__(self, name, MappingProxyType(dict(sorted(getattr(self, name).items()))))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    @property
    def digest(self) -> str:
        """A short hash of the whole plan, the same on every machine."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_identity(self) -> bool:
        """True if the plan changes nothing."""
        return not (self.widths or self.skips or self.formats or self.sparsity)

    def then(self, later: Plan) -> Plan:
        """This plan followed by ``later``, whose widths index the units that this plan left.

        Of two groups that choose among the same rows (heads, and their dims), one that is down to one unit is no choice any more:
        the groups after it move up in the cut model ("a.weight#2" becomes "a.weight"), and ``later`` names them so.

        Raises:
            PlanError: if ``later`` keeps a unit that this plan did not leave.
        """
        widths = dict(self.widths)
        moved = {n.partition("#")[0] for n in later.widths if len(self.widths.get(n, ())) == 1}
        for later_name, kept in later.widths.items():
            name = self._named_before(later_name) if later_name.partition("#")[0] in moved else later_name
            if name not in widths:
                widths[name] = kept
                continue
            left = widths[name]
            if kept[-1] >= len(left):
                raise PlanError(f"group {name!r}: the later plan keeps unit {kept[-1]}, but the earlier plan left only {len(left)}")
            widths[name] = tuple(left[i] for i in kept)
        return self._with(widths, later)

    def _with(self, widths: Mapping[str, tuple[int, ...]], other: Plan) -> Plan:
        """These widths, and what either plan chooses elsewhere."""
        return Plan(
            self.fingerprint, widths, (*self.skips, *other.skips), {**self.formats, **other.formats}, {**self.sparsity, **other.sparsity}
        )

    def _named_before(self, name: str) -> str:
        """The name in this plan's model of a group that has moved up in the model that it leaves."""
        tensor, _, number = name.partition("#")
        names = (tensor if i == 1 else f"{tensor}#{i}" for i in count(1))
        left = (n for n in names if len(self.widths.get(n, ())) != 1)
        return next(islice(left, int(number or 1) - 1, None))

    def merge(self, other: Plan) -> Plan:
        """Both plans at once; they must be for the same model and choose at different sites.

        Raises:
            PlanError: if the fingerprints differ or a site is chosen twice, differently.
        """
        if self.fingerprint != other.fingerprint:
            raise PlanError("plans for different models cannot be merged; use then() for a plan of the cut model")
        for kind in ("widths", "formats", "sparsity"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            clash = sorted(k for k in mine.keys() & theirs.keys() if mine[k] != theirs[k])
            if clash:
                raise PlanError(f"both plans choose {kind} at {clash[0]!r}, differently")
        return self._with({**self.widths, **other.widths}, other)

    def check(self, fingerprint: str, groups: Mapping[str, int], regions: Iterable[str]) -> None:
        """Raises PlanError if the plan is for another model or names groups, units or regions that do not exist."""
        if self.fingerprint != fingerprint:
            raise PlanError(
                f"the plan was made for another model (plan {self.fingerprint[:12]}, model {fingerprint[:12]}): "
                "structure, parameter names or shapes differ"
            )
        for name, kept in self.widths.items():
            if name not in groups:
                near = closest(name, groups) or f"; groups: {', '.join(list(groups)[:8])}"
                raise PlanError(f"the plan names a unit group {name!r} that the model does not have{near}")
            if kept[-1] >= groups[name]:
                raise PlanError(f"the plan keeps unit {kept[-1]} of group {name!r}, which has {groups[name]} units")
        known = list(regions)
        for name in sorted(set(self.skips) - set(known)):
            raise PlanError(f"the plan skips a region {name!r} that the model does not have{closest(name, known)}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        written = {
            "version": 2 if self.sparsity else 1,
            "fingerprint": self.fingerprint,
            "widths": {k: list(v) for k, v in self.widths.items()},
            "skips": list(self.skips),
            "formats": dict(self.formats),
        }
        return written | {"sparsity": dict(self.sparsity)} if self.sparsity else written

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises PlanError on an unknown version or missing fields."""
        if not isinstance(data, Mapping):
            raise PlanError(f"a plan's JSON is an object, not {type(data).__name__}")
        if data.get("version") not in VERSIONS:
            raise PlanError(f"plan version {data.get('version')!r} is not supported (this Shohin reads {' and '.join(map(str, VERSIONS))})")
        try:
            return Plan(
                str(data["fingerprint"]),
                {str(k): tuple(v) for k, v in data["widths"].items()},
                tuple(data["skips"]),
                dict(data["formats"]),
                {str(k): str(v) for k, v in data.get("sparsity", {}).items()},
            )
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise PlanError(f"the plan's JSON is damaged: {error!r}") from None


def _is_index(value: Any) -> bool:
    """True for a whole number that is no truth value (NumPy's and torch's included)."""
    return not isinstance(value, bool) and hasattr(value, "__index__") and "bool" not in str(getattr(value, "dtype", ""))
