"""Files that are narrowed from one export: the same as files lowered in full, or none."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import small_models as models
from shohin.graph import Graph
from shohin.pipeline.formats import integer_operations
from shohin.pipeline.ship import lower_for_timing
from shohin.pipeline.timing import group_counts, plan_of, program_of, skipped_nodes
from shohin.planning.choice import Choice
from shohin.planning.latency import random_choices
from shohin.program import fold
from shohin.quantization import quantizable
from shohin.surgery import understand
from shohin.targets import Prepared, Target, get_target
from shohin.targets.onnxruntime.inspect import counts
from shohin.targets.onnxruntime.session import Runner

torch.set_num_threads(1)


class Shuffled(nn.Module):
    """Padding, a concatenation whose halves are told apart again, and slices of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
        self.d, self.head = nn.Conv2d(8, 8, 1), nn.Linear(14 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(F.pad(x, (0, 1, 0, 1))))
        both = torch.cat([self.d(F.relu(self.b(a))), F.relu(self.c(a))], 1)
        u, v = both.split([8, 6], 1)
        return self.head(torch.cat([torch.sigmoid(v), u * 2.0], 1).flatten(1))


#: name -> model, shape of a sample
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual 1-d": (models.Residual1d, (2, 16)),
    "mobile with squeeze-excite": (models.MobileNet, (3, 16, 16)),
    "vision transformer": (lambda: models.ViT(), (3, 8, 8)),
    "chunks": (models.Chunks, (3, 8, 8)),
    "flatten": (models.Flatten, (3, 8, 8)),
    "concat and split": (Shuffled, (3, 8, 8)),
}


def prepared(case: str) -> tuple[Graph, Target, Prepared, Tensor]:
    make, shape = CASES[case]
    torch.manual_seed(0)
    model, x = models.lively(make()).float(), torch.randn(1, *shape)
    graph, target = understand(model, (x,)), get_target("onnxruntime")
    made = target.prepare(fold(graph.program).program, (x,))
    assert made is not None
    return graph, target, made, x


def some_choices(graph: Graph, n: int, seed: int) -> list[Choice]:
    int8 = integer_operations(graph.program, set(quantizable(graph.program)))
    return random_choices(
        group_counts(graph, 1), n, seed, regions=[r.name for r in graph.regions if r.residual], precisions=[frozenset(), int8]
    )


@pytest.mark.parametrize("case", CASES)
def test_narrowed_file_is_the_fully_lowered_one(case: str, tmp_path: Path) -> None:
    graph, target, made, x = prepared(case)
    choices = some_choices(graph, 4, 1)
    sample = [*[c for c in choices if c.skipped][:1], choices[9 if list(CASES).index(case) % 2 else 3]]
    again = torch.randn(3, *x.shape[1:])
    for choice in sample:
        plan = plan_of(graph, choice)
        program, skips = program_of(graph, plan), skipped_nodes(graph, plan)
        assert len(skips) == len(choice.skipped)
        fast, full = tmp_path / "fast.onnx", tmp_path / "full.onnx"
        assert lower_for_timing(target, program, choice.int8, fast, (x,), {}, made, skips), choice
        assert not lower_for_timing(target, program, choice.int8, full, (x,), {})
        assert counts(target.inspect(fast)) == counts(target.inspect(full))
        a, b = Runner(fast)(again), Runner(full)(again)
        assert a.shape == (3, *b.shape[1:]) and float(b.abs().max()) > 0
        if choice.int8:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        assert abs(fast.stat().st_size - full.stat().st_size) < 0.1 * full.stat().st_size + 2000


def test_all_choices_of_a_net_are_narrowed_and_fit_the_plan(tmp_path: Path) -> None:
    graph, target, made, x = prepared("mobile with squeeze-excite")
    for choice in some_choices(graph, 8, 5):
        plan = plan_of(graph, choice)
        program = program_of(graph, plan)
        path = tmp_path / "m.onnx"
        assert lower_for_timing(target, program, choice.int8, path, (x,), {}, made, skipped_nodes(graph, plan))
        if choice.int8:
            continue
        held = {i.name: tuple(i.dims) for i in onnx.load(str(path)).graph.initializer}
        shapes = {name: tuple(t.shape) for name, t in fold(program).program.tensors.items()}
        assert shapes == {name: held[name] for name in shapes}


def test_latency_is_that_of_the_fully_lowered_file(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.fc = nn.Conv1d(6, 48, 5), nn.Conv1d(48, 64, 3), nn.Conv1d(64, 64, 3, padding=1), nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.b(F.relu(self.a(x))))
            return self.fc(F.relu(self.c(x) + x).mean(-1))

    torch.manual_seed(0)
    model, x = Wide().eval(), torch.randn(1, 6, 100)
    graph, target = understand(model, (x,)), get_target("onnxruntime")
    made = target.prepare(fold(graph.program).program, (x,))
    files = {}
    choices = random_choices(
        group_counts(graph, 8), 1, 3, precisions=[frozenset(), integer_operations(graph.program, set(quantizable(graph.program)))]
    )
    for i, choice in enumerate((choices[2], choices[5])):
        program = program_of(graph, plan_of(graph, choice))
        for name, given in (("fast", made), ("full", None)):
            files[f"{name}{i}"] = tmp_path / f"{name}{i}.onnx"
            assert lower_for_timing(target, program, choice.int8, files[f"{name}{i}"], (x,), {}, given) == (given is not None)
    for attempt in itertools.count():  # a busy machine may disturb one measurement, not three
        times = {name: timing.value for name, timing in target.measure(files, (x,), seed=attempt).items()}
        worst = max(abs(times[f"fast{i}"] / times[f"full{i}"] - 1) for i in (0, 1))
        if worst < 0.05:
            break
        assert attempt < 2, times
