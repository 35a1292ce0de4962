"""The processor and the software that a number was measured on."""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shohin.targets.registry import version

#: kernel flag -> the name used here; only what decides which integer kernels run
_X86 = {
    "sse4_1": "sse4.1",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512_vnni": "avx512_vnni",
    "amx_int8": "amx_int8",
    "amx_tile": "amx_tile",
}
_ARM = {"neon": "neon", "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "sve": "sve", "sve2": "sve2"}
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """Model name and flags of interest from the text of ``/proc/cpuinfo`` (x86 ``flags``, Arm ``Features``)."""
    model, flags = "", frozenset[str]()
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("model name", "Hardware", "Model") and value and not model:
            model = value
        elif key in ("flags", "Features") and not flags:
            words = value.split()
            table = _X86 if key == "flags" else _ARM
            flags = frozenset(table[w] for w in words if w in table)
    return model, flags


@functools.cache
def _detect() -> tuple[str, frozenset[str]]:
    try:
        model, flags = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        model, flags = "", frozenset()
    if not flags:  # no Linux: torch knows the widest vector extension that it would use, VNNI stays unknown (taken as absent)
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        flags = frozenset({"AVX2": ["avx2"], "AVX512": ["avx2", "avx512f"], "NEON": ["neon"]}.get(capability, []))
        if platform.machine().lower() in ("arm64", "aarch64"):
            flags |= {"neon"} | ({"dotprod"} if sys.platform == "darwin" else set())  # every Apple silicon has dot products
    return model or platform.processor() or platform.machine(), flags


def model_name() -> str:
    """The processor's model name."""
    return _detect()[0]


def flags() -> frozenset[str]:
    """Instruction sets that decide which integer kernels run (avx2, avx512_vnni, avx_vnni, amx_int8, neon, dotprod...)."""
    return _detect()[1]


def saturates_u8s8(found: Iterable[str]) -> bool:
    """True if uint8 x int8 products are summed in pairs that saturate at 16 bits: x86 (AVX2, AVX512) without any VNNI.

    Args:
        found: flags as `flags` gives them.
    """
    found = set(found)
    x86 = bool(found & {"sse4.1", "avx", "avx2", "avx512f"})
    return x86 and not found & VNNI


def environment(threads: int = 1) -> dict[str, Any]:
    """What a measurement was made on: processor, flags, versions, threads, system. JSON-able."""
    return {
        "cpu": model_name(),
        "flags": sorted(flags()),
        "saturates_u8s8": saturates_u8s8(flags()),
        "cores": os.cpu_count(),
        "threads": threads,
        "os": platform.platform(terse=True),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "onnx", "onnxruntime", "openvino", "numpy") if version(name)},
    }
