"""A progress bar on the terminal; silence elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class TrainingBar:
    """Epoch, loss, validation value and time left. Does nothing if it is not shown or standard error is not a terminal.

    Args:
        epochs: of the whole training.
        shown: False is silence.
        title: the first word of the line.
    """

    def __init__(self, epochs: int, shown: bool, title: str = "training") -> None:
        self._epochs = epochs
        self._bar: Any = None
        self._task: Any = None
        if not shown:
            return
        from rich.console import Console

        console = Console(stderr=True)
        if not console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        bar = Progress(*columns, console=console, transient=True)
        self._bar = bar
        self._task = bar.add_task(title, total=float(max(epochs, 1)), note="")

    def show(self, epoch: int, within: float, loss: float | None, quality: float | None) -> None:
        """Moves the bar to ``epoch + within`` (within in [0, 1])."""
        if self._bar is None:
            return
        note = f"epoch {epoch + 1}/{self._epochs}"
        note += "" if loss is None else f"  loss {loss:.4g}"
        note += "" if quality is None else f"  best {quality:.4g}"
        self._bar.update(self._task, completed=epoch + within, note=note)

    def __enter__(self) -> TrainingBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
