"""`import shohin` must not make a user's program start late."""

import subprocess
import sys
from pathlib import Path

CLOCK = """
from time import process_time as now
a = now()
import torch
b = now()
import shohin
print(b - a, now() - b)
"""
HEAVY = ("onnx", "onnxruntime", "onnxscript", "plotly", "jinja2", "optuna", "scipy.optimize", "typer", "pandas")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_adds_less_than_half_a_second_to_torch() -> None:
    # CPU seconds of both in one process, so that other work on the machine falls on both alike; the best of three
    torch, added = min((tuple(map(float, python(CLOCK).split())) for _ in range(3)), key=sum)
    assert added < 0.5, f"import torch takes {torch:.2f} s, shohin adds {added:.2f} s ({added / torch:.0%})"


def test_importing_loads_no_heavy_library() -> None:
    loaded = python("import torch, sys; before = set(sys.modules); import shohin; print(*(set(sys.modules) - before))").split()
    assert [name for name in HEAVY if name in loaded] == []
