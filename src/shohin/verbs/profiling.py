"""`shohin.profile`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from shohin.budget import Budget
from shohin.data import Data
from shohin.graph import Graph
from shohin.graph.describe import layer_details
from shohin.graph.memory import Memory, memory
from shohin.targets import Target, get_target
from shohin.verbs.common import checked, seeded, whole


@dataclass(frozen=True)
class Profile:
    """A table of layers with measured milliseconds. ``str`` gives it with groups, regions and what is frozen, in 100 columns.

    Args:
        rows: ``{"address", "kind", "inputs", "output", "macs", "params", "bytes", "moved", "intensity", "ms_before", "format"}``
            for each operation that costs time: shapes ("B" is the batch), bytes of the weights, bytes read and written for
            one sample, MACs per byte.
        total_ms: measured time of the whole model.
        error: median leave-one-out error of the attribution's latency model.
        repeatability: of the timings.
        graph: groups, regions, frozen.
        environment: CPU, instruction sets, versions, threads.
        memory: of the activations of one sample in float32, in program order, elementwise operations writing over their
            arguments.
    """

    rows: list[dict[str, Any]]
    total_ms: float
    error: float
    repeatability: float
    graph: Graph
    environment: dict[str, Any] = field(default_factory=dict)
    memory: Memory | None = None

    def __str__(self) -> str:
        from shohin.report.profile_text import profile_text

        return profile_text(self)


def profile(model: nn.Module, data: Data, target: str | Target = "onnxruntime", *, seed: int = 0) -> Profile:
    """Layers with shapes, MACs, bytes and measured milliseconds (attributed by a regression on whole-model timings).

    An example is enough: ``Data(example=(x,))``.

    Raises:
        ModelError, TargetError: if the model cannot be captured or lowered.
    """
    import tempfile

    from shohin.pipeline.formats import MAIN, precisions
    from shohin.pipeline.job import Job
    from shohin.pipeline.timing import profile as profile_
    from shohin.run import Run

    goal = get_target(target)
    with seeded(checked(data), seed), tempfile.TemporaryDirectory(prefix="shohin-") as folder, Run(folder, {"version": 1}) as run:
        graph = whole(model, data)
        job = Job(run, model, data, goal, Budget(), seed, graph, None, frozenset(("quantize", "skip")), False)
        run.append("precisions", "", {name: 0.0 for name in precisions(job) if name in MAIN})  # times need no losses
        profile_(job, lambda: None)
        found = (run.find("profile") or {})["data"]
    details = layer_details(graph)
    rows = [{**row, **details.get(row["address"], {})} for row in found["layers"]]
    error = found["leave_one_out"]["median"]
    return Profile(rows, found["ms"][0], error, found["repeatability"], graph, found["environment"], memory(graph, reuse=True))
