"""Limits on time, and the memory that a step takes beyond what was there."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class Late(BaseException):
    """The time is up; not an Exception, so that what is timed does not swallow it."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raises Late in this thread after so many seconds of processor time, which what else runs on the machine does not use up."""

    def late(*_: Any) -> None:
        raise Late(f"more than {seconds} seconds of processor time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def peaks(steps: Callable[[Callable[[str], None]], None], seconds: int) -> dict[str, float]:
    """Peak anonymous resident memory of steps beyond what was resident before, in MB, measured in a fork of this process (Linux).

    Pages of files do not count: a fork maps those of libraries anew, which is no memory that the steps take.

    Args:
        steps: is called with a function that notes the peak since the start under a name.
        seconds: after which the fork is given up.

    Returns:
        What was noted until the end, the error or the limit; {} where the system cannot reset the peak.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(steps, sender, seconds), daemon=False)
    process.start()
    sender.close()
    found: dict[str, float] = {}
    with suppress(EOFError):
        while receiver.poll(5 * seconds):
            name, peak = receiver.recv()
            found[name] = peak
    process.kill()
    process.join()
    return found


def _measured(steps: Callable[[Callable[[str], None]], None], pipe: Any, seconds: int) -> None:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
    start = _status("RssAnon")
    with suppress(Exception, Late), limit(seconds):
        steps(lambda name: pipe.send((name, round((_status("VmHWM") - _status("RssFile") - start) / 1024, 1))))
    pipe.close()


def _status(key: str) -> int:
    """A line of the process's status, in KB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1])
