"""One network quantized to int8 by one method, in a process of its own: ``python -m quantizing.int8_trial MODEL METHOD PATH``.

Prints a JSON record: processor seconds, and by how many megabytes the peak of memory rose, after a tiny network was quantized once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import shohin
from quantizing.costs import Costs
from quantizing.integers import DYNAMIC, FOLDER, OUR_DYNAMIC, PATTERNS, runtime
from quantizing.onnx_text import onnx_file
from quantizing.tasks import TASKS, Batch, data


def tiny() -> tuple[nn.Module, list[Batch]]:
    """What everything is imported by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    return model, [{"input": torch.randn(4, 3, 8, 8)} for _ in range(2)]


def onnxruntime(source: Path, batches: Sequence[Batch], method: str, path: Path) -> None:
    """ONNX Runtime's own quantizers, one sample at a time as its documentation shows."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            rows = [{name: t[i : i + 1] for name, t in batch.items()} for batch in batches for i in range(len(next(iter(batch.values()))))]
            self.feeds = iter([{name: t.numpy() for name, t in row.items()} for row in rows])

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        if method == DYNAMIC:
            quantize_dynamic(str(ready), str(path), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
            return
        kind, ranges = method.removeprefix("onnxruntime: ").split(", ")
        quantize_static(
            str(ready),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=kind.endswith("7-bit"),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8 if kind == "u8u8" else QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax if ranges == "minmax" else CalibrationMethod.Percentile,
            extra_options={} if ranges == "minmax" else {"CalibPercentile": 99.99},
        )


def ours(model: nn.Module, known: shohin.Data, method: str) -> shohin.Candidate:
    """Shohin, with its defaults, or the formats of a pattern."""
    plain = "int8 dynamic" if method == OUR_DYNAMIC else "int8"
    return shohin.quantize(model, known, PATTERNS.get(method, plain), runtime(method))


def main() -> None:
    """The command."""
    name, method, where = sys.argv[1:]
    path = Path(where)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    small, little = tiny()
    run: Callable[[], Any]
    task = TASKS[name]()
    mine = method.startswith("shohin")
    if mine:
        ours(small, shohin.Data(train=little), OUR_DYNAMIC if method in PATTERNS else method)
        model, known = task.model(), data(task)
        run = lambda: ours(model, known, method)  # noqa: E731
    else:
        with tempfile.TemporaryDirectory() as folder:
            begun = onnx_file(small, little[0], Path(folder) / "tiny.onnx")
            onnxruntime(begun, little, method, Path(folder) / "out.onnx")
        batches = task.learned()
        run = lambda: onnxruntime(FOLDER / name / "float.onnx", batches, method, path)  # noqa: E731
    with Costs() as costs:
        made = run()
    record = {"seconds": costs.seconds, "megabytes": costs.megabytes}
    if mine:
        shipped = shohin.export(made, known, runtime(method), path)
        record |= {"departs": list(shipped.notes["parity"]["departs"])}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
