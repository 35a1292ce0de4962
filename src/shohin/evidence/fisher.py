"""How much the loss would change if a unit were removed: first-order Taylor, Fisher, and a diagonal OBD variant.

A unit is a set of slices of several parameters that is removed together. With ``s_u = sum over its weights of g * w``:

- Taylor-Fisher of the group (Molchanov et al., 2019, 1906.10771; groups as in DepGraph, 2301.12900): ``mean of s_u ** 2``;
- OBD with the Fisher diagonal as Hessian (LeCun et al., 1990): ``1/2 sum over weights of mean(g ** 2) * w ** 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from shohin.errors import DataError

Slices = Mapping[str, Mapping[int, Tensor]]
"""``{parameter name: {dimension: LongTensor [units, k]}}``: unit u owns the k indices of row u along the dimension."""


def unit_contributions(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], slices: Slices) -> Tensor:
    """``s_u = sum of g * w`` over all slices of each unit: float64 ``[units]``.

    The first-order change of the loss when unit u is removed is ``-s_u``. A weight that a unit owns along two dimensions
    counts twice. Parameters without a gradient count as zero.

    Raises:
        DataError: if no parameter has a gradient, the numbers of units differ, or a gradient is NaN or Inf.
    """
    return _gather(slices, params, grads, lambda w, g: w * g)


def unit_saliency(params: Mapping[str, Tensor], batches: Iterable[Mapping[str, Tensor]], slices: Slices) -> Tensor:
    """Taylor-Fisher saliency ``[units]`` of each unit: the sum over ``batches`` of gradients of ``s_u ** 2``."""
    saliency = UnitSaliency(slices)
    for grads in batches:
        saliency.update(params, grads)
    return saliency.taylor() * saliency.updates


class UnitSaliency:
    """Saliency of the units of one group over many batches.

    Args:
        slices: what each unit owns; may be empty if only `update_gates` is used.
    """

    def __init__(self, slices: Slices) -> None:
        self.slices, self.updates = slices, 0
        self._first: Tensor | float = 0.0
        self._square: Tensor | float = 0.0
        self._diagonal: Tensor | float = 0.0

    def update(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], samples: int = 1) -> None:
        """Takes the gradients of one batch.

        Args:
            params: weights by name.
            grads: gradients by name, of the mean loss over the batch.
            samples: size of the batch. The square of a mean over B samples is 1/B of the mean square where the mean is near
                zero, so it is scaled by B: the values stay comparable between batch sizes. Exact for batches of one.
        """
        s = unit_contributions(params, grads, self.slices)
        self._first = self._first + s
        self._square = self._square + samples * s.square()
        self._diagonal = self._diagonal + samples * _gather(self.slices, params, grads, lambda w, g: (w * g).square())
        self.updates += 1

    def update_gates(self, gates: Tensor) -> None:
        """Takes per-sample ``s_u`` as `gate_gradients` gives them (summed over the places where a unit appears): ``[N, units]``."""
        gates = gates.detach().double().cpu()
        if not bool(torch.isfinite(gates).all()):
            raise DataError("a gradient is NaN or Inf: check the data and the loss")
        self._first = self._first + gates.sum(0)
        self._square = self._square + gates.square().sum(0)
        self.updates += len(gates)

    def taylor(self) -> Tensor:
        """Mean of ``s_u ** 2``, float64 ``[units]``; half of it estimates the loss of removal at a minimum (Fisher as Hessian)."""
        return self._mean(self._square)

    def first_order(self) -> Tensor:
        """Mean of ``s_u``, float64 ``[units]``; minus it is the first-order change of the loss."""
        return self._mean(self._first)

    def obd(self) -> Tensor:
        """``1/2 sum of mean(g**2) * w**2``, float64 ``[units]``. Raises DataError if only gates were given."""
        return 0.5 * self._mean(self._diagonal)

    def _mean(self, total: Tensor | float) -> Tensor:
        if not self.updates or not isinstance(total, Tensor):
            raise DataError("no gradients were given to this saliency: run at least one batch backward and call update")
        return total / self.updates


def gate_gradients(activation: Tensor, gradient: Tensor, dim: int = 1) -> Tensor:
    """Gradient of each sample's loss with respect to a gate of one on each channel: float64 ``[N, C]``.

    Args:
        activation: ``[N, ..., C at dim, ...]``.
        gradient: of the same shape, of a loss that is the mean over the N samples (it is scaled by N).
        dim: the channel dimension.
    """
    if activation.shape != gradient.shape:
        raise DataError(f"activation {tuple(activation.shape)} and gradient {tuple(gradient.shape)} differ in shape")
    product = (activation.detach().double() * gradient.detach().double()).movedim(dim, 1)
    return product.flatten(2).sum(2) * len(product) if product.dim() > 2 else product * len(product)


def _gather(
    slices: Slices, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], combine: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    total: Tensor | None = None
    for name, by_dim in slices.items():
        if name not in grads:
            continue
        product = combine(params[name].detach().double(), grads[name].detach().double())
        if not bool(torch.isfinite(product).all()):
            raise DataError(f"the gradient of {name} holds NaN or Inf: check the data and the loss")
        for dim, index in by_dim.items():
            others = [d for d in range(product.dim()) if d != dim % product.dim()]
            line = product.sum(others) if others else product
            units = line[index.to(line.device)].sum(1).cpu()
            if total is not None and total.shape != units.shape:
                raise DataError(f"{name} dimension {dim} has {len(units)} units, the others {len(total)}")
            total = units if total is None else total + units
    if total is None:
        raise DataError(f"none of {', '.join(slices) or 'no parameters'} has a gradient: call backward() and leave requires_grad on")
    return total
