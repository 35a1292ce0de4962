"""DOT: the teacher's gradient has a longer memory than the task's (Zhao et al., ICCV 2023, arXiv 2307.08436)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shohin.data import Call
from shohin.distillation.features import Features
from shohin.distillation.loss import Mix
from shohin.distillation.teacher import Teacher
from shohin.errors import DataError
from shohin.training import TrainConfig
from shohin.training.optimizer import Apart, MakeOptimizer, Named


class Dot(Apart):
    """SGD that keeps a momentum for the task, ``momentum - delta``, and a larger one for the teacher, ``momentum + delta`` (algorithm 1).

    ``v_task = (m - d) v_task + g_task + weight_decay * p``, ``v_teacher = (m + d) v_teacher + g_teacher``,
    ``p -= lr (v_task + v_teacher)``. With ``delta = 0`` it is `torch.optim.SGD` on the sum of both losses.

    In a loop of your own::

        optimizer = Dot(student.parameters(), lr=0.05)
        optimizer.zero_grad()
        optimizer.backward(task, teacher)  # two scalar losses of one graph, weighted as they shall count
        optimizer.clip(5.0)  # if you clip: torch's function would change one of the two gradients only
        optimizer.step()

    A step costs two backward passes through the student and one more gradient and momentum of its size. A parameter that only one of
    the losses reaches (an adapter) is better given in a group with ``delta=0``. Not supported, since the paper says nothing of it:
    adaptive optimizers (Adam), Nesterov, closures; nor sparse gradients and `torch.amp.GradScaler`.

    Args:
        params: parameters, or groups with their own ``lr``, ``momentum``, ``delta``, ``weight_decay``.
        lr: learning rate.
        momentum: m.
        delta: d, at least 0, with ``d <= m`` and ``m + d < 1``; its authors train with 0.075 on CIFAR-100 and 0.09 on ImageNet.
        weight_decay: L2, of the task's gradient.

    Raises:
        DataError: if a value is outside its range, or `step` is called without gradients from `backward`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.9, delta: float = 0.075, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        for group in self.param_groups:
            m, d = group["momentum"], group["delta"]
            if not (m >= d >= 0 and m + d < 1):
                raise DataError(f"Dot needs 0 <= delta <= momentum and momentum + delta < 1; got momentum={m}, delta={d}")
            if not (float(group["lr"]) >= 0 and group["weight_decay"] >= 0):
                raise DataError(f"Dot needs lr >= 0 and weight_decay >= 0; got {group['lr']} and {group['weight_decay']}")

    def clip(self, most: float) -> Tensor:
        """Shrinks both gradients by one factor, so that the global norm of their sum is at most ``most``; returns the norm it had."""
        own = self._own()
        norm = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(own, most, norm)
        with self.aside(own):
            torch.nn.utils.clip_grads_with_norm_(own, most, norm)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients of `backward`; a gradient that one of the losses lacks counts as zero."""
        if closure is not None:
            raise DataError("Dot takes no closure: call optimizer.backward(task, teacher), then optimizer.step()")
        if not self.part:
            raise DataError("Dot has no gradient of the teacher: call optimizer.backward(task, teacher) in place of loss.backward()")
        for group in self.param_groups:
            momentum, delta, decay, lr = group["momentum"], group["delta"], group["weight_decay"], float(group["lr"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise DataError(f"Dot does not take sparse gradients (a parameter of shape {tuple(p.shape)}): use sparse=False")
                teacher = self.part.get(p)
                task = p.grad if teacher is None else p.grad - teacher
                if decay:
                    task = task.add(p, alpha=decay)
                state = self.state[p]
                for key, gradient, own in (("task", task, momentum - delta), ("teacher", teacher, momentum + delta)):
                    if key not in state:
                        state[key] = torch.zeros_like(p)
                    state[key].mul_(own)
                    if gradient is not None:
                        state[key].add_(gradient)
                p.add_(state["task"] + state["teacher"], alpha=-lr)


def make_dot(config: TrainConfig, delta: float, adapted: bool = False) -> MakeOptimizer:
    """``optimizer=`` of `shohin.training.train`: `Dot` with a config's lr, momentum and weight decay (of two dimensions or more).

    Args:
        adapted: an `Adapted` student is trained; its adapters, which only the teacher's loss reaches, take the plain momentum.

    Raises:
        DataError: if the config asks for another optimizer than SGD.
    """
    if config.optimizer != "sgd":
        raise DataError(
            f"dot is a form of SGD with momentum, and the config asks for {config.optimizer!r}: give "
            "config=TrainConfig(optimizer='sgd', lr=...), whose learning rate is another than AdamW's"
        )

    def make(named: Named) -> Dot:
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in named:
            own = 0.0 if adapted and name.startswith("adapters.") else delta
            groups.setdefault((own, config.weight_decay if p.dim() > 1 else 0.0), []).append(p)
        made = [{"params": params, "delta": own, "weight_decay": decay} for (own, decay), params in groups.items()]
        return Dot(made, config.lr, config.momentum, delta)

    return make


def two_losses(
    mix: Mix, outputs: Any, features: Features, call: Call, teacher: Teacher, adapters: Mapping[str, nn.Module]
) -> tuple[Tensor, dict[str, float]]:
    """A `Mix` with 0 < alpha < 1 in two parts: weighted losses ``[2]`` of the task and of the teacher (answers and features), and each
    term by name. Raises DataError as the mix does."""
    if mix.task_loss is None:
        raise DataError("two losses apart need the task's: give task_loss=data.batch_loss")
    taught = replace(mix, alpha=0.0, task_loss=None, feature_weight=mix.feature_weight / (1 - mix.alpha))
    value, terms = taught(outputs, features, call, teacher, adapters)
    task = mix.task_loss(outputs, call)
    if task.numel() != 1:
        raise DataError(f"the term 'task' must be one number; got shape {tuple(task.shape)}")
    return torch.stack([mix.alpha * task.reshape(()), (1 - mix.alpha) * value]), {**terms, "task": task.item()}
