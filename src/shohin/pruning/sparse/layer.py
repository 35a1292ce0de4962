"""One layer made sparse: its mask by a criterion, and the closed form for what stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from shohin.evidence.gram import Moments
from shohin.evidence.hessian import aimed
from shohin.evidence.layers import LayerWeight
from shohin.pruning.sparse import scores
from shohin.pruning.sparse.obc import obc
from shohin.pruning.sparse.optimal import improved, optimal
from shohin.pruning.sparse.patterns import Pattern
from shohin.pruning.sparse.sparsegpt import sparsegpt

#: multiplications up to which "auto" is exact OBS, and up to which each row's least squares is solved after the mask is known
_OBC, _EXACT = 1e10, 1e9


@dataclass(frozen=True, eq=False)
class How:
    """What is done at each layer; arguments as of `sparsify`. ``given``: scores by weight name, with the criterion "given"."""

    criterion: str
    given: Mapping[str, Tensor]
    update: bool
    follow: bool
    rows: int
    damp: float
    seed: int


def sparse(
    how: How, weight: LayerWeight, pattern: Pattern, value: Tensor, moments: Moments, centred: bool, cross: Tensor | None = None
) -> Tensor:
    """The new value of one weight.

    Args:
        value: as it is.
        moments: of the inputs.
        centred: a bias or a normalization takes the mean of the output: only deviations from it count.
        cross: see `aimed`; None aims at what the weight itself gives on these inputs.
    """
    if not how.update:
        return value.masked_fill(~_chosen(how, weight, pattern, value, moments.second)[1], 0.0)
    hessian = moments.covariance if centred else moments.second
    if pattern.zeros:
        aim = value if cross is None else aimed(value, hessian, cross)
        new, mask = _chosen(how, weight, pattern, aim, hessian, moments)
        return _updated(how, pattern, aim, hessian, mask, new).to(value.dtype)
    return value


def _chosen(
    how: How, weight: LayerWeight, pattern: Pattern, value: Tensor, hessian: Tensor, moments: Moments | None = None
) -> tuple[Tensor | None, Tensor]:
    """The mask, and the weight where the criterion updates it on the way."""
    name = how.criterion
    if name == "auto":
        cost = value.numel() * hessian.shape[-1] ** 2
        name = "obc" if cost <= _OBC and pattern.height == 1 else "sparsegpt"
    if name in ("obc", "sparsegpt"):
        return (obc if name == "obc" else sparsegpt)(value, hessian, pattern, damp=how.damp)
    return None, mask_of(how, weight, pattern, value, hessian if moments is None else moments.second)


def _updated(how: How, pattern: Pattern, value: Tensor, hessian: Tensor, mask: Tensor, new: Tensor | None) -> Tensor:
    """The best weights for the mask: row by row where that is quick, else by conjugate gradients from one pass of updates."""
    inputs = hessian.shape[-1]
    if value.numel() / inputs * (inputs * (1 - pattern.zeros)) ** 3 / 3 <= _EXACT:
        return optimal(value, hessian, mask, damp=how.damp)
    start = sparsegpt(value, hessian, pattern, mask=mask, damp=how.damp)[0] if new is None else new
    return improved(value, start, hessian, mask, damp=how.damp)


def mask_of(how: How, weight: LayerWeight, pattern: Pattern, value: Tensor, second: Tensor | None) -> Tensor:
    """What stays by a criterion that scores each element by itself."""
    if how.criterion == "wanda" and second is not None:
        return pattern.select(scores.wanda(value, second.diagonal(dim1=-2, dim2=-1), weight.groups), per_row=True)
    if how.criterion == "given":
        return pattern.select(how.given[weight.name].to(value.device))
    if how.criterion == "random":
        return pattern.select(scores.random(value, how.seed * 1000003 + sum(ord(c) * (i + 1) for i, c in enumerate(weight.name))))
    return pattern.select(scores.lamp(value) if how.criterion == "lamp" else scores.magnitude(value))
