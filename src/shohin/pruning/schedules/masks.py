"""Masks that grow: which weights are made sparse, and what stays of each at a share of its pattern's zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shohin.errors import ModelError, PlanError, closest
from shohin.pruning.schedules.beside import Beside
from shohin.pruning.sparse.patterns import Pattern
from shohin.training import TrainResult

Score = Callable[[str, nn.Parameter], Tensor]
"""``score(name, parameter) -> Tensor`` of the parameter's shape: what is low goes first. The gradient is in ``parameter.grad``."""

Masks = Mapping[str, Tensor]
"""Parameter name -> boolean tensor of its shape: what stays."""

MASK = "mask"
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, eq=False)
class Sparse:
    """A training that left zeros.

    Args:
        training: what the loop gives back; its state and the model hold the zeros.
        masks: parameter name -> what stays.
    """

    training: TrainResult
    masks: dict[str, Tensor]

    @property
    def share(self) -> float:
        """The share of the masked weights' elements that is gone."""
        return gone_share(self.masks)


def gone_share(masks: Masks) -> float:
    """The share of all elements under the masks that is gone."""
    return 1 - sum(int(m.sum()) for m in masks.values()) / max(sum(m.numel() for m in masks.values()), 1)


def magnitude(name: str, parameter: nn.Parameter) -> Tensor:
    """The size of each weight (Han et al., 2015, arXiv 1506.02626)."""
    return parameter.detach().abs()


def weights_of(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The weights to be made sparse.

    Args:
        names: of parameters; None: the trainable weights of linear layers and convolutions.

    Raises:
        PlanError: if a name is not that of a trainable parameter.
        ModelError: if there is nothing to be made sparse.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if names is None:
        own = {id(m.weight) for m in model.modules() if isinstance(m, _LAYERS) and isinstance(m.weight, nn.Parameter)}
        names = [name for name, p in trainable.items() if id(p) in own]
        if not names:
            raise ModelError("the model has no linear layer or convolution with a trainable weight; name the parameters: weights=[...]")
    for name in names:
        if name not in trainable:
            raise PlanError(f"the model has no trainable parameter {name!r}{closest(name, trainable)}")
    return {name: trainable[name] for name in names}


def patterns_of(model: nn.Module, pattern: str | Pattern | Mapping[str, str | Pattern]) -> dict[str, Pattern]:
    """Parameter name -> pattern.

    Args:
        pattern: one for all linear layers and convolutions that it fits (the others stay dense, and so do depthwise ones for
            all but unstructured zeros), or one for each named parameter; see `shohin.pruning.sparse.weights.patterns_for`.

    Raises:
        PlanError: if a name or a pattern is not known, or a pattern fits nowhere, or not the parameter that it was named for.
    """
    if isinstance(pattern, Mapping):
        named = {name: Pattern.parse(text) for name, text in pattern.items()}
        for name, weight in weights_of(model, list(named)).items():
            named[name].check(weight.shape, name)
        return named
    one, weights = Pattern.parse(pattern), weights_of(model)
    misfits = {name: one.misfit(weight.shape) or _depthwise(model, name, one) for name, weight in weights.items()}
    chosen = {name: one for name, why in misfits.items() if not why}
    if not chosen:
        name, why = next(iter(misfits.items()))
        raise PlanError(f"no weight of the model can be {str(one)!r}: {name} {tuple(weights[name].shape)}: {why}")
    return chosen


def _depthwise(model: nn.Module, name: str, pattern: Pattern) -> str:
    module = model.get_submodule(name.rpartition(".")[0])
    alone = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and module.weight.shape[1] == 1
    return "a depthwise convolution can only be unstructured" if alone and pattern.kind != "unstructured" else ""


def grown(pattern: Pattern, scores: Tensor, share: float, before: Tensor | None = None) -> Tensor:
    """What stays when ``share`` of all elements is gone, on the way to a pattern.

    Unstructured and block patterns are chosen at that share, so that blocks go as a whole. Of an N:M pattern the lowest of the
    elements that it will take go first.

    Args:
        pattern: where the way ends.
        scores: of a weight's elements, finite.
        share: in [0, 1); more than the pattern's own counts as that.
        before: the mask so far: what is gone stays gone.

    Raises:
        PlanError: if the pattern does not fit the shape, or a score is NaN.
    """
    if before is not None:
        scores = scores.masked_fill(~before, float(scores.min()) - 1.0)
    now = pattern if pattern.kind == "n:m" else replace(pattern, zeros=min(share, pattern.zeros))
    if pattern.kind == "unstructured" and bool(scores.isfinite().all()):
        mask = ~lowest(scores, now.dropped(scores.numel()))  # what `Pattern.select` chooses, without sorting
    else:
        mask = now.select(scores)
    if pattern.kind == "n:m":
        count = min(round(share * scores.numel()), int((~mask).sum()))
        mask = ~lowest(scores.masked_fill(mask, float("inf")), count)
    return mask if before is None else mask & before


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` lowest scores of a tensor; of equal ones the earlier."""
    flat = scores.flatten()
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = flat.kthvalue(count).values
    mask = flat < last
    equal = (flat == last).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)


def apply(tensors: Mapping[str, Tensor], masks: Masks) -> None:
    """Puts exact zeros where the masks say so, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            tensors[name].data.masked_fill_(~mask.to(tensors[name].device), 0.0)


def hold(beside: Beside, names: Sequence[str]) -> None:
    """After a step: the zeros of the kept masks again."""
    apply(beside.parameters, {name: mask for name in names if (mask := beside.get(name, MASK)) is not None})


def quiet(beside: Beside, names: Sequence[str]) -> None:
    """Before a step: no gradient where nothing stays, so that the optimizer's averages of it fade."""
    for name in names:
        mask, p = beside.get(name, MASK), beside.parameters[name]
        if mask is not None and p.grad is not None:
            p.grad.masked_fill_(~mask, 0.0)


def finished(model: nn.Module, training: TrainResult, beside: Beside, names: Sequence[str]) -> Sparse:
    """The masks of a training, applied to what it gave back (an average of weights has no exact zeros of its own)."""
    parameters = dict(model.named_parameters())
    masks = {}
    for name in names:
        mask = beside.get(name, MASK)
        masks[name] = torch.ones_like(parameters[name], dtype=torch.bool) if mask is None else mask.detach().clone()
    apply(parameters, masks)
    apply(training.state, masks)
    return Sparse(replace(training), masks)
