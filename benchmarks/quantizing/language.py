"""A small language model with 4-bit weights in groups of 32, by Shohin and its peers: ``python benchmarks/quantization.py language``.

All quantize the same 43 linear layers, the head among them (the embedding stays float), and learn from the same 64 windows of text, without
labels. How far the predictions of the next byte move on held-out windows, in nats, is the figure (Kullback-Leibler divergence from the
float model's).
"""

from __future__ import annotations

import copy
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import shohin
from quantizing.decoders import SMALL, LanguageModel, small
from quantizing.onnx_text import few_bits, onnx_file, session
from quantizing.rows import Run, Sheet
from quantizing.tasks import TASKS, Answers, Task, answers, packed
from quantizing.weights import GROUP, NNCF, TORCH, scheme_bytes
from records import Record, interpreter

LAYERS = 7 * SMALL.layers + 1
WEIGHTS = SMALL.layers * (2 * SMALL.width**2 * (1 + SMALL.pairs / SMALL.heads) + 3 * SMALL.width * SMALL.hidden) + SMALL.width * SMALL.words

Found = tuple[Answers, float, int]
"""Logits of what is asked, processor seconds, and bytes of the weights."""


def ours(task: Task, rounding: str, rotate: bool) -> Found:
    """`shohin.quantize` with a weight scheme."""
    began = time.process_time()
    formats = {"*": f"weights uint4 group {GROUP}", "embedding/*": "float32"}  # as the peers leave it
    made = shohin.quantize(task.model(), shohin.Data(train=task.learned()), formats, rounding=rounding, rotate=rotate)
    seconds = time.process_time() - began
    model = copy.deepcopy(made.model)
    assert model is not None
    factors = {q.columns.numpy().tobytes() for q in made.evidence.values() if q.columns is not None}
    return answers(model, task.asked()), seconds, scheme_bytes(int(WEIGHTS), True) + sum(len(held) // 2 for held in factors)


def onnxruntime(task: Task, way: str, folder: Path) -> Found:
    """ONNX Runtime's own quantizer of matrix products."""
    source = onnx_file(task.model(), task.learned()[0], folder / "float.onnx")
    seconds, size = few_bits(source, folder / "few.onnx", way, LAYERS, GROUP)
    return answers(session(folder / "few.onnx"), task.asked()), seconds, size


def elsewhere(task: Task, environment: str, script: str, way: str, folder: Path, bits: tuple[bool, int]) -> Found:
    """What a script in another environment makes of it."""
    for name, batches in (("learned", task.learned()), ("asked", task.asked())):
        np.savez(folder / f"{name}.npz", **packed(batches))
    source = "decoder"
    if environment == "nncf":
        source = str(folder / "float.pt2")
        free = {"input_ids": {0: torch.export.Dim.DYNAMIC}}
        torch.export.save(torch.export.export(task.model(), (), task.learned()[0], dynamic_shapes=free), source)
    command = [interpreter(environment), str(Path(__file__).with_name(script)), source, way]
    done = subprocess.run([*command, *(str(folder / f"{n}.npz") for n in ("learned", "asked", "out"))], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-800:])
    said, held = json.loads(done.stdout.strip().splitlines()[-1]), np.load(folder / "out.npz")
    logits = np.concatenate([held[f"v{i}"] for i in range(len(held.files))]).astype(np.float64)
    return logits, said["seconds"], scheme_bytes(int(WEIGHTS), *bits)


def rows(task: Task, folder: Path) -> dict[str, Callable[[], Found]]:
    """Every way by name."""
    found: dict[str, Callable[[], Found]] = {}
    for rounding in ("descent", "gptq", "adaround", "hqq", "nearest"):
        for rotate in (False, True):
            found[f"shohin: {rounding}{', rotated' if rotate else ''}"] = partial(ours, task, rounding, rotate)
    for way in ("nearest, uint4", "hqq, uint4"):
        found[f"onnxruntime: {way}"] = partial(onnxruntime, task, way, folder)
    for way in TORCH:
        bits = ("hqq" not in way, 64 if way == "neural compressor: hqq" else 32)
        found[way] = partial(elsewhere, task, "inc", "torch_weights.py", way, folder, bits)
    for way in NNCF:
        found[f"nncf: {way}"] = partial(elsewhere, task, "nncf", "nncf_weights.py", way, folder, (True, 16))
    return found


def text(whole: Record, records: Sequence[Record]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        f"A Llama-like model of {whole['parameters'] / 1e6:.1f} million parameters that reads bytes ({whole['nats']:.3f} nats for each held-out "
        f"byte as it comes). {LAYERS} linear layers with 4-bit weights in groups of {GROUP}; nothing is trained.",
        "",
        "| method | bytes of the weights | divergence, millinats | more loss, millinats | same next byte | processor seconds |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        judged = r["judged"]
        figures = f"{1000 * judged['divergence']:.2f} | {1000 * judged['nats_drop']:+.2f} | {judged['agree']:.4f}"
        lines.append(f"| {r['name']} | {r['bytes'] / 1e6:.2f} MB | {figures} | {r['seconds']:.0f} |")
    return lines


SHEET = Sheet("language", "shohin: descent", lambda r: float(r["judged"]["divergence"]), "divergence", 0.9, text)


def begun(folder: Path) -> tuple[Record, dict[str, Run]]:
    """The model's own figures, and what makes each row."""
    task = TASKS["decoder"]()
    wanted = answers(small(), task.asked())

    def record(run: Callable[[], Found]) -> Record:
        found, seconds, size = run()
        return {"seconds": round(seconds, 1), "bytes": size, "judged": task.judge(found, wanted)}

    whole = {"parameters": sum(p.numel() for p in LanguageModel(SMALL).parameters()), "nats": task.judge(wanted, wanted)["nats"]}
    return whole, {name: partial(record, run) for name, run in rows(task, folder).items()}


def main(arguments: list[str]) -> int:
    """The command."""
    return SHEET.main(arguments, __doc__, begun)
