"""A small language model with 4-bit weights in groups of 32, by Shohin and its peers: ``python benchmarks/quantization.py language``.

All quantize the same 43 linear layers, the head among them (the embedding stays float), and learn from the same 64 windows of text, without
labels. How far the predictions of the next byte move on held-out windows, in nats, is the figure (Kullback-Leibler divergence from the
float model's).
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import shohin
from quantizing.decoders import SMALL, LanguageModel, small
from quantizing.onnx_text import few_bits, onnx_file, session
from quantizing.tasks import TASKS, Answers, Task, answers, packed
from quantizing.weights import GROUP, NNCF, TORCH, scheme_bytes
from records import HERE, Record, interpreter
from shohin.run import write_atomic

RESULTS, TABLE = HERE / "quantization_language.json", HERE / "quantization_language.md"
OURS, SHARE = "shohin: descent", 0.9
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


def verdict(records: Sequence[Record]) -> Record:
    """Shohin's default beside the best peer."""
    mine = next((r for r in records if r["name"] == OURS), None)
    peers = [r for r in records if not r["name"].startswith("shohin")]
    if mine is None or not peers:
        return {}
    best = min(peers, key=lambda r: float(r["judged"]["divergence"]))
    ratio = mine["judged"]["divergence"] / best["judged"]["divergence"]
    return {"best_peer": best["name"], "ratio": ratio, "demanded": SHARE, "met": ratio <= SHARE}


def table(whole: Record, records: Sequence[Record]) -> str:
    """Markdown, the smallest divergence first."""
    lines = [
        f"A Llama-like model of {whole['parameters'] / 1e6:.1f} million parameters that reads bytes ({whole['nats']:.3f} nats for each held-out "
        f"byte as it comes). {LAYERS} linear layers with 4-bit weights in groups of {GROUP}; nothing is trained.",
        "",
        "| method | bytes of the weights | divergence, millinats | more loss, millinats | same next byte | processor seconds |",
        "|---|---|---|---|---|---|",
    ]
    for r in sorted(records, key=lambda r: float(r["judged"]["divergence"])):
        judged = r["judged"]
        figures = f"{1000 * judged['divergence']:.2f} | {1000 * judged['nats_drop']:+.2f} | {judged['agree']:.4f}"
        lines.append(f"| {r['name']} | {r['bytes'] / 1e6:.2f} MB | {figures} | {r['seconds']:.0f} |")
    if found := verdict(records):
        said = "met" if found["met"] else "not met"
        lines += ["", f"- {OURS}: {found['ratio']:.2f}x the divergence of the best peer ({found['best_peer']}), demanded {SHARE}: {said}"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="quantization language", description=__doc__)
    parser.add_argument("--rows", nargs="+", default=None, help="names, or beginnings of names; all others stay as they were")
    parser.add_argument("--show", action="store_true", help="only what is known already")
    given = parser.parse_args(arguments)
    held = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"whole": {}, "records": []}
    if given.show:
        print(table(held["whole"], held["records"]))
        return 0
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    task = TASKS["decoder"]()
    wanted = answers(small(), task.asked())
    own = task.judge(wanted, wanted)
    whole = {"parameters": sum(p.numel() for p in LanguageModel(SMALL).parameters()), "nats": own["nats"]}
    records = {r["name"]: r for r in held["records"]}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in rows(task, Path(folder)).items():
            if given.rows is not None and not any(name.startswith(row) for row in given.rows):
                continue
            found, seconds, size = run()
            records[name] = {"name": name, "seconds": round(seconds, 1), "bytes": size, "judged": task.judge(found, wanted)}
            print(name, f"divergence {records[name]['judged']['divergence']:.6f} nats, {seconds:.0f} s", flush=True)
            ordered = list(records.values())
            write_atomic(RESULTS, (json.dumps({"whole": whole, "verdict": verdict(ordered), "records": ordered}, indent=1) + "\n").encode())
            write_atomic(TABLE, table(whole, ordered).encode())
    print(TABLE.read_text("utf-8"))
    return 0
