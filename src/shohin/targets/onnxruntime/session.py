"""Sessions: the file that ships, run with one quiet thread, callable like the torch model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shohin.errors import TargetError
from shohin.targets.onnx.signature import KEY, Signature, call_outputs, numbered

#: optimization levels: "none" runs the file as it is written (float simulation of Q/DQ), "layer" makes every decision between
#: integer and float kernels but keeps names and layout, "all" is what ships
LEVELS = {"none": "ORT_DISABLE_ALL", "layer": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}


def options(threads: int = 1, level: str = "all") -> Any:
    """Session options: so many threads, sequential, no spinning (a spinning thread slows everything beside it)."""
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads, made.inter_op_num_threads = threads, 1
    made.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    made.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made.add_session_config_entry("session.inter_op.allow_spinning", "0")
    made.log_severity_level = 3
    return made


def open_session(path: str | Path, threads: int = 1, level: str = "all", made: Any = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Raises:
        TargetError: if the file is missing or the runtime refuses it.
    """
    import onnxruntime

    if not Path(path).is_file():
        raise TargetError(f"there is no file {str(path)!r}")
    try:
        return onnxruntime.InferenceSession(str(path), made or options(threads, level), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exception classes are private
        raise TargetError(f"ONNX Runtime cannot load {str(path)!r}: {error}") from error


def save_optimized(path: str | Path, optimized: str | Path, *, level: str = "all") -> None:
    """Writes the graph that the runtime executes. It holds operators of this CPU and is not to be shipped."""
    made = options(level=level)
    made.optimized_model_filepath = str(optimized)
    made.log_severity_level = 4
    open_session(path, made=made)


def optimized_model(path: str | Path, *, level: str = "all") -> Any:
    """The graph that the runtime executes, as an ``onnx.ModelProto``."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        save_optimized(path, file, level=level)
        return onnx.load(str(file))


class Runner:
    """A file as a callable with the torch model's signature: tensors in, the model's output structure out.

    Args:
        path: an ONNX file. One that Shohin did not write takes its inputs by position and returns a tensor or a tuple.
        threads: of the runtime.
        level: "all" is what ships; "none" runs the file exactly as written (see `LEVELS`).

    Raises:
        TargetError: if the file cannot be loaded; on a call, if the arguments do not fit the file.
    """

    def __init__(self, path: str | Path, *, threads: int = 1, level: str = "all") -> None:
        self.path, self.level = Path(path), level
        self.session = open_session(path, threads, level)
        meta = self.session.get_modelmeta().custom_metadata_map
        self.signature = Signature.from_json(meta[KEY]) if KEY in meta else None
        self.names: list[str] = [i.name for i in self.session.get_inputs()]

    def feed(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        """The file's inputs by name."""
        return numbered(self.path, self.signature, self.names, args, kwargs or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        feed = self.feed(args, kwargs)
        try:
            values = self.session.run(None, feed)
        except Exception as error:
            shapes = {name: list(value.shape) for name, value in feed.items()}
            raise TargetError(f"{self.path.name} cannot run on inputs of shapes {shapes}: {error}") from error
        return call_outputs(self.signature, [torch.from_numpy(np.asarray(value)) for value in values])

    def __repr__(self) -> str:
        return f"Runner({str(self.path)!r}, level={self.level!r})"
