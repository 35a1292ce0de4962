"""What several verbs do with a model, its data and a seed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shohin.candidate import Measurement, Metrics
from shohin.data import Call, Data
from shohin.errors import DataError, PlanError, RunError
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.surgery import Parts
from shohin.surgery import understand as _understand
from shohin.training.randomness import generators_of, isolated, mix, seed_everything

#: graphs of models that `understand` has seen, so that `cut(model, plan)` needs no example again
GRAPHS: weakref.WeakKeyDictionary[nn.Module, Graph | Parts] = weakref.WeakKeyDictionary()


def whole(model: nn.Module, example: Any) -> Graph:
    """The graph of a model that must be captured as a whole."""
    graph = _understand(model, as_call(example))
    GRAPHS[model] = graph
    return graph


def as_call(example: Any) -> Any:
    """Arguments of one call: of a tensor, a tuple, or the first batch of a `Data`."""
    if isinstance(example, Data):
        with seeded(example, 0):
            return example.example()
    return (example,) if isinstance(example, Tensor) else example


@contextmanager
def seeded(data: Data, seed: int) -> Iterator[None]:
    """Inside, everything random, the loaders' order too, comes from the seed; afterwards it is as before. Gradients can be taken inside,
    wherever the verb was called.
    """
    generators = generators_of(data.train, data.validation)
    with isolated(generators), torch.inference_mode(False), torch.enable_grad():
        seed_everything(mix(seed), generators)
        yield


def checked(data: Any) -> Data:
    """The user's data. Raises DataError for anything else."""
    if not isinstance(data, Data):
        raise DataError(
            f"data must be a shohin.Data, not {type(data).__name__}: write shohin.Data(train=loader) or shohin.Data(example=(x,))"
        )
    return data


def calibration(data: Data, seed: int, samples: int = 256) -> list[Call]:
    """The first training batches, the same for every verb with this seed."""
    with seeded(data, seed):  # whatever was drawn before
        return list(data.calls("train", samples))


def static_metrics(graph: Graph, plan: Plan, model: nn.Module) -> Metrics:
    """What is counted, not measured, of a cut model."""
    how = "estimated: counted from shapes"
    params = float(sum(p.numel() for p in model.parameters()))
    return Metrics(macs=Measurement(graph.macs(plan), how + ", one sample"), params=Measurement(params, how))


def checked_folder(out: Any) -> None:
    """Raises RunError before the work if there is a file where the folder should be."""
    if not isinstance(out, (str, Path)):
        raise RunError(f"out is a folder, not {type(out).__name__}")
    found = next((p for p in (Path(out), *Path(out).parents) if p.exists()), None)
    if found is not None and not found.is_dir():
        raise RunError(f"out={str(out)!r} should be a folder, but {found} is a file: give another folder")


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises PlanError for an option that is not known."""
    if value not in allowed:
        raise PlanError(f"{name}={value!r} is not known; one of {', '.join(map(repr, allowed))}")
