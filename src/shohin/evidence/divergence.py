"""How far a changed model's answers are from the original's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shohin.data import Call, class_axis, first_output
from shohin.errors import DataError


class Divergence:
    """The original's answers to some batches, and how far those of another module are from them.

    Args:
        model: the original.
        calls: batches; one forward pass of each, now and for each module.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        if not calls:
            raise DataError("comparing answers needs batches: give Data(train=loader)")
        self.calls, self.reference = list(calls), answers(model, calls)
        axes = {class_axis(answer, call) for answer, call in zip(self.reference, self.calls, strict=True)}
        #: of class scores in the answers, or None
        self.axis = axes.pop() if len(axes) == 1 else None

    def __call__(self, model: nn.Module) -> float:
        """Mean Kullback-Leibler divergence (nats) of class scores, relative squared error of other answers; at least 0.

        Raises:
            DataError: if an answer is NaN.
        """
        a, b = torch.cat(self.reference).double(), torch.cat(answers(model, self.calls)).double()
        if self.axis is not None:
            p, q = a.log_softmax(self.axis), b.log_softmax(self.axis)
            value = float((p.exp() * (p - q)).sum(self.axis).mean())
        else:
            value = float((a - b).square().sum() / a.square().sum().clamp_min(1e-30))
        if value != value:
            raise DataError("a view's outputs are NaN on the training batches: look for NaN in the data or the weights")
        return max(value, 0.0)


def answers(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """First output of a module on each batch, in evaluation mode."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return [first_output(model(*c.args, **c.kwargs)).detach() for c in calls]
    finally:
        for module, mode in modes:
            module.training = mode
