"""Processor seconds of a block of code, and by how much it raised the process's peak of memory. It imports nothing of Shohin."""

import time
from pathlib import Path
from types import TracebackType


class Costs:
    """``with Costs() as costs: ...``, then ``costs.seconds`` and ``costs.megabytes``. Linux alone knows the second."""

    seconds = 0.0
    megabytes = float("nan")

    def __enter__(self) -> "Costs":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._resident, self._began = _status("VmRSS"), time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.seconds = time.process_time() - self._began
        self.megabytes = (_status("VmHWM") - self._resident) / 1024


def _status(name: str) -> int:
    """Kilobytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
