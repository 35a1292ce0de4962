"""`import shohin` must not make a user's program start late."""

import subprocess
import sys
from pathlib import Path

CLOCK = "import time; t = time.process_time(); {}; print(time.process_time() - t)"
HEAVY = ("onnx", "onnxruntime", "onnxscript", "plotly", "jinja2", "optuna", "scipy.optimize", "typer", "pandas")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_adds_less_than_half_a_second_to_torch() -> None:
    # CPU seconds, the best of several, in turns: other work on the machine then falls on both alike
    times: dict[str, list[float]] = {"import torch": [], "import torch, shohin": []}
    for _ in range(4):
        for statement, seconds in times.items():
            seconds.append(float(python(CLOCK.format(statement))))
    torch, both = (min(seconds) for seconds in times.values())
    assert both - torch < 0.5, f"import torch takes {torch:.2f} s, with shohin {both:.2f} s ({both / torch:.2f} times)"


def test_importing_loads_no_heavy_library() -> None:
    loaded = python("import torch, sys; before = set(sys.modules); import shohin; print(*(set(sys.modules) - before))").split()
    assert [name for name in HEAVY if name in loaded] == []
