"""int8 without training, by Shohin and its peers: ``python benchmarks/quantization.py int8 [--model NAME] [--method NAME] [--again] [--show]``.

Every method starts from the same network and sees the same samples without labels. Each runs in a process of its own, after it has
quantized a tiny network, so that imports count neither as time nor as memory: processor seconds from the network in its framework (a
file for those that start from one) to its integer form, and by how much the peak of memory rose meanwhile. The answers of the file, in
the runtime that it was made for, are judged against the float network. The files of each runtime are timed together; those of LiteRT
where they are made, in turns with its float file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shohin
from fashion_mnist import CACHE
from quantizing.onnx_text import onnx_file
from quantizing.tasks import TASKS, Task, answers, packed
from records import HERE, Book, Record, interpreter, process

FOLDER = CACHE / "int8"
#: runtime -> our method
OURS = {"onnxruntime": "shohin: onnxruntime", "openvino": "shohin: openvino"}
ONNX_RUNTIME = tuple(
    f"onnxruntime: {kind}, {ranges}" for kind in ("u8s8 7-bit", "u8s8", "u8u8") for ranges in ("minmax", "percentile 99.99")
)
DYNAMIC, OUR_DYNAMIC = "onnxruntime: dynamic", "shohin: onnxruntime, dynamic"
#: method -> formats by pattern: what gated feed-forward layers of language models read has values that spoil all others
PATTERNS = {f"{OUR_DYNAMIC}, down in floats": {"*": "int8 dynamic", "*down*": "float32"}}
NNCF = ("nncf: openvino", "nncf: openvino, overflow fix", "nncf: openvino, accurate bias", "nncf: onnx")
AI_EDGE = ("ai edge: static", "ai edge: static, minmax", "ai edge: dynamic")
#: of make, that sets the environments up
MAKE = "benchmark-quantization"
#: of the float latency, of the best peer's, in agreement, in points of accuracy, in rank correlation, in seconds and memory of NNCF
DEMANDED = {"faster": 1.0, "peer": 1.05, "agree": 0.97, "accuracy": 0.3, "drop": 0.005, "cost": 0.5}


def methods(task: str) -> tuple[str, ...]:
    """Those that apply to a network. ONNX Runtime's percentiles of transformers need more than 24 GB of memory."""
    transformer = task in ("minilm", "decoder", "smollm2")
    static = [name for name in ONNX_RUNTIME if not transformer or "percentile" not in name]
    mixed = PATTERNS if task in ("decoder", "smollm2") else ()
    return (*OURS.values(), *static, *((OUR_DYNAMIC, *mixed, DYNAMIC) if transformer else ()), *NNCF, *AI_EDGE)


