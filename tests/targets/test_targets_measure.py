"""Timing and memory: work shows, runs repeat, conditions are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import target_nets as nets
import torch

from shohin.candidate import Measurement
from shohin.errors import TargetError
from shohin.targets import get_target, timing
from shohin.targets.measure import measure, measure_in_processes, peak_memory, resized

torch.set_num_threads(1)
X = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    out = {}
    for name, width in (("small", 16), ("large", 48)):
        out[name] = get_target("onnxruntime").lower(nets.randomize(nets.Residual2d(width=width), 0), (X,), folder / f"{name}.onnx").path
    return out


def test_more_work_takes_longer_and_runs_repeat(files: dict[str, Path]) -> None:
    first, second = (measure("onnxruntime", files, (X,), batch=1, seed=seed) for seed in (0, 1))
    ratio, again = (run["large"].value / run["small"].value for run in (first, second))
    assert 2.5 < ratio < 12  # the convolutions do 9x the work, other nodes less
    assert ratio == pytest.approx(again, rel=0.25)  # of one interleaving; between two the processor itself may change its pace
    for name in files:
        assert 0 <= first[name].spread < 0.5
        conditions = first[name].conditions
        assert conditions["batch"] == 1 and conditions["threads"] == 1 and conditions["clock"] == "thread CPU time"
        assert conditions["rounds"] >= 200 and conditions["runs_per_round"] >= 1
        assert Measurement.from_json(json.loads(json.dumps(first[name].measurement().to_json()))).value == first[name].value


def test_the_same_file_twice_is_equally_fast(files: dict[str, Path]) -> None:
    found = measure("onnxruntime", {"a": files["small"], "b": files["small"]}, (X,))
    assert found["a"].value == pytest.approx(found["b"].value, rel=0.1)


def test_batch_and_threads_are_conditions(files: dict[str, Path]) -> None:
    target = get_target("onnxruntime", batch=4)
    four, one = target.measure(files, (X,), rounds=100), get_target("onnxruntime").measure(files, (X,), rounds=100)
    assert four["large"].value > 2 * one["large"].value and four["large"].conditions["inputs"] == [[4, 3, 24, 24]]
    wall = measure("onnxruntime", {"small": files["small"]}, (X,), threads=2, rounds=20)["small"]
    assert wall.conditions["clock"].startswith("wall time") and "wall time" in wall.how


def test_processes_give_ratios(files: dict[str, Path]) -> None:
    found = measure_in_processes("onnxruntime", files, (X,), processes=3, rounds=100, batch=1, reference="small")
    assert found["small"].ratio == found["small"].low == found["small"].high == 1.0
    large = found["large"]
    assert large.low <= large.ratio <= large.high and 2.5 < large.ratio < 12
    assert large.timing.conditions["processes"] == 3
    here = measure("onnxruntime", files, (X,), batch=1)
    assert large.timing.value == pytest.approx(here["large"].value, rel=0.3)
    json.dumps(large.to_json())
    with pytest.raises(TargetError, match="reference 'none'"):
        measure_in_processes("onnxruntime", files, (X,), reference="none")


def test_memory_repeats_and_grows(tmp_path: Path) -> None:
    files = {}
    for name, width in (("small", 64), ("large", 1024)):
        module = nets.randomize(torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width)), 0)
        files[name] = get_target("onnxruntime").lower(module, (torch.randn(2, 64),), tmp_path / f"{name}.onnx").path
    first, second = (peak_memory("onnxruntime", files["large"], (torch.randn(2, 64),)) for _ in range(2))
    small = peak_memory("onnxruntime", files["small"], (torch.randn(2, 64),))
    assert first.value == pytest.approx(second.value, rel=0.1) and first.spread is not None and first.spread < 0.2
    assert first.value > 4 * 1024 * 1024 > small.value > 0  # at least its 4 MiB of weights


def test_loop_and_statistics() -> None:
    calls = [0, 0]

    def work(index: int, size: int) -> object:
        calls[index] += 1
        return np.ones((size, size)) @ np.ones((size, size))

    slices, inner = timing.interleave([lambda: work(0, 8), lambda: work(1, 160)], rounds=50, seed=0)
    assert slices.shape == (2, 50) and inner[0] > inner[1] >= 1
    assert calls[0] == 50 * (inner[0] + 1) + 6 and bool((slices > 0).all())
    assert timing.statistic(slices[1]) > timing.statistic(slices[0])
    assert timing.statistic(np.array([5.0, 1.0, 3.0, 2.0])) == 2.0
    assert timing.spread(np.array([1.0, 1, 1, 9, 2, 2, 2, 9])) == 1.0


def test_example_is_cut_and_repeated() -> None:
    ((x,), kwargs) = resized((torch.arange(6.0).reshape(3, 2),), {"m": torch.arange(3), "t": torch.zeros(5), "n": 2}, 4)
    assert x[:, 0].tolist() == [0, 2, 4, 0] and kwargs["m"].tolist() == [0, 1, 2, 0] and kwargs["t"].shape == (5,) and kwargs["n"] == 2
    ((y,), _) = resized((torch.zeros(3, 2),), None, 1)
    assert y.shape == (1, 2)


def test_unusable_files_are_reported(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no file was given"):
        measure("onnxruntime", {}, (X,))
    with pytest.raises(TargetError, match="there is no file"):
        measure("onnxruntime", {"a": tmp_path / "a.onnx"}, (X,))
    with pytest.raises(TargetError, match="needs the arguments x"):
        measure("onnxruntime", files, ())
