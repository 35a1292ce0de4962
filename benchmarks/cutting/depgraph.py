"""Torch-Pruning: global pruning as its README shows, at the pruning ratio that just meets the budget.

DepGraph (Fang et al. 2023, arXiv 2301.12900), Taylor importance (Molchanov et al. 2019, arXiv 1906.10771), isomorphic ranking (Fang et
al. 2024, arXiv 2407.04616).
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from cutting.common import Found, Unreachable, Work, head, quick_macs
from distilling.tasks import task_loss
from shohin.training import train
from shohin.training.optimizer import Named, make_optimizer

#: halvings of the interval of pruning ratios: finer than one channel of each network here
HALVINGS = 11
#: of the group regularization, as in its own reproduction scripts; steps of iterative pruning to nine tenths of the channels
REGULARIZATION, STEPS = 5e-4, 100


def accumulate(model: nn.Module, work: Work) -> None:
    """Gradients of the loss on the samples, in eval mode, into ``.grad``."""
    model.eval().zero_grad()
    for call in work.calls:
        (work.data.batch_loss(model(*call.args), call) * call.size).backward()  # type: ignore[no-untyped-call]


def _copied(model: nn.Module) -> nn.Module:
    """With gradients, which a copy of a parameter leaves behind."""
    made = copy.deepcopy(model)
    for new, old in zip(made.parameters(), model.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return made


def pruner(model: nn.Module, work: Work, importance: Any, ratio: float, kind: str = "BasePruner", **options: Any) -> Any:
    """Its pruner over ``model``, which it will change: global, the classifier left out."""
    tp: Any = import_module("torch_pruning")

    return getattr(tp.pruner, kind)(
        model,
        work.example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[head(model)],
        # its defaults, fresh: it fills the shared ones
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **options,
    )


def searched(make: Callable[[float], nn.Module], work: Work) -> tuple[nn.Module, float, float]:
    """The model of the smallest pruning ratio within the budget, that ratio, and the seconds of that one cut.

    Raises:
        Unreachable: if no ratio tried meets the budget.
    """
    allowed = work.budget * quick_macs(work.model, work.example)
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        began = time.process_time()
        model = make(ratio)
        seconds = time.process_time() - began
        try:
            fits = quick_macs(model, work.example) <= allowed
        except RuntimeError:  # a layer without channels
            fits, model = True, None  # type: ignore[assignment]
        if fits:
            high = ratio
            best = (model, ratio, seconds) if model is not None else best
        else:
            low = ratio
    if best is None:
        raise Unreachable("no pruning ratio meets the budget")
    return best


def one_shot(work: Work, importance: str, **options: Any) -> Found:
    """One step of global pruning.

    Args:
        importance: "magnitude" or "taylor".
        options: of its pruner: ``isomorphic``, ``round_to``.
    """
    began = time.process_time()
    scored = copy.deepcopy(work.model)
    if importance == "taylor":
        accumulate(scored, work)
    seconds = time.process_time() - began

    def make(ratio: float) -> nn.Module:
        model = _copied(scored)
        with quiet():
            pruner(model, work, importance_of(importance), ratio, **options).step()
        return model

    model, ratio, cut = searched(make, work)
    model.zero_grad()
    return Found(model.eval(), seconds, cut, notes={"ratio": ratio})


def iterative(work: Work, **options: Any) -> Found:
    """Taylor importance computed anew before each of many small steps, until the budget is met."""
    allowed = work.budget * quick_macs(work.model, work.example)
    model = copy.deepcopy(work.model)
    score = cut = 0.0
    with quiet():
        began = time.process_time()
        made = pruner(model, work, importance_of("taylor"), 0.9, iterative_steps=STEPS, **options)
        cut += time.process_time() - began
        for step in range(STEPS):
            began = time.process_time()
            accumulate(model, work)
            scored = time.process_time()
            made.step()
            score, cut = score + scored - began, cut + time.process_time() - scored
            if quick_macs(model, work.example) <= allowed:
                model.zero_grad()
                return Found(model.eval(), score, cut, notes={"steps": step + 1})
    raise Unreachable("nine tenths of the channels do not meet the budget")


def group_norm(work: Work) -> Found:
    """Its GroupNorm pruner: group regularization for half of the short training, before the cut; the other half is left for after it."""
    epochs = work.original.short.epochs // 2
    began = time.process_time()
    model = copy.deepcopy(work.model)
    with quiet():
        made = pruner(model, work, importance_of("magnitude"), 0.5, "GroupNormPruner", reg=REGULARIZATION)

    def regularized(named: Named) -> torch.optim.Optimizer:
        optimizer = make_optimizer(dict(named), work.original.short)
        optimizer.register_step_pre_hook(lambda *_: made.regularize(model))
        return optimizer

    config = replace(work.original.short, epochs=epochs, seed=work.seed)
    result = train(model, work.data, task_loss, config, optimizer=regularized)
    seconds = time.process_time() - began

    def cut(ratio: float) -> nn.Module:
        copied = copy.deepcopy(model)
        with quiet():
            pruner(copied, work, importance_of("magnitude"), ratio, "GroupNormPruner").step()
        return copied

    found, ratio, last = searched(cut, work)
    notes = {"ratio": ratio, "steps_before": sum(epoch.steps for epoch in result.history)}
    return Found(found.eval(), seconds, last, epochs=epochs, notes=notes)


def importance_of(name: str) -> Any:
    """Its importance of a group: "taylor", or "magnitude" with L2."""
    tp: Any = import_module("torch_pruning")

    return tp.importance.GroupTaylorImportance() if name == "taylor" else tp.importance.GroupMagnitudeImportance(p=2)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of its tracing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
