"""Errors that are written for the person who can mend them: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShohinError(Exception):
    """Base of all errors that Shohin raises on purpose."""


class ModelError(ShohinError):
    """The model cannot be run, captured or cut as asked."""


class CaptureError(ModelError):
    """The model runs, but cannot be captured as one program; its sub-modules may."""


class DataError(ShohinError):
    """The data, the metric or the loss is unusable."""


class BudgetError(ShohinError):
    """The budget cannot be parsed, contradicts itself, or cannot be met."""


class TargetError(ShohinError):
    """The target is unknown, not installed, or cannot run what was asked."""


class PlanError(ShohinError):
    """The plan belongs to another model or names choices that do not exist."""


class RunError(ShohinError):
    """The run folder is damaged or belongs to another job."""


def closest(name: str, names: Iterable[str]) -> str:
    """A sentence part that names what the user may have meant; empty if nothing is near."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(repr(n) for n in near)}?" if near else ""
