"""Compares ONNX files where it matters: here, one thread, in turns. `python examples/latency.py a.onnx b.onnx ...`

Each of five fresh processes times all files in random order over many short slices and keeps the smallest CPU time per call of
its thread, which other work on the machine disturbs least; a ratio is the median over the processes. Batch 1, random input.
"""

import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Latency:
    """Milliseconds and the ratio to the first file: medians over processes, with the smallest and largest ratio."""

    ms: float
    ratio: float
    low: float
    high: float


def compare(files: list[Path], processes: int = 5, seconds: float = 2.0) -> list[Latency]:
    """Latency of each file; ratios are to the first. ``seconds`` is spent in each process.

    Raises:
        RuntimeError: if a file cannot be run.
    """
    runs = []
    for seed in range(processes):
        command = [sys.executable, str(Path(__file__)), "--once", str(seed), str(seconds), *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"timing failed: {done.stderr.strip()[-500:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    out = []
    for i in range(len(files)):
        ratios = [run[i] / run[0] for run in runs]
        out.append(Latency(statistics.median(run[i] for run in runs), statistics.median(ratios), min(ratios), max(ratios)))
    return out


def once(files: list[str], seed: int, seconds: float) -> list[float]:
    """Smallest milliseconds per call of each file in this process."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    generator = np.random.default_rng(seed)
    calls = []
    for file in files:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        shapes = {i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in session.get_inputs()}
        feed = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        begin = time.perf_counter()
        for _ in range(10):
            session.run(None, feed)
        calls.append((session, feed, max(1, round(0.4e-3 / ((time.perf_counter() - begin) / 10)))))
    best = [float("inf")] * len(files)
    order, end = list(range(len(files))), time.perf_counter() + seconds
    shuffle = random.Random(seed).shuffle
    while time.perf_counter() < end:
        shuffle(order)
        for i in order:
            session, feed, repeats = calls[i]
            begin_ns = time.thread_time_ns()
            for _ in range(repeats):
                session.run(None, feed)
            best[i] = min(best[i], (time.thread_time_ns() - begin_ns) / repeats / 1e6)
    return best


def main() -> None:
    """Prints one line per file."""
    if sys.argv[1:2] == ["--once"]:
        print(json.dumps(once(sys.argv[4:], int(sys.argv[2]), float(sys.argv[3]))))
        return
    files = [Path(a) for a in sys.argv[1:]]
    if not files:
        raise SystemExit(__doc__)
    for file, latency in zip(files, compare(files), strict=True):
        print(f"{latency.ms:9.4f} ms  {latency.ratio:6.3f} ({latency.low:.3f} to {latency.high:.3f})  {file}")


if __name__ == "__main__":
    main()
