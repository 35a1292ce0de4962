"""``torch.nn.utils.prune``: zeros where weights are small; and training that keeps zeros."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as _prune

from cutting.common import Found, Work
from shohin.training import TrainConfig
from shohin.training.optimizer import MakeOptimizer, Named, make_optimizer

#: its functions carry no types
prune: Any = _prune


def weights(model: nn.Module) -> list[nn.Module]:
    """Layers whose weights are made sparse."""
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [weight for m in weights(model) if isinstance(weight := m.weight, Tensor)]


def share(model: nn.Module) -> float:
    """Of these layers' weights that are not zero."""
    held = _tensors(model)
    return sum(int(w.count_nonzero()) for w in held) / sum(w.numel() for w in held)


def magnitude(work: Work, everywhere: bool) -> Found:
    """``global_unstructured`` with L1, or ``l1_unstructured`` of each layer."""
    model = copy.deepcopy(work.model)
    began = time.process_time()
    layers = weights(model)
    if everywhere:
        prune.global_unstructured([(m, "weight") for m in layers], pruning_method=prune.L1Unstructured, amount=1 - work.budget)
    else:
        for m in layers:
            prune.l1_unstructured(m, "weight", amount=1 - work.budget)
    for m in layers:
        prune.remove(m, "weight")
    return Found(model.eval(), 0.0, time.process_time() - began)


def keeping_zeros(model: nn.Module, config: TrainConfig) -> MakeOptimizer:
    """The config's optimizer, which leaves zeros zero."""
    held = [(weight, weight != 0) for weight in _tensors(model)]

    def masked(*_: object) -> None:
        with torch.no_grad():
            for weight, mask in held:
                weight.mul_(mask)

    def make(named: Named) -> torch.optim.Optimizer:
        optimizer = make_optimizer(dict(named), config)
        optimizer.register_step_post_hook(masked)
        return optimizer

    return make
