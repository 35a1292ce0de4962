"""AI Edge Quantizer's int8, in an environment of its own: ``python -m quantizing.aiedge_int8 FOLDER METHOD PATH``.

FOLDER holds "float.pt2" (a program of one sample), "learned.npz" and "asked.npz". LiteRT-Torch converts the program to
"float.tflite" there, unless it is done; seconds and memory are of what the quantizer makes of that file, one sample at a time as its
documentation shows. The recipes are its own, as they are: the integer file of the static one also takes and gives integers, which are
rounded and decoded here, outside of what is timed. The file goes to PATH, its answers to what is asked beside it as npy. The float
file and this one are timed in turns. It imports nothing of Shohin.

Prints a JSON record last. Where the network cannot be converted or quantized, the record holds the reason as "failed".
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import calibrator, quantizer, recipe, recipe_manager
from ai_edge_quantizer.utils import qsv_utils

from quantizing.archives import batches
from quantizing.costs import Costs

RECIPES = {
    "ai edge: static": recipe.static_wi8_ai8,
    "ai edge: static, minmax": recipe.static_wi8_ai8,
    "ai edge: dynamic": recipe.dynamic_wi8_afp32,
}
ROUNDS, SECONDS = 5, 0.5
Sample = dict[str, np.ndarray]


class File:
    """A file in LiteRT, with one thread."""

    def __init__(self, path: Path) -> None:
        self.model = Interpreter(str(path), num_threads=1)
        self.model.allocate_tensors()
        signature = self.model.get_signature_runner()
        self.inputs = signature.get_input_details()
        (self.output,) = signature.get_output_details().values()

    def taken(self, sample: Sample) -> Sample:
        """A sample in the file's own types; of floats to int8, by the scale and the zero point of the file."""
        return {name: _encoded(sample[name], details) for name, details in self.inputs.items()}

    def hold(self, sample: Sample) -> None:
        """Sets the inputs."""
        for name, value in self.taken(sample).items():
            self.model.set_tensor(self.inputs[name]["index"], value)

    def answer(self, sample: Sample) -> np.ndarray:
        """The output of one sample, in floats."""
        self.hold(sample)
        self.model.invoke()
        found = self.model.get_tensor(self.output["index"])
        if found.dtype == np.float32:
            return found
        scale, zero = self.output["quantization"]
        return ((found.astype(np.int32) - zero) * scale).astype(np.float32)


def _encoded(value: np.ndarray, details: dict) -> np.ndarray:
    if value.dtype.kind == "f" and details["dtype"] == np.int8:
        scale, zero = details["quantization"]
        value = np.clip(np.rint(value / scale) + zero, -128, 127)
    return value.astype(details["dtype"])


def samples(path: Path) -> list[Sample]:
    """The samples of an npz of batches, one by one."""
    rows = []
    for batch in batches(path):
        rows += [{name: t[i : i + 1] for name, t in batch.items()} for i in range(len(next(iter(batch.values()))))]
    return rows


def tiny() -> tuple[torch.export.ExportedProgram, list[Sample]]:
    """What everything is imported by."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.export.export(model, (), {"input": x}), [{"input": x.numpy()}]


def convert(program: torch.export.ExportedProgram, path: Path) -> Path:
    """The program as a file of LiteRT, its inputs by name and laid out as they are."""
    litert_torch.convert(program.module(), (), dict(program.example_inputs[1])).export(str(path))
    return path


def quantized(path: Path, learned: list[Sample], method: str) -> quantizer.QuantizationResult:
    """Calibrated, where the recipe asks for it (by a moving average, as it does by itself, or by least and largest), and quantized."""
    made = quantizer.Quantizer(str(path), RECIPES[method]())
    if not made.need_calibration:
        return made.quantize(None)
    data = {"serving_default": learned}
    if not method.endswith("minmax"):
        return made.quantize(made.calibrate(data, num_threads=1))
    seen = calibrator.Calibrator(str(path), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    rules = recipe_manager.RecipeManager()
    rules.load_quantization_recipe(RECIPES[method]())
    seen.calibrate(data, rules)
    return made.quantize(seen.get_model_qsvs())


def seconds_of(file: File) -> float:
    """Processor seconds of a run: the median of as many as half a second holds, after three."""
    for _ in range(3):
        file.model.invoke()
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < ROUNDS:
        began = time.thread_time()
        file.model.invoke()
        times.append(time.thread_time() - began)
    return statistics.median(times)


def latency(original: File, own: File, sample: Sample) -> dict[str, float]:
    """As a ratio to the float file's, in turns: of the medians of five rounds, and the least and most of a round."""
    files, rounds = (original, own), []
    for file in files:
        file.hold(sample)
    for _ in range(ROUNDS):
        rounds.append([seconds_of(file) for file in files])
    theirs, mine = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratios = [b / a for a, b in rounds]
    return {"ratio": mine / theirs, "low": min(ratios), "high": max(ratios), "ms": mine * 1e3, "float_ms": theirs * 1e3}


@contextlib.contextmanager
def told(step: str) -> Iterator[None]:
    """What a tool cannot do is a result as well."""
    try:
        yield
    except Exception as error:  # whatever it raises
        reason = " ".join(f"{step}: {type(error).__name__}: {error}".split())
        print(json.dumps({"failed": reason[:200]}))
        raise SystemExit(0) from error


def main() -> None:
    """The command."""
    folder, method, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    program, little = tiny()
    with tempfile.TemporaryDirectory() as place:
        quantized(convert(program, Path(place) / "tiny.tflite"), little, method)
    source = folder / "float.tflite"
    if not source.exists():
        with told("not converted"):
            convert(torch.export.load(folder / "float.pt2"), source)
    original = File(source)
    learned = [original.taken(sample) for sample in samples(folder / "learned.npz")]
    with told("not quantized"), Costs() as costs:
        made = quantized(source, learned, method)
    made.export_model(str(out), overwrite=True)
    own, asked = File(out), samples(folder / "asked.npz")
    np.save(out.with_suffix(".npy"), np.concatenate([own.answer(sample) for sample in asked]))
    record = {"seconds": costs.seconds, "megabytes": costs.megabytes, "bytes": out.stat().st_size}
    print(json.dumps(record | {"latency": latency(original, own, asked[0])}))


if __name__ == "__main__":
    main()
