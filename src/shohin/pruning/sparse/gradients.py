"""Gradients of the loss with respect to each weight, as the Taylor and Fisher criteria need them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.data import Call, Data
from shohin.errors import DataError
from shohin.graph import Graph
from shohin.program import call_inputs, interpret, restore_outputs
from shohin.pruning.saliency import sampled_loss


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of one weight.

    Args:
        mean: of the gradients of the batches.
        square: mean square of per-sample gradients, float64 (from batches of B samples: B times the square of their mean, exact
            for batches of one).
    """

    mean: Tensor
    square: Tensor


def gradients(
    graph: Graph,
    data: Data,
    calls: Sequence[Call],
    names: Iterable[str],
    *,
    labels: bool = True,
    seed: int = 0,
    tick: Callable[[], None] | None = None,
) -> dict[str, Gradients]:
    """Weight name -> gradients over the batches; memory: three tensors of each weight's size.

    Args:
        labels: of the user's loss, or cross-entropy with the targets. False: of answers drawn from the model's own distribution
            (the Fisher information proper; Kunstner et al., 2019, arXiv 1905.12558).
        seed: of the drawn answers.
        tick: called after each batch.

    Raises:
        DataError: if there are no batches, no loss, or a gradient is NaN or Inf.
    """
    if not calls:
        raise DataError("gradients need batches: give Data(train=loader)")
    program, wanted = graph.program, list(names)
    tensors = {n: t.detach() for n, t in program.tensors.items()}
    own: dict[int, Tensor] = {}
    for name in wanted:  # tied names share one leaf
        leaf = own.setdefault(id(program.tensors[name]), program.tensors[name].detach().clone().requires_grad_())
        tensors |= {n: leaf for n, t in program.tensors.items() if t is program.tensors[name]}
    totals = {n: (torch.zeros_like(tensors[n], dtype=torch.float64), torch.zeros_like(tensors[n], dtype=torch.float64)) for n in wanted}
    generator = torch.Generator().manual_seed(seed)
    for call in calls:
        with torch.enable_grad():
            outputs = restore_outputs(program, interpret(program, program.graph, tensors, call_inputs(program, call)))
            loss = data.batch_loss(outputs, call) if labels else sampled_loss(outputs, call, data, generator)
        found = torch.autograd.grad(loss, [tensors[n] for n in wanted], allow_unused=True)
        for name, g in zip(wanted, found, strict=True):
            if g is not None:
                g = g.double()
                if not bool(torch.isfinite(g).all()):
                    raise DataError(f"the gradient of {name} holds NaN or Inf: check the data and the loss")
                totals[name][0].add_(g)
                totals[name][1].add_(g.square(), alpha=call.size)
        if tick is not None:
            tick()
    return {n: Gradients(a / len(calls), b / len(calls)) for n, (a, b) in totals.items()}
