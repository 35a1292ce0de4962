"""One real run, stopped by Ctrl-C and resumed, for all tests of the command."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_tasks import OPTIONS, TASK, Stopped, invoke, start, write


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Timings are kept in a folder of these tests."""
    before = os.environ.get("SHOHIN_CACHE")
    os.environ["SHOHIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SHOHIN_CACHE"]
    else:
        os.environ["SHOHIN_CACHE"] = before


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Stopped:
    """`shohin optimize`, stopped when the baseline was finished, and resumed."""
    base = tmp_path_factory.mktemp("job")
    task, folder = write(base, TASK), base / "run"
    process = start("optimize", task, "--out", folder, *OPTIONS)
    journal = folder / "journal.jsonl"
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline and '"stage": "baseline"' not in _text(journal):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    written = _text(journal)
    return Stopped(folder, task, process.returncode, stderr, written, invoke("optimize", task, "--out", folder, *OPTIONS))


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
