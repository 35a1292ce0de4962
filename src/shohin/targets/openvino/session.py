"""Files in OpenVINO: the file that ships, run with one thread, callable like the torch model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shohin.errors import TargetError
from shohin.targets import timing
from shohin.targets.onnx.signature import Signature, call_outputs, numbered, read_signature


def compiled(path: str | Path, threads: int = 1) -> Any:
    """An ``openvino.CompiledModel`` on the CPU, as it is timed.

    Raises:
        TargetError: if the file is missing or the runtime refuses it.
    """
    if not Path(path).is_file():
        raise TargetError(f"there is no file {str(path)!r}")
    try:
        return timing.compiled(str(path), threads)
    except Exception as error:  # RuntimeError with the text of several layers
        raise TargetError(f"OpenVINO cannot load {str(path)!r}: {_first_lines(error)}") from error


class Runner:
    """A file as a callable with the torch model's signature: tensors in, the model's output structure out.

    Args:
        path: an ONNX file, or one of OpenVINO's own format (xml). One that Shohin did not write takes its inputs by position and returns a
            tensor or a tuple.
        threads: of the runtime.

    Raises:
        TargetError: if the file cannot be loaded; on a call, if the arguments do not fit the file.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        self.path = Path(path)
        self.compiled = compiled(path, threads)
        self.signature: Signature | None = read_signature(path) if self.path.suffix == ".onnx" else None
        self.names: list[str] = [i.get_any_name() for i in self.compiled.inputs]

    def feed(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        """The file's inputs by name."""
        return numbered(self.path, self.signature, self.names, args, kwargs or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        feed = self.feed(args, kwargs)
        try:
            values = self.compiled(feed)
        except Exception as error:
            shapes = {name: list(value.shape) for name, value in feed.items()}
            raise TargetError(f"{self.path.name} cannot run on inputs of shapes {shapes}: {_first_lines(error)}") from error
        return call_outputs(self.signature, [torch.from_numpy(np.array(values[i])) for i in range(len(self.compiled.outputs))])

    def __repr__(self) -> str:
        return f"Runner({str(self.path)!r}, 'openvino')"


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
