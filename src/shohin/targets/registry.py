"""Which targets exist, and which can be used here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

from shohin.errors import TargetError, closest
from shohin.targets.base import Target

#: name -> (distribution, importable package, extra or "" if always installed, what it accelerates)
KNOWN: dict[str, tuple[str, str, str, str]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime", "", "float32, int8 (static, QDQ)"),
    "openvino": ("openvino", "openvino", "openvino", "float32, int8, int4 weights"),
    "executorch": ("executorch", "executorch", "executorch", "float32, int8, int4 weights"),
    "litert": ("ai-edge-litert", "ai_edge_litert", "litert", "float32, int8"),
}


@dataclass(frozen=True)
class TargetRow:
    """One line of ``shohin targets``: name, whether its runtime is installed and Shohin can lower to it, version, formats."""

    name: str
    installed: bool
    supported: bool
    version: str | None
    accelerates: str


def _classes() -> dict[str, type[Target]]:
    from shohin.targets.onnxruntime.target import ORTTarget
    from shohin.targets.openvino.target import OpenVINOTarget

    return {"onnxruntime": ORTTarget, "openvino": OpenVINOTarget}


def find(name: str) -> type[Target]:
    """The target class of that name.

    Raises:
        TargetError: if the name is unknown, its extra is not installed, or this version cannot lower to it yet.
    """
    if name not in KNOWN:
        raise TargetError(f"unknown target {name!r}; known: {', '.join(KNOWN)}{closest(str(name), KNOWN)}")
    _, package, extra, _ = KNOWN[name]
    if importlib.util.find_spec(package) is None:
        raise TargetError(f"the target {name!r} is not installed; install it with: pip install 'shohin{f'[{extra}]' if extra else ''}'")
    classes = _classes()
    if name not in classes:
        raise TargetError(
            f"the runtime {name!r} is installed, but this version of Shohin cannot lower to it yet; targets that work: {', '.join(classes)}"
        )
    return classes[name]


def get_target(target: str | Target, threads: int = 1, batch: int = 1) -> Target:
    """A target by name, with conditions; a `Target` is returned as it is. Raises TargetError as `find` does."""
    if isinstance(target, Target):
        return target
    if not isinstance(target, str):
        raise TargetError(f"a target is a name or a Target; got {type(target).__name__}. Names: {', '.join(KNOWN)}")
    return find(target)(target, threads=threads, batch=batch)


def list_targets() -> list[TargetRow]:
    """Every known target, installed or not."""
    supported = _classes()
    rows = []
    for name, (distribution, package, _, accelerates) in KNOWN.items():
        installed = importlib.util.find_spec(package) is not None
        rows.append(TargetRow(name, installed, name in supported, version(distribution), accelerates))
    return rows


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def to_json(rows: list[TargetRow]) -> list[dict[str, Any]]:
    """Rows as JSON-able dictionaries."""
    return [dict(vars(row)) for row in rows]
