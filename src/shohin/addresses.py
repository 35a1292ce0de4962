"""Addresses: stable names of tensors, as plain strings.

A parameter's address is its qualified name (``blocks.0.attn.qkv.weight``). An operation's address is
``<module path>/<operator family>.<ordinal>`` (``blocks.0.attn/add.1``): the ordinal counts the operations of that
family inside that module, in the order in which they run. Addresses survive cutting and recapture; graph node names do not.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence

from shohin.errors import PlanError, closest


def operation_address(module_path: str, family: str, ordinal: int) -> str:
    """The address of one operation: ``module_path/family.ordinal``."""
    return f"{module_path}/{family}.{ordinal}"


def number(operations: Iterable[tuple[str, str]]) -> list[str]:
    """Addresses for (module path, family) pairs in execution order."""
    seen: Counter[tuple[str, str]] = Counter()
    out = []
    for pair in operations:
        out.append(operation_address(*pair, seen[pair]))
        seen[pair] += 1
    return out


def match(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a shell-style pattern selects (``*``, ``?``, ``[abc]``).

    Raises:
        PlanError: if the pattern matches nothing (an option that matches nothing in silence is a trap).
    """
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise PlanError(f"the pattern {pattern!r} matches none of {len(names)} names{closest(pattern, names)}")
    return found
