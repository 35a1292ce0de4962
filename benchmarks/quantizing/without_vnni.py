"""The same int8 files on a CPU with AVX2 and without VNNI, whose kernels add pairs of products in 16 bits: ``python benchmarks/quantization.py
without-vnni [--model NAME] [--show]``.

ONNX Runtime runs in an emulated processor (qemu-user, "Haswell"), so that it chooses its kernels as there; OpenVINO is told by oneDNN's
own switch (ONEDNN_MAX_CPU_ISA). The files are those that ``int8`` made, the answers are judged by the same figures. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from quantizing.integers import NNCF, OURS, file_of, key, prepared, runtime
from quantizing.tasks import TASKS, Task
from records import HERE, Book, Record

EMULATOR = ("qemu-x86_64", "-cpu", "Haswell")
METHODS = (*OURS.values(), "onnxruntime: u8s8, minmax", "onnxruntime: u8s8 7-bit, minmax", *NNCF[:2])
MODELS = ("smartwatch", "resnet20", "mobilenetv2", "efficientnet_lite0", "minilm")

RUN = """
import sys
import numpy as np
from archives import batches
kind, place, path, out = sys.argv[1:]
asked = batches(place)
if kind == "openvino":
    import openvino as ov
    core = ov.Core()
    model = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    found = [model(batch)[0] for batch in asked]
else:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = [session.run(None, batch)[0] for batch in asked]
np.save(out, np.concatenate(found))
"""


def answered(folder: Path, path: Path, kind: str) -> np.ndarray[Any, Any] | str:
    """What a file says to all that is asked, on such a CPU; or what the runtime said last."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out.npy"
        command = [str(Path(sys.executable).resolve()), "-c", RUN, kind, str(folder / "asked.npz"), str(path), str(out)]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(np.__file__).parents[1], Path(__file__).parent)))}
        if kind == "openvino":
            variables["ONEDNN_MAX_CPU_ISA"] = "AVX2"
        else:
            command = [*EMULATOR, *command]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        return np.load(out) if not done.returncode else done.stderr.strip()[-300:]


def attempt(task: Task, method: str) -> Record | str:
    """The record of one file."""
    folder = prepared(task)
    path = file_of(folder, method)
    if not path.exists():
        return f"{path} does not exist: run `python benchmarks/quantization.py int8 --model {task.name}` first"
    found = answered(folder, path, runtime(method))
    if isinstance(found, str):
        return found
    return {"model": task.name, "method": method, "judged": task.judge(found.astype(np.float64), np.load(folder / "float.npy"))}


def table(records: list[Record], whole: dict[str, Any]) -> str:
    """Markdown: what each file loses without VNNI."""
    usual = {key(r): r["judged"] for r in json.loads((HERE / "quantization_int8.json").read_text("utf-8"))["runs"] if "judged" in r}
    lines = ["| network | method | dB with VNNI | dB without | what is asked of the task, without |", "|---|---|---|---|---|"]
    for model in dict.fromkeys(r["model"] for r in records):
        for r in sorted((r for r in records if r["model"] == model), key=lambda r: -float(r["judged"]["snr"])):
            before = usual.get(key(r), {}).get("snr")
            rest = ", ".join(
                f"{name} {value:.4f}" for name, value in r["judged"].items() if name in ("agree", "accuracy", "words_drop", "news_drop")
            )
            lines.append(f"| {model} | {r['method']} | {'' if before is None else f'{before:.2f}'} | {r['judged']['snr']:.2f} | {rest} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """The command. Without the emulator it is skipped."""
    parser = argparse.ArgumentParser(prog="quantization without-vnni", description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="only this (several may be given)")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--show", action="store_true", help="only what is known already")
    given = parser.parse_args(arguments)
    book = Book(HERE / "quantization_without_vnni.json", HERE / "quantization_without_vnni.md", key, "whole", lambda *_: {}, table)
    if given.show:
        book.show()
        return 0
    if shutil.which(EMULATOR[0]) is None:
        print("without-vnni is skipped: it needs qemu-x86_64 (Debian: apt-get install qemu-user)")
        return 0
    failed = False
    for name in given.model or MODELS:
        task = TASKS[name]()
        _, records = book.read()
        for method in METHODS:
            if (name, method) in records and not given.again:
                continue
            record = attempt(task, method)
            if isinstance(record, str):
                failed = True
                print(name, method, "failed:", record, flush=True)
                continue
            print(name, method, json.dumps(record["judged"]), flush=True)
            book.add(record)
    book.show()
    return int(failed)
