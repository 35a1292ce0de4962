"""Targets: runtimes that lower a program to a file, run it, measure it and tell what really ran."""

from shohin.targets.base import KernelRow, Lowered, Target, Timing
from shohin.targets.registry import TargetRow, get_target, list_targets

__all__ = ["KernelRow", "Lowered", "Target", "TargetRow", "Timing", "get_target", "list_targets"]
