"""What a job returns: baseline, front, best, and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shohin.candidate import Candidate


@dataclass
class Result:
    """The result of a job, finished or interrupted.

    Args:
        folder: the run folder.
        best: the candidate that keeps the budget best; the baseline if nothing beats it.
        baseline: the unchanged model on the target.
        front: candidates that no other beats on both quality and latency, fastest first.
        candidates: all that were finished, by name.
        notes: "reasons" (sentences), "unmet" (constraints that could not be met), "finished" (False if interrupted).
    """

    folder: Path
    best: Candidate
    baseline: Candidate
    front: list[Candidate]
    candidates: dict[str, Candidate]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """True if the job was finished and ``best`` keeps the budget."""
        return bool(self.notes.get("finished", True)) and not self.notes.get("unmet")

    def report(self) -> Path:
        """Writes ``report.html`` and ``model_card.md`` into the run folder; returns the page's path."""
        from shohin.report import collect, model_card, render
        from shohin.run import Run

        data = collect(Run(self.folder))
        model_card(data, self.folder / "model_card.md")
        return render(data, self.folder / "report.html")

    def __repr__(self) -> str:
        lines = [f"Result in {self.folder}: best {self.best.name}, {len(self.candidates)} candidates"]
        for c in [self.baseline, *self.front]:
            v = c.metrics.values()
            lines.append(f"  {c.name:<14}" + "".join(f" {k}={v[k]:.4g}" for k in ("quality", "latency_ms", "size_bytes") if k in v))
        return "\n".join(lines)
