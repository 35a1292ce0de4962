"""MiniLM with 4-bit weights in groups of 32, by Shohin and its peers: ``python benchmarks/quantization.py weights``.

All quantize the same 36 linear layers (embeddings stay float) and see the same texts, without labels. How far the embeddings of held-out
texts move is the figure; WordSim-353 and the Lee news texts are looked at for the record alone.
"""

from __future__ import annotations

import copy
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import shohin
from cutting.texts import TEXTS, Judges, calibration, moved
from distilling.corpus import file, texts
from distilling.minilm import embed, evaluated, load_teacher
from quantizing.onnx_text import Vectors, captured, exported, few_bits, in_onnxruntime
from quantizing.rows import Run, Sheet
from quantizing.tasks import packed
from records import Record, interpreter

GROUP = 32
TORCH = ("neural compressor: nearest", "neural compressor: hqq", "neural compressor: gptq", "torchao: nearest", "torchao: hqq")
NNCF = ("plain", "awq", "scale estimation", "gptq", "awq, scale estimation, gptq")

Found = tuple[nn.Module, float, int]
"""A module that embeds texts, processor seconds, and bytes of the 36 weights."""


def scheme_bytes(weights: int, zero_points: bool, scale_bits: int = 32) -> int:
    """Of so many weights: codes, scales and zero points."""
    return (weights * 4 + weights // GROUP * (scale_bits + 4 * zero_points)) // 8


def packed_bytes(zero_points: bool, scale_bits: int = 32) -> int:
    """Of the 36 weights of MiniLM."""
    return scheme_bytes(6 * (4 * 384 * 384 + 2 * 384 * 1536), zero_points, scale_bits)


def ours(teacher: nn.Module, data: shohin.Data, rounding: str, kind: str) -> Found:
    """`shohin.quantize` with a weight scheme."""
    began = time.process_time()
    formats = {"*": f"weights {kind} group {GROUP}", "*/embedding.*": "float32"}  # as the peers leave them
    found = shohin.quantize(teacher, data, formats, rounding=rounding)
    seconds = time.process_time() - began
    model = copy.deepcopy(teacher)
    assert found.model is not None
    model.load_state_dict(found.model.state_dict())
    factors = {
        q.columns.numpy().tobytes() for q in found.evidence.values() if q.columns is not None
    }  # float32, once for all that share them
    return model, seconds, packed_bytes(kind == "uint4") + sum(len(held) // 2 for held in factors)


def onnxruntime(teacher: nn.Module, data: shohin.Data, way: str, folder: Path) -> Found:
    """ONNX Runtime's own quantizer of matrix products: round to nearest, symmetric or not, or HQQ."""
    seconds, size = few_bits(exported(teacher, folder / "float.onnx"), folder / "few.onnx", way, 36, GROUP)
    return in_onnxruntime(folder / "few.onnx"), seconds, size


class _Asked(nn.Module):
    """Remembers what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Tensor]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Zeros."""
        self.batches.append({"input_ids": input_ids, "attention_mask": attention_mask})
        return torch.zeros(len(input_ids), 384)


def nncf(teacher: nn.Module, data: shohin.Data, way: str, folder: Path, asked: Sequence[Any]) -> Found:
    """NNCF's ``compress_weights`` in OpenVINO: 16-bit scales."""
    path = folder / "float.pt2"
    torch.export.save(captured(teacher), path)
    model, seconds = _elsewhere("nncf", "nncf_weights.py", [str(path), way], data, folder, asked)
    return model, seconds, packed_bytes(True, 16)


def in_torch(data: shohin.Data, way: str, folder: Path, asked: Sequence[Any]) -> Found:
    """Neural Compressor and torchao; the former's HQQ has float zero points, the latter's none."""
    model, seconds = _elsewhere("inc", "torch_weights.py", [str(file("config.json").parent), way], data, folder, asked)
    scale_bits = 64 if way == "neural compressor: hqq" else 32
    return model, seconds, packed_bytes("hqq" not in way, scale_bits)


def _elsewhere(
    environment: str, script: str, what: Sequence[str], data: shohin.Data, folder: Path, asked: Sequence[Any]
) -> tuple[nn.Module, float]:
    """What a script in another environment answers to all that will be asked, and its processor seconds."""
    for name, batches in (("learned", list(data.train or ())), ("asked", asked)):
        np.savez(folder / f"{name}.npz", **packed(batches))
    places = (str(folder / f"{n}.npz") for n in ("learned", "asked", "out"))
    command = [interpreter(environment), str(Path(__file__).with_name(script)), *what, *places]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-800:])
    said = json.loads(done.stdout.strip().splitlines()[-1])
    print(" ", environment, said, flush=True)
    held = np.load(folder / "out.npz")
    answers = iter([held[f"v{i}"] for i in range(len(held.files))])
    return Vectors(lambda _: next(answers)), said["seconds"]


