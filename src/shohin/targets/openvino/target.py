"""The OpenVINO target on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shohin.targets.base import KernelRow
from shohin.targets.onnx.target import ONNXTarget

if TYPE_CHECKING:
    from shohin.targets.onnx.lower import Rules


class OpenVINOTarget(ONNXTarget):
    """OpenVINO, CPU device, one stream with ``threads`` threads, float32 where it is not integers.

    The file that ships is ONNX, which OpenVINO loads as it is. Its own format can be made of it on any machine, with the same answers:
    ``openvino.save_model(openvino.Core().read_model("m.onnx"), "m.xml", compress_to_fp16=False)``.
    """

    name = "openvino"

    @property
    def rules(self) -> Rules:
        """See `shohin.targets.openvino.rules`."""
        from shohin.targets.openvino.rules import RULES

        return RULES

    def runner(self, path: Path) -> Callable[..., Any]:
        """A `shohin.targets.openvino.session.Runner` over the file."""
        from shohin.targets.openvino.session import Runner

        return Runner(path, threads=self.threads)

    def inspect(self, path: Path) -> list[KernelRow]:
        """See `shohin.targets.openvino.inspect.inspect`."""
        from shohin.targets.openvino.inspect import inspect

        return inspect(path, self.threads)

    def check(self, path: Path, expected: Mapping[str, str]) -> list[str]:
        """See `shohin.targets.openvino.inspect.check`."""
        from shohin.targets.openvino.inspect import check

        return check(path, expected, self.threads)
