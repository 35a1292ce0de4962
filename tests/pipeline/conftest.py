"""One job, run once, that the tests of this folder look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pipeline_task as task
import pytest
import torch
from torch import nn

import shohin
from shohin.data import Data
from shohin.result import Result


class Finished:
    """A finished job with what was seen of the caller's world before and after it."""

    model: nn.Module
    data: Data
    result: Result
    before: dict[str, Any]
    after: dict[str, Any]


def world(model: nn.Module, data: Data) -> dict[str, Any]:
    """All that a job could change by mistake, as plain values."""
    generator: torch.Generator = data.train.generator  # type: ignore[union-attr,assignment]
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "gradients": [p.grad is not None for p in model.parameters()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        "loader": generator.get_state(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Timings that all jobs of these tests share: they are measured once, as for a user's second run."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOHIN_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The user's model is handed over in training mode, on two threads, with a loader that shuffles by its own generator."""
    done = Finished()
    done.model, done.data = task.trained(), task.data(256)
    done.data.train.generator = torch.Generator().manual_seed(99)  # type: ignore[union-attr]
    done.model.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        done.before = world(done.model, done.data)
        out = tmp_path_factory.mktemp("runs") / "watch"
        done.result = shohin.optimize(
            done.model, done.data, budget="latency <= 80 %, drop <= 0.05", out=out, seed=3, finalists=2, progress=False
        )
        done.after = world(done.model, done.data)
    finally:
        torch.set_num_threads(threads)
    done.model.eval()
    return done
