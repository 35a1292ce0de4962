"""Latency and peak memory of files, with their conditions and their repeatability."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shohin.candidate import Measurement
from shohin.errors import TargetError
from shohin.targets import cpu, timing
from shohin.targets.base import Ratio, Timing
from shohin.targets.registry import KNOWN, get_target, version


def resized(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, batch: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with its batch cut or repeated to ``batch`` samples. ``None`` leaves it as it is."""
    leaves, spec = torch.utils._pytree.tree_flatten((args, dict(kwargs or {})))
    size = next((x.shape[0] for x in leaves if isinstance(x, torch.Tensor) and x.dim()), None)
    if batch is not None and size is not None and size != batch:
        index = torch.arange(batch) % size
        leaves = [x[index.to(x.device)] if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == size else x for x in leaves]
    out: tuple[tuple[Any, ...], dict[str, Any]] = torch.utils._pytree.tree_unflatten(leaves, spec)
    return out


def _feeds(
    runtime: str, files: Sequence[Path], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, batch: int | None, threads: int
) -> list[NDArray[Any]]:
    args, kwargs = resized(args, kwargs, batch)
    if not files:
        raise TargetError("nothing to measure: no file was given")
    runner: Any = get_target(runtime, threads).runner
    feeds = [list(runner(Path(path)).feed(args, kwargs).values()) for path in files]
    if any(len(other) != len(feeds[0]) for other in feeds):
        raise TargetError("the files take different numbers of inputs, so they cannot be compared")
    return feeds[0]


def _conditions(runtime: str, threads: int, feeds: Sequence[NDArray[Any]], seed: int) -> dict[str, Any]:
    return {
        "threads": threads,
        "batch": int(feeds[0].shape[0]) if feeds and feeds[0].ndim else 1,
        "inputs": [list(feed.shape) for feed in feeds],
        "clock": "thread CPU time" if threads == 1 else "wall time (several threads)",
        "seed": seed,
        "runtime": f"{runtime} {version(KNOWN[runtime][0])}",
        "cpu": cpu.model_name(),
        "flags": sorted(cpu.flags()),
    }


def measure(
    runtime: str,
    files: Mapping[str, Path],
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    rounds: int = 200,
    seed: int = 0,
    threads: int = 1,
    batch: int | None = None,
) -> dict[str, Timing]:
    """Times files against each other in one random interleaving, in this process.

    Args:
        runtime: name of the target.
        files: by name.
        args, kwargs: an example call; its batch is cut or repeated to ``batch``.
        rounds: slices of about 0.4 ms per file; files that take longer get at least 100 slices and half a second, as far as
            6 seconds per file allow.
        threads: of the runtime. With several, wall time is taken instead of thread CPU time.

    Returns:
        Milliseconds per run: the mean of the three smallest slices. ``spread`` compares the two halves of the rounds.

    Raises:
        TargetError: if a file cannot be loaded or does not take the example.
    """
    feeds = _feeds(runtime, list(files.values()), args, kwargs, batch, threads)
    found = timing.time_files(runtime, {k: str(p) for k, p in files.items()}, feeds, rounds=rounds, seed=seed, threads=threads)
    common = _conditions(runtime, threads, feeds, seed)
    return {name: _timing(row, common) for name, row in found.items()}


def _timing(row: Mapping[str, float], common: Mapping[str, Any]) -> Timing:
    conditions = {**common, "rounds": int(row["rounds"]), "runs_per_round": int(row["inner"])}
    how = f"{common['clock']}, mean of the 3 smallest of {int(row['rounds'])} interleaved slices"
    return Timing(row["ms"], row["spread"], how, conditions)


def measure_in_processes(
    runtime: str,
    files: Mapping[str, Path],
    args: tuple[Any, ...],
    *,
    reference: str | None = None,
    processes: int = 5,
    kwargs: Mapping[str, Any] | None = None,
    rounds: int = 200,
    seed: int = 0,
    threads: int = 1,
    batch: int | None = None,
) -> dict[str, Ratio]:
    """Repeats `measure` in fresh processes: memory layout and frequency differ between processes, not only between rounds.

    Args:
        runtime: name of the target.
        reference: name of the file that ratios refer to; default the first.

    Returns:
        By file: the median time over processes (spread: largest minus smallest, divided by the median, of the per-process values) and the
        median ratio to the reference, with its range.
    """
    reference = next(iter(files)) if reference is None else reference
    if reference not in files:
        raise TargetError(f"the reference {reference!r} is not among the files {', '.join(files)}")
    feeds = _feeds(runtime, list(files.values()), args, kwargs, batch, threads)
    paths = {k: str(Path(p).resolve()) for k, p in files.items()}
    asked = {"do": "time", "runtime": runtime, "files": paths, "rounds": rounds, "threads": threads}
    rows = [_ask({**asked, "seed": seed + index}, feeds) for index in range(processes)]
    common = {**_conditions(runtime, threads, feeds, seed), "processes": processes}
    out = {}
    for name in files:
        times = [row[name]["ms"] for row in rows]
        ratios = [row[name]["ms"] / row[reference]["ms"] for row in rows]
        value = statistics.median(times)
        how = f"median of {processes} processes; in each, {common['clock']}, mean of the 3 smallest interleaved slices"
        timed = Timing(
            value, (max(times) - min(times)) / value, how, {**common, "rounds": int(rows[0][name]["rounds"]), "reference": reference}
        )
        out[name] = Ratio(timed, statistics.median(ratios), min(ratios), max(ratios))
    return out


def peak_memory(
    runtime: str,
    path: Path,
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    processes: int = 3,
    threads: int = 1,
    batch: int | None = None,
) -> Measurement:
    """Peak resident memory that a file costs, in bytes: median over fresh processes.

    Each process loads the runtime and the inputs, runs a graph of one node (which loads the runtime's own tables), resets its
    peak (``/proc/self/clear_refs``), opens the file, runs it five times and reports the peak above its size before. That holds
    weights, their packed copies, activations, the arena, the graph while it is optimized, and code pages of the runtime that
    the file is the first to touch.
    ``spread`` is (largest - smallest) / median over the processes.
    """
    feeds = _feeds(runtime, [Path(path)], args, kwargs, batch, threads)
    asked = {"do": "memory", "runtime": runtime, "path": str(Path(path).resolve()), "threads": threads}
    values = [int(_ask(asked, feeds)) for _ in range(processes)]
    value = statistics.median(values)
    how = f"measured: peak resident memory above the process before loading, median of {processes} processes"
    return Measurement(float(value), how, _conditions(runtime, threads, feeds, 0), (max(values) - min(values)) / max(value, 1))


def _ask(request: Mapping[str, Any], feeds: Sequence[NDArray[Any]]) -> Any:
    """Runs `timing` as a process. ``-P`` keeps its folder, whose names shadow the standard library's, off the path."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **{f"{index:04d}": feed for index, feed in enumerate(feeds)})  # type: ignore[arg-type]
        if request["do"] == "memory":
            request = {**request, "wake": _one_node(Path(folder) / "wake.onnx")}
        command = [sys.executable, "-P", timing.__file__]
        done = subprocess.run(command, input=json.dumps({**request, "inputs": str(inputs)}), capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise TargetError(f"the measuring process failed: {last[0]}")
    return json.loads(done.stdout)


def _one_node(path: Path) -> str:
    """Writes the smallest useful graph."""
    from onnx import TensorProto, helper, save

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "wake", values[:1], values[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return str(path)
