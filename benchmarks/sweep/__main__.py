"""Runs the sweep: ``python -m sweep [--only PATTERN] [--list] [--again]`` with this folder's parent on the path."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: bytes of address space that one entry may take
MEMORY = 24 * 2**30
RESULTS, KNOWN, TABLE = HERE / "results.jsonl", HERE / "known_failures.json", HERE / "TABLE.md"


def source_hash() -> str:
    """Of the package that is tried."""
    import shohin

    digest = hashlib.sha256()
    root = Path(shohin.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def latest() -> dict[str, dict[str, Any]]:
    """The last result of each entry."""
    if not RESULTS.exists():
        return {}
    return {r["name"]: r for r in map(json.loads, RESULTS.read_text().splitlines())}


def _child(name: str, pipe: Connection) -> None:
    """Tries one entry in this process and sends the record."""
    import resource

    from sweep.catalogue import catalogue
    from sweep.check import check

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    record = check(catalogue()[name])
    record["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    pipe.send(record)


def attempt(name: str, limit: float) -> dict[str, Any]:
    """Tries one entry in a fork of this process, which has imported everything, with limits on time and memory."""
    started = time.perf_counter()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    error = f"more than {limit:.0f} seconds"
    if receiver.poll(limit):
        try:
            record: dict[str, Any] = receiver.recv()
            process.join()
            return record
        except EOFError:
            process.join()
            error = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return {"name": name, "wrong": "", "error": error, "stage": "process", "seconds": round(time.perf_counter() - started, 1)}


def failed(record: dict[str, Any]) -> str:
    """Why an entry fails, or ""."""
    if record.get("wrong"):
        return f"wrong: {record['wrong']}"
    return str(record.get("error") or (record.get("onnx", "ok") if record.get("onnx", "ok") != "ok" else ""))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="a pattern of names (several may be given)")
    parser.add_argument("--list", action="store_true", help="names and families, without running")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each model")
    options = parser.parse_args()
    import torch

    from sweep.catalogue import catalogue
    from sweep.table import table
    from sweep.torchvision_schemas import torchvision_models

    torch.set_num_threads(1)

    chosen = [e for e in catalogue().values() if not options.only or any(fnmatch.fnmatch(e.name, f"*{p}*") for p in options.only)]
    if options.list:
        for entry in chosen:
            print(f"{entry.family:16} {entry.name} {entry.note}")
        print(len(chosen))
        return 0
    if any(e.name.startswith("transformers/") for e in chosen):
        torchvision_models()
        importlib.import_module("transformers")
    for name in ("torch.onnx", "onnxruntime", "onnxscript", "shohin.targets.onnx.lower"):
        importlib.import_module(name)  # once, before every fork
    version, done = source_hash(), latest()
    for entry in chosen:
        if done.get(entry.name, {}).get("source") == version and not options.again:
            continue
        record = {"family": entry.family, "note": entry.note, **attempt(entry.name, options.limit), "source": version}
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{entry.name:48} {record['seconds']:6.1f} s  {failed(record) or 'ok'}"[:200], flush=True)
    results = {name: r for name, r in latest().items() if name in catalogue()}
    TABLE.write_text(table(list(results.values())))
    known: dict[str, str] = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    tried = {e.name for e in chosen}
    new = [n for n in tried if failed(results[n]) and n not in known]
    healed = [n for n in tried if not failed(results[n]) and n in known]
    for name in sorted(new):
        print(f"fails and is not listed in {KNOWN.name}: {name}: {failed(results[name])}")
    for name in sorted(healed):
        print(f"passes and must leave {KNOWN.name}: {name}")
    return 1 if new or healed else 0


if __name__ == "__main__":
    sys.exit(main())