def rows(teacher: nn.Module, data: shohin.Data, folder: Path, asked: Sequence[Any]) -> dict[str, Callable[[], Found]]:
    """Every way by name."""
    found: dict[str, Callable[[], Found]] = {}
    for kind in ("uint4", "int4"):
        for rounding in ("descent", "blocks", "gptq", "adaround", "hqq", "nearest"):
            if kind == "uint4" or rounding not in ("hqq", "adaround", "blocks"):
                found[f"shohin: {rounding}, {kind}"] = partial(ours, teacher, data, rounding, kind)
    for way in ("nearest, int4", "nearest, uint4", "hqq, uint4"):
        found[f"onnxruntime: {way}"] = partial(onnxruntime, teacher, data, way, folder)
    for way in TORCH:
        found[way] = partial(in_torch, data, way, folder, asked)
    for way in NNCF:
        found[f"nncf: {way}"] = partial(nncf, teacher, data, way, folder, asked)
    return found


def text(whole: Record, records: Sequence[Record]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        f"MiniLM as it comes: rank correlation with people {whole['words']:.4f} (WordSim-353), {whole['news']:.4f} (Lee). 36 linear layers "
        f"with 4-bit weights in groups of {GROUP}; nothing is trained.",
        "",
        "| method | bytes of the 36 weights | held-out texts: squared error | 1 - cosine | WordSim-353: drop | 95 % interval | Lee: drop | 95 % interval | processor seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        cells = [r["name"], f"{r['bytes'] / 1e6:.2f} MB", f"{r['held_out']['squared']:.4f}", f"{r['held_out']['turned']:.4f}"]
        for name in ("words", "news"):
            low, high = r["people"][name]["interval"]
            cells += [f"{r['people'][name]['drop']:+.4f}", f"{low:+.3f} to {high:+.3f}"]
        lines.append(f"| {' | '.join(cells)} | {r['seconds']:.0f} |")
    return lines


#: the project demands 0.9 of the best peer's squared error, at equal bytes
SHEET = Sheet("weights", "shohin: descent, uint4", lambda r: float(r["held_out"]["squared"]), "error", 0.9, text)


def begun(folder: Path) -> tuple[Record, dict[str, Run]]:
    """MiniLM's own figures, and what makes each row."""
    teacher, (_, held), data = load_teacher(), texts(), calibration(TEXTS)
    wanted, judges = {name: embed(teacher, lines) for name, lines in held.items()}, Judges.of(teacher)
    best = judges.whole.figures()
    asked = _Asked()
    moved(asked, wanted, held)
    evaluated(asked)

    def record(run: Callable[[], Found]) -> Record:
        model, seconds, size = run()
        judged = {"held_out": moved(model, wanted, held), "people": judges.drop(evaluated(model))}
        return {"seconds": round(seconds, 1), "bytes": size, **judged}

    found = {name: partial(record, run) for name, run in rows(teacher, data, folder, asked.batches).items()}
    return {"words": best.words, "news": best.news}, found


def main(arguments: list[str]) -> int:
    """The command."""
    return SHEET.main(arguments, __doc__, begun)
