"""Two processes that train together: started by a test, and in the script that it starts."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

import torch


def run_both(script: str | None, *arguments: object) -> None:
    """Runs ``script RANK *arguments`` as ranks 0 and 1; both must succeed."""
    command = [sys.executable, str(script)]
    started = [subprocess.Popen([*command, str(rank), *map(str, arguments)], stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        for process in started:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said.decode()[-2000:]
    finally:
        for process in started:
            process.kill()


def meet(rank: int, meeting: str) -> None:
    """In the script: takes part, on one thread."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=25)
    )


def part(rank: int, folder: Path, kind: str = "") -> None:
    """In the script, at its end: waits for the other process and leaves."""
    (folder / f"{rank}.{kind}.done").touch()
    until = time.monotonic() + 20
    while not (folder / f"{1 - rank}.{kind}.done").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os._exit(0)  # gloo's threads may abort a process that takes the group down while the other one still talks
