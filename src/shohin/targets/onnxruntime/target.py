"""The ONNX Runtime target on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shohin.targets.base import KernelRow
from shohin.targets.onnx.target import ONNXTarget

if TYPE_CHECKING:
    from shohin.targets.onnx.lower import Rules


class ORTTarget(ONNXTarget):
    """ONNX Runtime, CPU execution provider, with ``threads`` intra-op threads that do not spin."""

    name = "onnxruntime"
    dynamic = True

    @property
    def rules(self) -> Rules:
        """See `shohin.targets.onnxruntime.rules`."""
        from shohin.targets.onnxruntime.rules import RULES

        return RULES

    def runner(self, path: Path) -> Callable[..., Any]:
        """A `shohin.targets.onnxruntime.session.Runner` over the file."""
        from shohin.targets.onnxruntime.session import Runner

        return Runner(path, threads=self.threads)

    def inspect(self, path: Path) -> list[KernelRow]:
        """See `shohin.targets.onnxruntime.inspect.inspect`."""
        from shohin.targets.onnxruntime.inspect import inspect

        return inspect(path)

    def check(self, path: Path, expected: Mapping[str, str]) -> list[str]:
        """See `shohin.targets.onnxruntime.inspect.check`."""
        from shohin.targets.onnxruntime.inspect import check

        return check(path, expected)
