"""Targets: runtimes that lower a program to a file, run it, measure it and tell what really ran."""

from shohin.targets.base import CannotNarrow, KernelRow, Lowered, Prepared, Target, Timing
from shohin.targets.registry import TargetRow, get_target, list_targets

__all__ = ["CannotNarrow", "KernelRow", "Lowered", "Prepared", "Target", "TargetRow", "Timing", "get_target", "list_targets"]
