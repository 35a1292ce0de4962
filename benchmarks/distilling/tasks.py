"""What is taught: a trained teacher, students of fixed architectures, batches and steps."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from fashion_mnist import CACHE, Batches, fashion, views
from models import Block, ResNet
from shohin.data import Call
from shohin.run import write_atomic
from shohin.training import TrainConfig, train

sys.path.append(str(Path(__file__).parents[2] / "examples"))


@dataclass(frozen=True)
class Task:
    """One teacher and its students.

    Args:
        teacher: trained, in eval mode.
        students: name -> makes the untrained network.
        data: batches; the test split is for the last figure of a run alone.
        config: of every student's training, but for the seed.
        classes: number of them.
    """

    name: str
    teacher: Callable[[], nn.Module]
    students: dict[str, Callable[[], nn.Module]]
    data: Callable[[], shohin.Data]
    config: TrainConfig
    classes: int


def task_loss(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Plain training: cross-entropy with the labels."""
    loss = F.cross_entropy(model(*call.args).float(), call.target)
    return loss, {"task": loss.item()}


#: views of each training image; the teacher answers each once
VIEWS = 4
TEACHER = TrainConfig(epochs=24, lr=3e-3, weight_decay=0.05, ema=0.999, precision="bfloat16")


@cache
def fashion_data(count: int = VIEWS) -> shohin.Data:
    """Shuffled views of the training images; validation and test as they are."""
    splits = fashion()
    x, y = splits["train"]
    whole = {split: Batches(images[None], labels, 500) for split, (images, labels) in splits.items()}
    return shohin.Data(train=Batches(views(x, count), y, shuffle=True), validation=whole["validation"], test=whole["test"])


def fashion_teacher() -> nn.Module:
    """About 700 thousand parameters; trained once by this file's code, in about twenty minutes."""
    code = "".join(inspect.getsource(part) for part in (Block, ResNet, fashion, views, Batches, task_loss))
    key = hashlib.sha256(f"{code}{TEACHER}{torch.__version__}".encode()).hexdigest()[:12]
    path = CACHE / f"fashion-teacher-{key}.safetensors"
    torch.manual_seed(0)
    model = ResNet((32, 64, 128))
    if path.exists():
        model.load_state_dict(load_file(str(path)))
        return model.eval()
    print("training the teacher of Fashion-MNIST (about twenty minutes on one core)", flush=True)
    data = fashion_data(4 * VIEWS)
    train(model.to(memory_format=torch.channels_last), data, task_loss, TEACHER, evaluate=data.quality, progress=True)
    write_atomic(path, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    return model.to(memory_format=torch.contiguous_format).eval()


def fashion_cut() -> nn.Module:
    """The teacher at a quarter of its multiplications, by a plan, its layers refitted; not trained."""
    return shohin.prune(fashion_teacher(), fashion_data(), keep=0.25).model


FASHION = Task(
    "fashion",
    fashion_teacher,
    {"1/20": lambda: ResNet((10, 20, 42), 1), "1/100": lambda: ResNet((5, 9, 18), 1)},
    fashion_data,
    TrainConfig(epochs=8, lr=2e-2, weight_decay=0.02),
    10,
)
#: a student that came from a plan, for few epochs
CUT = Task(
    "fashion cut", fashion_teacher, {"1/4 of MACs": fashion_cut}, fashion_data, TrainConfig(epochs=3, lr=1e-2, weight_decay=0.02), 10
)


def _watch() -> Any:
    import smartwatch

    return smartwatch


WATCH = Task(
    "smartwatch",
    lambda: _watch().baseline(_watch().load_data(), 0, CACHE),
    {"1/20": lambda: _watch().WatchNet((18, 24, 30), 1), "1/100": lambda: _watch().WatchNet((8, 10, 12), 1)},
    lambda: _watch().load_data(),
    TrainConfig(epochs=16, lr=2e-3, weight_decay=0.02),
    7,
)

TASKS = {task.name: task for task in (FASHION, CUT, WATCH)}