def prepared(task: Task) -> Path:
    """The folder of a network with what its peers start from: the float file, samples to learn from, samples to answer."""
    folder = FOLDER / task.name
    if not (folder / "asked.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        learned, asked = task.learned(), task.asked()
        onnx_file(task.model(), learned[0], folder / "float.onnx")
        np.save(folder / "float.npy", answers(task.model(), asked))
        np.savez(folder / "learned.npz", **packed(learned))
        np.savez(folder / "asked.npz", **packed(asked))
    return folder


def attempt(task: Task, method: str) -> Record | str:
    """The record of one run; of a network that the method cannot quantize, one with the reason as "failed"."""
    folder = prepared(task)
    path = file_of(folder, method)
    kind = next((kind for kind in ELSEWHERE if method.startswith(kind)), None)
    said = ELSEWHERE[kind](task, folder, method, path) if kind else process("quantizing.int8_trial", [task.name, method, path], None, MAKE)
    if isinstance(said, str):
        _, refused, why = said.rpartition("TargetError: ")  # a file that does not equal its view is a result, too
        return {"model": task.name, "method": method, "failed": why} if refused else said
    record = said | {"model": task.name, "method": method}
    if "failed" in record:
        return record
    found = np.load(path.with_suffix(".npy")) if kind else answers(shohin.Target(runtime(method)).runner(path), task.asked())
    record["bytes"] = record.get("bytes", path.stat().st_size if path.exists() else 0)
    return record | {"judged": task.judge(found.astype(np.float64), np.load(folder / "float.npy"))}


def _nncf(task: Task, folder: Path, method: str, path: Path) -> Record | str:
    script = Path(__file__).with_name("nncf_int8.py")
    done = subprocess.run(
        [interpreter("nncf"), str(script), str(folder), method, "transformer" if task.transformer else "", str(path)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return done.stderr.strip()[-500:]
    record: Record = json.loads(done.stdout.strip().splitlines()[-1])
    return record


def _ai_edge(task: Task, folder: Path, method: str, path: Path) -> Record | str:
    """From the program of one sample: the shapes of LiteRT's files are fixed."""
    program = folder / "float.pt2"
    if not program.exists():
        example = {name: t[:1] for name, t in task.learned()[0].items()}
        torch.export.save(torch.export.export(task.model(), (), example), program)
    return process("quantizing.aiedge_int8", [folder, method, path], "aiedge", MAKE)


#: methods that run in environments of their own and leave their answers beside their files, by how their names begin
ELSEWHERE = {"nncf": _nncf, "ai edge": _ai_edge}


def runtime(method: str) -> str:
    """In which a method's file runs."""
    if method in AI_EDGE:
        return "litert"
    return "openvino" if "openvino" in method else "onnxruntime"


def file_of(folder: Path, method: str) -> Path:
    """Where the file of a method lies."""
    name = method.replace(": ", "-").replace(", ", "-").replace(" ", "-")
    if method in AI_EDGE:
        return folder / f"{name}.tflite"
    return folder / (f"{name}.xml" if method.startswith("nncf: openvino") else f"{name}.onnx")


def latencies(task: Task, names: Sequence[str], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of all files of some runtimes, as ratios to the float file's: median, least and most of five processes, in turns."""
    folder, out = prepared(task), {}
    example = {name: t[:1] for name, t in task.learned()[0].items()}
    for kind in kinds:
        files = {name: file_of(folder, name) for name in names if runtime(name) == kind and file_of(folder, name).exists()}
        files = {f"float: {kind}": folder / "float.onnx", **files}
        found = shohin.Target(kind).compare(files, (), kwargs=example, reference=f"float: {kind}")
        out |= {name: {"ratio": r.ratio, "low": r.low, "high": r.high, "ms": r.timing.value} for name, r in found.items()}
    return out


def untimed(folder: Path, names: Sequence[str], timed: dict[str, Any], made: set[str]) -> list[str]:
    """The runtimes whose files are to be timed: those of which one was made anew, or has no time yet."""
    new = {runtime(name) for name in names if name in made or (name not in timed and file_of(folder, name).exists())}
    return [kind for kind in OURS if kind in new]


def key(record: Record) -> tuple[str, str]:
    """What a record is of."""
    return record["model"], record["method"]


def verdicts(records: list[Record], whole: dict[str, Any]) -> dict[str, Any]:
    """What the project demands of itself, network by network and runtime by runtime."""
    found: dict[str, Any] = {}
    records = [r for r in records if "judged" in r]
    for model in dict.fromkeys(r["model"] for r in records):
        rows, times = {r["method"]: r for r in records if r["model"] == model}, whole.get(model, {})
        peers = {name: r for name, r in rows.items() if not name.startswith("shohin")}
        for kind, mine in OURS.items():
            if mine not in rows or not peers:
                continue
            near = {name: float(peer["judged"]["snr"]) for name, peer in peers.items()}
            static, best = max((n for n in near if "dynamic" not in n), key=near.__getitem__), max(near, key=near.__getitem__)
            own = rows[mine]["judged"]["snr"]
            said: dict[str, Any] = {"fidelity": {"db": own, "peer": static, "peer_db": near[static], "met": own > near[static]}}
            said["fidelity"] |= {"of_all": best, "of_all_db": near[best]}
            fast = min((n for n in peers if n in times and runtime(n) == kind), key=lambda n: float(times[n]["ratio"]), default=None)
            if mine in times:
                ratio = times[mine]["ratio"]
                said["float"] = {"ratio": ratio, "met": ratio <= DEMANDED["faster"]}
                if fast:
                    said["peer"] = {"ratio": ratio / times[fast]["ratio"], "peer": fast}
                    said["peer"]["met"] = said["peer"]["ratio"] <= DEMANDED["peer"]
            if (nncf := rows.get(NNCF[0])) is not None:
                said["cost"] = {"seconds": rows[mine]["seconds"] / nncf["seconds"], "memory": rows[mine]["megabytes"] / nncf["megabytes"]}
            found[f"{model}, {kind}"] = said
    return found


def table(records: list[Record], whole: dict[str, Any]) -> str:
    """Markdown: a table for each network, the most faithful first, and what is demanded."""
    found = verdicts(records, whole)
    lines = []
    for model in dict.fromkeys(r["model"] for r in records if "judged" in r):
        rows = [r for r in records if r["model"] == model and "judged" in r]
        names = [name for name in rows[0]["judged"] if name not in ("snr",)]
        lines += [
            f"## {model}",
            "",
            f"| method | dB | {' | '.join(names)} | latency / float | bytes | processor seconds | more memory |",
            "|" + "---|" * (len(names) + 6),
        ]
        for r in sorted(rows, key=lambda r: -float(r["judged"]["snr"])):
            time = whole.get(model, {}).get(r["method"], r.get("latency"))
            ratio = f"{time['ratio']:.3f}" if time else ""
            values = " | ".join(f"{r['judged'][name]:.4f}" for name in names)
            cost = f"{r['bytes'] / 1e6:.2f} MB | {r['seconds']:.1f} | {r['megabytes']:.0f} MB"
            lines.append(f"| {r['method']} | {r['judged']['snr']:.2f} | {values} | {ratio} | {cost} |")
        missing = [r for r in records if r["model"] == model and "failed" in r]
        lines += [f"| {r['method']} | failed: {r['failed'].replace('|', '/')} |{' |' * (len(names) + 4)}" for r in missing]
        lines.append("")
        for kind in OURS:
            if (said := found.get(f"{model}, {kind}")) is None:
                continue
            met = {name: "met" if part.get("met") else "not met" for name, part in said.items()}
            near = said["fidelity"]
            beside = "" if near["of_all"] == near["peer"] else f"; of all {near['of_all']} {near['of_all_db']:.2f} dB"
            lines.append(
                f"- {kind}: {near['db']:.2f} dB, best static peer {near['peer']} {near['peer_db']:.2f} dB: {met['fidelity']}{beside}"
            )
            if "float" in said:
                lines.append(f"- {kind}: {said['float']['ratio']:.3f} of the float file's latency: {met['float']}")
            if "peer" in said:
                lines.append(f"- {kind}: {said['peer']['ratio']:.3f} of the fastest peer's latency ({said['peer']['peer']}): {met['peer']}")
            if "cost" in said:
                lines.append(
                    f"- {kind}: {said['cost']['seconds']:.2f} of the seconds and {said['cost']['memory']:.2f} of the memory of NNCF in OpenVINO"
                    f" ({DEMANDED['cost']} demanded of EfficientNet-Lite0)"
                )
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="quantization int8", description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="only this (several may be given)")
    parser.add_argument("--method", action="append", default=[], help="only this, or those that begin so (several may be given)")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--times", action="store_true", help="time the files again, except those of LiteRT, nothing else")
    parser.add_argument("--show", action="store_true", help="only what is known already")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    book = Book(HERE / "quantization_int8.json", HERE / "quantization_int8.md", key, "latencies", verdicts, table)
    if given.show:
        book.show()
        return 0
    failed = False
    for name in given.model or TASKS:
        task = TASKS[name]()
        made: set[str] = set()
        _, records = book.read()
        for method in methods(name) if not given.times else ():
            if given.method and not any(method.startswith(m) for m in given.method):
                continue
            if (name, method) in records and not given.again:
                continue
            record = attempt(task, method)
            if isinstance(record, str):
                failed = True
                print(name, method, "failed:", record, flush=True)
                continue
            print(name, method, json.dumps({k: record[k] for k in ("judged", "seconds", "failed") if k in record}), flush=True)
            book.add(record)
            made.add(method)
        timed = book.read()[0].get(name, {})
        kinds = list(OURS) if given.times else untimed(prepared(task), methods(name), timed, made)
        book.add(whole={name: timed | latencies(task, methods(name), kinds)})
    book.show()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
