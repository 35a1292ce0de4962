"""The timing loop, and a worker process that holds nothing but the runtime.

This file imports only the standard library, NumPy and the runtime, so that ``python -P timing.py`` starts fast and its memory
is the runtime's own. The loop: slices of about 0.4 ms in random interleaved order, thread CPU time, the mean of the three
smallest. On a shared machine wall times are bimodal (a neighbour runs or not); the smallest CPU times of many short slices
repeat within about 1 %, where medians of long slices differ by 6-38 %.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLICE = 0.4e-3  # seconds
LEAST_ROUNDS, LEAST_SECONDS, MOST_SECONDS = 100, 0.5, 6.0  # per file
WARM_BELOW = 5e-3  # a run that is shorter gets its caches re-warmed by one unmeasured run


def interleave(runs: Sequence[Callable[[], object]], *, rounds: int, seed: int, threads: int = 1) -> tuple[NDArray[np.float64], list[int]]:
    """Times functions against each other.

    Args:
        runs: what to time.
        rounds: slices of each, at least; long runs get enough for half a second but no more than `MOST_SECONDS`.
        seed: of the random order.
        threads: more than one makes this wall time, since thread time sees the calling thread only.

    Returns:
        Seconds per run, shape (functions, rounds), and how many runs one slice of each holds.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    generator = np.random.default_rng(seed)
    singles = []
    for run in runs:
        for _ in range(3):
            run()
        best = float("inf")
        for _ in range(3):
            start = clock()
            run()
            best = min(best, clock() - start)
        singles.append(max(best, 1e-7))
    inner = [max(1, int(SLICE / single)) for single in singles]
    longest = max(single * count for single, count in zip(singles, inner, strict=True))
    number = max(rounds if longest < 2e-3 else LEAST_ROUNDS, int(LEAST_SECONDS / longest) if longest > 2e-3 else 0)
    number = max(10, min(number, int(MOST_SECONDS / longest)))
    out = np.zeros((len(runs), number))
    order = np.arange(len(runs))
    for index in range(number):
        generator.shuffle(order)
        for k in order.tolist():
            run = runs[k]
            if singles[k] < WARM_BELOW:
                run()
            start = clock()
            for _ in range(inner[k]):
                run()
            out[k, index] = (clock() - start) / inner[k]
    return out, inner


def statistic(slices: NDArray[np.float64]) -> float:
    """The mean of the three smallest."""
    return float(np.sort(slices)[:3].mean())


def spread(slices: NDArray[np.float64]) -> float:
    """Repeatability: the statistic of the first half of the rounds against that of the second, relative."""
    half = len(slices) // 2
    first, second = statistic(slices[:half]), statistic(slices[half:])
    return abs(first - second) / min(first, second)


def session(path: str, threads: int) -> Any:
    """A session with quiet threads."""
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads, made.inter_op_num_threads = threads, 1
    made.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made.log_severity_level = 3
    return onnxruntime.InferenceSession(path, made, providers=["CPUExecutionProvider"])


def opened(runtime: str, path: str, feeds: Sequence[NDArray[Any]], threads: int) -> Callable[[], object]:
    """A file as a function that runs it on inputs given by position."""
    if runtime == "openvino":
        import openvino

        request = compiled(path, threads).create_infer_request()
        for index, feed in enumerate(feeds):
            request.set_input_tensor(index, openvino.Tensor(feed))
        return lambda: request.infer(share_outputs=True)  # copies of inputs and outputs take longer than a small network
    made = session(path, threads)
    named = dict(zip((i.name for i in made.get_inputs()), feeds, strict=True))
    return lambda: made.run(None, named)


def compiled(path: str, threads: int) -> Any:
    """A file in OpenVINO: one stream, float32 where it is not integers, weights of few bits beside float activations as they are."""
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    return openvino.Core().compile_model(path, "CPU", options)


def time_files(
    runtime: str, files: Mapping[str, str], feeds: Sequence[NDArray[Any]], *, rounds: int, seed: int, threads: int
) -> dict[str, dict[str, float]]:
    """Times files in one interleaving: name -> {"ms", "spread", "rounds", "inner"}. Inputs are given by position."""
    runs = [opened(runtime, path, feeds, threads) for path in files.values()]
    slices, inner = interleave(runs, rounds=rounds, seed=seed, threads=threads)
    return {
        name: {"ms": statistic(row) * 1e3, "spread": spread(row), "rounds": float(len(row)), "inner": float(count)}
        for name, row, count in zip(files, slices, inner, strict=True)
    }


def memory(runtime: str, path: str, feeds: Sequence[NDArray[Any]], threads: int, wake: str) -> int:
    """Peak resident memory of opening a session and running it five times, above that of the process before, in bytes.

    ``wake`` is a file of one node, run first: the runtime's own tables (some 10 MB) are not the model's.
    """
    opened(runtime, wake, [np.zeros(1, dtype=np.float32)], threads)()
    before = _status("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak now starts at the present size
    except OSError:
        before = max(before, _status("VmHWM"))
    run = opened(runtime, path, feeds, threads)
    for _ in range(5):
        run()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes; without it, the peak that the system reports."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Reads a request from standard input as JSON, writes the answer to standard output."""
    request = json.load(sys.stdin)
    with np.load(request["inputs"], allow_pickle=False) as held:
        feeds = [held[name] for name in sorted(held.files)]
    threads = request["threads"]
    answer: Any
    if request["do"] == "time":
        answer = time_files(request["runtime"], request["files"], feeds, rounds=request["rounds"], seed=request["seed"], threads=threads)
    else:
        answer = memory(request["runtime"], request["path"], feeds, threads, request["wake"])
    json.dump(answer, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the runtime's threads need no orderly end


if __name__ == "__main__":
    main()
