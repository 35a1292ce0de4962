"""The trained networks that are cut: a ResNet-20-like and a MobileNetV2-like on Fashion-MNIST, the smartwatch CNN."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

import shohin
from distilling.tasks import WATCH, fashion_data, task_loss
from fashion_mnist import CACHE, Batches, fashion, views
from models import Block, Inverted, MobileNetV2, ResNet
from shohin.run import write_atomic
from shohin.training import TrainConfig, train

#: of the originals on Fashion-MNIST
TRAINING = TrainConfig(epochs=12, lr=5e-3, weight_decay=0.05, ema=0.999, precision="bfloat16")


@dataclass(frozen=True)
class Original:
    """A trained network and its data; the test split is for the last figure of a run alone.

    Args:
        model: trained, in eval mode.
        data: batches.
        short: the training after a cut, the same for each method.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], shohin.Data]
    short: TrainConfig


def _trained(make: Callable[[], nn.Module], name: str) -> nn.Module:
    """Trained once by this file's code, in about fifteen minutes on one core."""
    code = "".join(inspect.getsource(part) for part in (Block, ResNet, Inverted, MobileNetV2, fashion, views, Batches, task_loss))
    key = hashlib.sha256(f"{name}{code}{TRAINING}{torch.__version__}".encode()).hexdigest()[:12]
    path = CACHE / f"{name}-{key}.safetensors"
    torch.manual_seed(0)
    model = make()
    if path.exists():
        model.load_state_dict(load_file(str(path)))
        return model.eval()
    print(f"training {name} on Fashion-MNIST (about fifteen minutes on one core)", file=sys.stderr, flush=True)
    data = fashion_data()
    train(model.to(memory_format=torch.channels_last), data, task_loss, TRAINING, evaluate=data.quality)
    write_atomic(path, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    return model.to(memory_format=torch.contiguous_format).eval()


SHORT = TrainConfig(epochs=2, lr=2e-3, weight_decay=0.02)
ORIGINALS = {
    o.name: o
    for o in (
        Original("resnet20", lambda: _trained(lambda: ResNet((16, 32, 64), 3), "resnet20"), fashion_data, SHORT),
        Original("mobilenetv2", lambda: _trained(MobileNetV2, "mobilenetv2"), fashion_data, SHORT),
        Original("smartwatch", WATCH.teacher, WATCH.data, TrainConfig(epochs=8, lr=2e-3, weight_decay=0.02)),
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or ORIGINALS:
        original = ORIGINALS[wanted]
        model = original.model()
        print(
            wanted, Path(CACHE).name, sum(p.numel() for p in model.parameters()), original.data().quality(model, "validation"), flush=True
        )
