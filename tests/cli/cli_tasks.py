"""Texts of task files, and ways to run the command."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from shohin.cli import app

NET = """
import torch
from torch import nn
import shohin

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).mean((2, 3)))

def batches():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(32) % 4
    x = torch.randn(32, 3, 8, 8, generator=generator) + y.view(-1, 1, 1, 1)
    return list(zip(x.split(16), y.split(16)))
"""
TASK = NET + "\nmodel = Net()\ndata = shohin.Data(train=batches(), validation=batches())\n"
#: of the one real run
OPTIONS = ("--budget", "drop <= 90 %", "--methods", "quantize", "--finalists", 1, "--time-limit", "30 s")


def write(folder: Path, text: str, name: str = "job.py") -> Path:
    """A task file of that text."""
    path = folder / name
    path.write_text(text)
    return path


def invoke(*arguments: object) -> Any:
    """The command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def start(*arguments: object, cwd: Path | None = None) -> "subprocess.Popen[str]":
    """The command in a process of its own, which Ctrl-C reaches even if this one ignores it."""
    import signal

    return subprocess.Popen(
        [sys.executable, "-m", "shohin", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """`start`, to the end."""
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@dataclass
class Stopped:
    """A run that was stopped and resumed by the same command.

    Args:
        code, stderr: of the process that was stopped; ``journal`` is what it had written.
        resumed: what the same command gave afterwards.
    """

    folder: Path
    task: Path
    code: int
    stderr: str
    journal: str
    resumed: object
