"""Shohin makes a PyTorch model fit the device it must run on.

Names are imported when they are first used, so that ``import shohin`` adds little to ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from shohin.budget import Budget as Budget
    from shohin.candidate import Candidate as Candidate
    from shohin.data import Data as Data
    from shohin.errors import ShohinError as ShohinError
    from shohin.graph import Graph as Graph
    from shohin.pipeline import load as load
    from shohin.pipeline import optimize as optimize
    from shohin.plan import Plan as Plan
    from shohin.result import Result as Result
    from shohin.targets import Target as Target
    from shohin.verbs import cut as cut
    from shohin.verbs import distill as distill
    from shohin.verbs import export as export
    from shohin.verbs import profile as profile
    from shohin.verbs import prune as prune
    from shohin.verbs import quantize as quantize
    from shohin.verbs import search as search
    from shohin.verbs import understand as understand
    from shohin.verbs import verify as verify
    from shohin.verbs import view as view

_HOMES = {
    "Budget": "budget",
    "Candidate": "candidate",
    "Data": "data",
    "Graph": "graph",
    "Plan": "plan",
    "Result": "result",
    "ShohinError": "errors",
    "Target": "targets",
    "load": "pipeline",
    "optimize": "pipeline",
    **dict.fromkeys(("cut", "distill", "export", "profile", "prune", "quantize", "search", "understand", "verify", "view"), "verbs"),
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shohin' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"shohin.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
