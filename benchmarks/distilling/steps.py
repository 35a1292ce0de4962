"""Time of an optimizer step: plain training, and distillation with and without remembered answers.

``python benchmarks/distilling/steps.py [--rounds 15] [--steps 24] [--batch 128]``; one thread, all variants in turn in one process.
Milliseconds are processor time of that thread, so that other processes disturb less. A pass from disk begins with a fresh `Teacher`, which opens
its folder and reads every file once; what is read lies in the system's page cache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from distilling.tasks import FASHION  # noqa: I001
from models import ResNet

from shohin.data import Call, Data
from shohin.distillation import Teacher, distillation_objective
from shohin.training import Objective, TrainConfig, train

TEACHER = ((32, 64, 128), 2)
#: a step may take so much of what it is compared with
PROMISE = 1.10


class Shuffled:
    """Batches of random images in a new order each time, with the moments at which they were asked for."""

    def __init__(self, batch: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch * steps, 1, 28, 28, generator=generator)
        self.y = torch.randint(0, 10, (batch * steps,), generator=generator)
        self.batch, self.moments = batch, list[float]()

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.moments = []
        for index in torch.randperm(len(self.x)).split(self.batch):
            self.moments.append(time.thread_time())
            yield self.x.index_select(0, index), self.y.index_select(0, index)
        self.moments.append(time.thread_time())

    @property
    def step(self) -> float:
        """Milliseconds for each batch of the last pass, from the first request to the end of the last step."""
        return (self.moments[-1] - self.moments[0]) / (len(self.moments) - 1) * 1e3


def task(data: Data) -> Objective:
    """Plain training."""

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss = data.batch_loss(model(*call.args), call)
        return loss, {"task": loss.item()}

    return objective


def variants(student: nn.Module, teacher: nn.Module, batches: Shuffled, folder: Path) -> dict[str, Callable[[int], float]]:
    """``round -> milliseconds for a step`` by name. Each trains a copy of the student on; answers are known where they are remembered."""
    data = Data(train=batches)
    memory = Teacher(teacher)
    for call in data.calls("train"):
        memory(call)
        Teacher(teacher, folder=folder, cache_bytes=0)(call)

    def training(make: Callable[[], Objective]) -> Callable[[int], float]:
        own = copy.deepcopy(student)

        def once(round_: int) -> float:
            train(own, data, make(), TrainConfig(epochs=1, seed=round_))
            return batches.step

        return once

    def answering(round_: int) -> float:
        teacher.eval()
        with torch.inference_mode():
            for x, _ in batches:
                teacher(x)
        return batches.step

    def remembered() -> Objective:
        if memory.hits and memory.misses != len(batches.x):
            raise SystemExit(f"answers were not remembered: {memory.misses} computed")
        return distillation_objective(memory)

    return {
        "plain": training(lambda: task(data)),
        "teacher": answering,
        "memory": training(remembered),
        "disk": training(lambda: distillation_objective(Teacher(teacher, folder=folder))),
        "disk, no memory": training(lambda: distillation_objective(Teacher(teacher, cache_bytes=0, folder=folder))),
        "uncached": training(lambda: distillation_objective(Teacher(teacher, cache_bytes=0))),
    }


def measured(timed: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds by variant and round, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(-1, rounds):
        for name, once in timed.items():
            found = once(round_ + 1)
            if round_ >= 0:
                times[name].append(found)
    return times


def ratio(ours: Sequence[float], other: Sequence[float]) -> str:
    """Median of the ratios of each round, with their quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, other, strict=True)], n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Prints a table for each student."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 15), ("steps", 24), ("batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher, batches = ResNet(*TEACHER), Shuffled(settings.batch, settings.steps)
    for size, make in FASHION.students.items():
        with tempfile.TemporaryDirectory() as folder:
            times = measured(variants(student := make(), teacher, batches, Path(folder)), settings.rounds)
        both = [a + b for a, b in zip(times["plain"], times["teacher"], strict=True)]
        parameters = sum(p.numel() for p in student.parameters())
        print(f"student of {size} ({parameters} parameters), teacher {TEACHER}, batch {settings.batch}")
        for name, found in times.items():
            against = "" if name in ("plain", "teacher") else f"{ratio(found, both if name == 'uncached' else times['plain'])} of "
            told = f"{against}{'plain + teacher' if name == 'uncached' else 'plain'} (promised {PROMISE:.2f})" if against else ""
            print(f"  {name:16} {statistics.median(found):8.2f} ms  {told}")


if __name__ == "__main__":
    main()
