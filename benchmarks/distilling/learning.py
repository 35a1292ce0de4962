"""One student by one method: the same initial weights, batches, optimizer and steps for each."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from distilling.summary import FRESH, OURS, PLAIN
from distilling.tasks import Task, task_loss
from fashion_mnist import CACHE
from shohin.data import Call
from shohin.distillation import Teacher
from shohin.training import Objective, train

#: plain training of fresh weights of the same shape, this many times as long
SCRATCH, LONGER = "scratch x3", 3


def hinton(teacher: Teacher, temperature: float = 4.0, labels: float = 0.1) -> Objective:
    """Hinton et al. 2015 (arXiv 1503.02531), written out: soft targets times T^2, and the labels.

    Temperature 4, 0.9 and 0.1 are the settings of Tian et al. 2020 (CRD, arXiv 1910.10699), which later comparisons took over.
    """

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        logits, known = model(*call.args), teacher(call)[0]
        soft = F.kl_div((logits / temperature).log_softmax(1), (known / temperature).softmax(1), reduction="batchmean") * temperature**2
        task = F.cross_entropy(logits, call.target)
        return (1 - labels) * soft + labels * task, {"soft": soft.item(), "task": task.item()}

    return objective


def fresh(model: nn.Module) -> nn.Module:
    """The architecture with new weights, from torch's generator."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return made


def learn(task: Task, student: str, method: str, seed: int) -> dict[str, Any]:
    """Trains, keeps the epoch that is best on validation, and looks at the test split once.

    Args:
        method: "plain", "hinton", "shohin", `FRESH`, `SCRATCH`, or that of a peer (see `distilling.peers`).

    Returns:
        A JSON-able record; qualities are shares of right answers.
    """
    data, config = task.data(), replace(task.config, seed=seed)
    torch.manual_seed(seed)
    made = task.students[student]()
    if method == SCRATCH:
        made, config = fresh(made), replace(config, epochs=LONGER * config.epochs)
    expert = Teacher(task.teacher(), folder=CACHE / "answers")
    began = time.monotonic()
    if method in (OURS, FRESH):
        found = shohin.distill(made, expert, data, config=config, inherit=method == OURS)
        trained, history = found.model, found.notes["training"]
    else:
        if method in (PLAIN, SCRATCH):
            objective = task_loss
        elif method == "hinton":
            objective = hinton(expert)
        else:
            from distilling.peers import objective as of_peer

            objective = of_peer(method, expert, task.classes)
        trained, history = made, train(made, data, objective, config, evaluate=data.quality).to_json()
    return {
        "task": task.name,
        "student": student,
        "method": method,
        "seed": seed,
        "test": data.quality(trained.eval(), "test"),
        "validation": history["best_quality"],
        "parameters": sum(p.numel() for p in trained.parameters()),
        "steps": sum(epoch["steps"] for epoch in history["history"]),
        "seconds": round(time.monotonic() - began, 1),
    }
