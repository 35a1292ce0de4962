"""A whole program made sparse, layer by layer: each layer is pruned on the inputs that the layers before it, already sparse, give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shohin.data import Call, Data
from shohin.errors import DataError, PlanError, closest
from shohin.evidence.layers import LayerWeight
from shohin.evidence.reach import picked
from shohin.evidence.walk import Seen, changed_in_turn, looked_at
from shohin.graph import Graph
from shohin.program import joined_inputs
from shohin.pruning.sparse import scores
from shohin.pruning.sparse.gradients import gradients
from shohin.pruning.sparse.layer import How, mask_of, sparse
from shohin.pruning.sparse.patterns import Pattern
from shohin.pruning.sparse.weights import chosen_weights

#: what each criterion needs
DATA_FREE = frozenset(("magnitude", "random", "lamp"))
LOSS = frozenset(("taylor", "fisher"))
INPUTS = frozenset(("auto", "wanda", "sparsegpt", "obc"))
#: all names of criteria
CRITERIA = ("sparsegpt", "auto", "obc", "wanda", "magnitude", "lamp", "random", "taylor", "fisher")


def sparsify(
    graph: Graph,
    calls: Sequence[Call],
    patterns: Mapping[str, Pattern | str],
    *,
    criterion: str | Mapping[str, Tensor] = "sparsegpt",
    update: bool = True,
    follow: bool = True,
    samples: int = 256,
    rows: int = 4096,
    damp: float = 1e-2,
    seed: int = 0,
    data: Data | None = None,
    tick: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """New values of all tensors that change: sparse weights, and the biases and batch normalization statistics that follow.

    Memory beside the model: the activations of one batch of ``samples``; at each layer ``rows`` input rows and about four float64
    matrices of ``G * F**2`` (F inputs of an output, G groups), freed before the next; with ``follow`` as many
    output rows of each sparse layer; the changed tensors. Of a weight that
    several layers share the matrix is held from the first pass on, and is that of the dense network's inputs.

    Args:
        calls: calibration batches, without labels. Empty for "magnitude", "random", "lamp" and given scores: then nothing but
            zeros is made, whatever ``update`` says.
        patterns: weight name -> pattern; a weight that is absent stays dense.
        criterion: "sparsegpt", "obc" (exact OBS, for small layers), "auto" (exact where it is quick, else SparseGPT), "wanda", "magnitude", "lamp", "random", "taylor", "fisher", or
            scores: weight name -> a tensor of its shape, larger stays.
        update: also change the weights that stay, in closed form, and correct means: each layer's bias and each batch
            normalization's statistics by what sparsity moved on the samples. False: masks only, as Wanda does.
        follow: aim each layer at the dense network's outputs, so that later layers correct what earlier ones left; otherwise at
            what its own weight gives on its inputs, as the papers do.
        samples: go through the program as one batch: the first ones of ``calls``.
        rows: at most this many input rows of each layer, at random positions that reach the model's outputs (`shohin.pruning.reach`).
        damp: of the Hessian, as a share of its mean diagonal.
        seed: of positions and drawn scores.
        data: whose loss "taylor" needs; "fisher" uses the user's loss, or draws answers.
        tick: called after each sparse weight.

    Returns:
        Tensor name -> new value; tied tensors under each name.

    Raises:
        PlanError: if a name, a pattern or the criterion is unknown or does not fit.
        DataError: if data is needed and missing, or an activation is NaN.
    """
    chosen = chosen_weights(graph, patterns)
    how = How(criterion if isinstance(criterion, str) else "given", _given(graph, criterion, chosen), update, follow, rows, damp, seed)
    if how.criterion not in DATA_FREE | LOSS | INPUTS | {"given"}:
        raise PlanError(f"unknown criterion {criterion!r}{closest(str(criterion), DATA_FREE | LOSS | INPUTS)}")
    if not calls and how.criterion in INPUTS | LOSS:
        raise DataError(f"the criterion {criterion!r} needs calibration batches: give Data(train=loader)")
    if how.criterion in LOSS:
        how = _scored(graph, calls, data, how, chosen)
    with torch.no_grad():
        if calls and (update or how.criterion in INPUTS):
            inputs = joined_inputs(graph.program, calls, samples)
            weights = [w for w, _ in chosen.values()]
            layers = looked_at(graph.program, weights)
            places = picked(graph.program, inputs, layers, dict.fromkeys(layers, rows), seed)
            make = partial(_made, how, chosen, tick)
            changed = changed_in_turn(graph.program, inputs, places, weights, make, correct=update, follow=update and follow)
        else:
            changed = {}
            for name, (weight, pattern) in chosen.items():
                value = graph.program.tensors[name].detach()
                changed[name] = value.masked_fill(~mask_of(how, weight, pattern, value, None), 0.0)
                if tick is not None:
                    tick()
    return changed | {alias: changed[w.name] for w, _ in chosen.values() for alias in w.names}


def _given(graph: Graph, criterion: str | Mapping[str, Tensor], chosen: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if isinstance(criterion, str):
        return {}
    for name in chosen:
        wanted = graph.program.tensors[name].shape
        if name not in criterion or criterion[name].shape != wanted:
            got = tuple(criterion[name].shape) if name in criterion else "none"
            raise PlanError(f"scores of {name} must have its shape {tuple(wanted)}; got {got}")
    return criterion


def _scored(graph: Graph, calls: Sequence[Call], data: Data | None, how: How, chosen: Mapping[str, Any]) -> How:
    """The loss's criteria as given scores: they are those of the dense network."""
    if how.criterion == "taylor" and data is None:
        raise DataError("the criterion 'taylor' needs the loss: give data=Data(...) with labels or a loss")
    held = data if data is not None else Data(example=tuple(calls[0].args) or (torch.zeros(0),))
    found = gradients(graph, held, calls, chosen, labels=how.criterion == "taylor", seed=how.seed)
    tensors = graph.program.tensors
    given = {
        n: scores.taylor(tensors[n], g.mean) if how.criterion == "taylor" else scores.fisher(tensors[n], g.square) for n, g in found.items()
    }
    return How("given", given, how.update, how.follow, how.rows, how.damp, how.seed)


def _made(
    how: How,
    chosen: Mapping[str, tuple[LayerWeight, Pattern]],
    tick: Callable[[], None] | None,
    weight: LayerWeight,
    value: Tensor,
    seen: Seen,
) -> Tensor:
    """The sparse weight of the layer that reads it first."""
    pattern = chosen[weight.name][1]
    if seen.moments is None:  # no answer depends on these samples here
        new = value.masked_fill(~pattern.select(value.abs()), 0.0)
    else:
        new = sparse(how, weight, pattern, value, seen.moments, seen.centred, seen.cross)
    if tick is not None:
        tick()
    return new
