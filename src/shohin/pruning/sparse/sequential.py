"""A whole program made sparse, layer by layer: each layer is pruned on the inputs that the layers before it, already sparse, give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call, Data
from shohin.errors import DataError, PlanError, closest
from shohin.evidence.gram import GramAccumulator, Moments
from shohin.graph import Graph
from shohin.program import Program, interpret, joined_inputs
from shohin.pruning.reach import picked
from shohin.pruning.sparse import scores
from shohin.pruning.sparse.gradients import gradients
from shohin.pruning.sparse.layer import How, mask_of, sparse
from shohin.pruning.sparse.patterns import Pattern
from shohin.pruning.sparse.rows import cross_moments, input_rows, output_rows
from shohin.pruning.sparse.statistics import Means, applied, biases, dense_means, moved_statistics, norms, shifted_bias
from shohin.pruning.sparse.weights import SparseWeight, chosen_weights

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
            layers = {node: -1 if w.kind == "linear" else 1 - len(w.shape) for w, _ in chosen.values() for node in w.nodes}
            changed = _walk(graph.program, inputs, picked(graph, inputs, layers, dict.fromkeys(layers, rows), seed), how, chosen, tick)
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


def _walk(
    program: Program,
    inputs: tuple[Any, ...],
    places: Mapping[str, Tensor],
    how: How,
    chosen: Mapping[str, tuple[SparseWeight, Pattern]],
    tick: Callable[[], None] | None,
) -> dict[str, Tensor]:
    """The changed tensors, from one pass over the program in which every changed layer is run anew."""
    first = {w.nodes[0]: name for name, (w, _) in chosen.items()}
    readers = {node: name for name, (w, _) in chosen.items() for node in w.nodes}
    shared = _shared(program, inputs, places, [w for w, _ in chosen.values() if len(w.nodes) > 1])
    alone = {w.nodes[0] for w, _ in chosen.values() if len(w.nodes) == 1}

    def taken(node: fx.Node, value: Tensor) -> Tensor | None:
        return output_rows(node, value, places[node.name]) if how.follow and node.name in alone else None

    dense = dense_means(program, inputs, taken) if how.update else Means()
    own_bias, own_norm = biases(program), norms(program)
    changed: dict[str, Tensor] = {}
    tensors = applied(program, {})

    def made(node: fx.Node, value: Tensor, x: Tensor, name: str) -> Tensor:
        """The sparse weight of the layer that reads it first."""
        weight, pattern = chosen[name]
        if not any(len(places[n]) for n in weight.nodes):  # no answer depends on these samples here
            return tensors[name].masked_fill(~pattern.select(tensors[name].abs()), 0.0)
        rows = None if name in shared else input_rows(node, x, weight, places[node.name])
        moments = shared[name] if rows is None else _moments([rows], weight)
        centred = weight.nodes == (node.name,) and _centred(node, own_bias, own_norm)
        cross = None
        if rows is not None and node.name in dense.rows:
            missing = dense.rows[node.name].double() - output_rows(node, value, places[node.name]).double()
            cross = cross_moments(rows, missing, weight.groups, centred)
        return sparse(how, weight, pattern, tensors[name], moments, centred, cross)

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in first:
            name = first[node.name]
            changed[name] = made(node, value, args[0], name)
            if tick is not None:
                tick()
        if node.name in readers:
            value = node.target(args[0], changed[readers[node.name]], *args[2:])  # type: ignore[operator]
        if not changed or not how.update:
            return value
        if node.name in own_bias:
            name = own_bias[node.name]
            value, changed[name] = shifted_bias(node, value, tensors[name], dense.outputs[node.name])
        if node.name in own_norm:
            names = own_norm[node.name]
            new = moved_statistics(args[0], dense.norms[node.name], (tensors[names[0]], tensors[names[1]]))
            changed.update(zip(names, new, strict=True))
            value = node.target(*args[:3], *new, *args[5:])  # type: ignore[operator]
        return value

    interpret(program, program.graph, tensors, inputs, visit)
    return {n: t for n, t in changed.items() if n in chosen or not torch.equal(t, tensors[n])}


def _centred(node: fx.Node, own_bias: Mapping[str, str], own_norm: Mapping[str, Any]) -> bool:
    """True if what follows takes the mean of the output: a bias or a batch normalization of its own."""
    users = [u.name for u in node.users]
    return node.name in own_bias or (len(users) == 1 and users[0] in own_norm)


def _moments(rows: Sequence[Tensor], weight: SparseWeight) -> Moments:
    gram = GramAccumulator(rows[0].shape[1], None, groups=weight.groups)
    for part in rows:
        gram.update_rows(part)
    return gram.moments()


def _shared(program: Program, inputs: tuple[Any, ...], places: Mapping[str, Tensor], weights: Sequence[SparseWeight]) -> dict[str, Moments]:
    """Moments of weights that several layers share, over the inputs of all of them."""
    found: dict[str, GramAccumulator] = {}
    wanted = {node: w for w in weights for node in w.nodes}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        weight = wanted.get(node.name)
        if weight is not None:
            rows = input_rows(node, args[0], weight, places[node.name])
            if not len(rows):
                return value
            found.setdefault(weight.name, GramAccumulator(rows.shape[1], None, groups=weight.groups)).update_rows(rows)
        return value

    if wanted:
        interpret(program, program.graph, applied(program, {}), inputs, visit)
    return {name: gram.moments() for name, gram in found.items()}
