"""A program changed layer by layer: each weight is made anew on the inputs that the changed layers before it give.

The one pass that pruning to zeros and rounding to grids share (Frantar & Alistarh, 2023, arXiv 2301.00774, section 3; Frantar et al.,
2023, arXiv 2210.17323, section 3): what a weight becomes is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shohin.evidence.gram import GramAccumulator, Moments
from shohin.evidence.layer_rows import channel_axis, cross_moments, input_rows, output_rows
from shohin.evidence.layers import LayerWeight
from shohin.evidence.means import Means, applied, biases, dense_means, moved_statistics, norms, shifted_bias
from shohin.program import Program, interpret


@dataclass(frozen=True, eq=False)
class Seen:
    """What the samples say of one weight.

    Args:
        moments: of its inputs, after the changes before it; None where no answer of the model depends on them.
        centred: a bias or a normalization takes the mean of the output: only deviations from it count.
        cross: ``E[x r^T]`` of inputs and what its outputs miss, ``[G, F, R]`` (see `shohin.evidence.hessian.aimed`); None for a weight
            that several layers share, or where layers do not follow.
    """

    moments: Moments | None
    centred: bool = False
    cross: Tensor | None = None

    @property
    def hessian(self) -> Tensor | None:
        """Second moments that count, ``[G, F, F]``."""
        if self.moments is None:
            return None
        return self.moments.covariance if self.centred else self.moments.second

    @property
    def shrunk(self) -> Tensor | None:
        """The same, correlations made smaller by ``F / (F + rows)``: of few rows they are chance."""
        found = self.hessian
        if found is None or self.moments is None:
            return None
        size = found.shape[-1]
        keep = self.moments.rows / (self.moments.rows + size)
        return keep * found + (1 - keep) * torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))


Make = Callable[[LayerWeight, Tensor, Seen], Tensor]


def looked_at(program: Program, weights: Sequence[LayerWeight]) -> dict[str, int]:
    """Layer node -> the axis of its output's features, for the layers of these weights and all whose bias may move."""
    nodes = {n.name: n for n in program.graph.nodes}
    return {node: w.feature_axis for w in weights for node in w.nodes} | {
        name: channel_axis(nodes[name], nodes[name].meta["val"]) for name in biases(program)
    }


def changed_in_turn(
    program: Program,
    inputs: tuple[Any, ...],
    places: Mapping[str, Tensor],
    weights: Sequence[LayerWeight],
    make: Make,
    *,
    moments: bool = True,
    correct: bool = True,
    follow: bool = True,
) -> dict[str, Tensor]:
    """All tensors that change, from one pass over the program in which every changed layer is run anew.

    Memory beside the model: the activations of ``inputs``; at each layer its rows and two float64 matrices of ``G * F**2`` (F inputs
    of an output, G groups), freed before the next; with ``follow`` the output rows of each layer. Of a weight that several layers
    share the matrix is held from the first pass on, and is that of the original's inputs.

    Args:
        inputs: of the program, all samples as one batch.
        places: node of `looked_at` -> the rows of its output that count; see `shohin.evidence.reach.picked`. Of a node that is absent no
            moments are taken, and the mean is over all rows.
        make: gives the new value of a weight, in the program's order.
        moments: take moments of the inputs; without them a weight is made from its values alone.
        correct: also move each layer's bias and each batch normalization's statistics by what the changes moved on the samples.
        follow: tell what each layer's outputs miss of the original's, so that later layers can correct what earlier ones left.

    Returns:
        Tensor name -> new value: every weight under its first name, and what else changed.
    """
    by_name = {w.name: w for w in weights}
    first = {w.nodes[0]: w.name for w in weights}
    readers = {node: w.name for w in weights for node in w.nodes}
    shared = _shared(program, inputs, places, [w for w in weights if moments and len(w.nodes) > 1])
    alone = {w.nodes[0] for w in weights if len(w.nodes) == 1}

    def taken(node: fx.Node, value: Tensor) -> Tensor | None:
        return output_rows(node, value, places[node.name]) if follow and node.name in alone and node.name in places else None

    original = dense_means(program, inputs, places, taken) if correct or follow else Means()
    own_bias, own_norm = biases(program), norms(program)
    changed: dict[str, Tensor] = {}
    tensors = applied(program, {})

    def seen(node: fx.Node, value: Tensor, x: Tensor, weight: LayerWeight) -> Seen:
        if not moments or not any(len(places.get(n, ())) for n in weight.nodes):
            return Seen(None)
        rows = None if weight.name in shared else input_rows(node, x, weight, places[node.name])
        own = shared[weight.name] if rows is None else _moments([rows], weight)
        centred = weight.nodes == (node.name,) and _centred(node, own_bias, own_norm)
        cross = None
        if rows is not None and node.name in original.rows:
            missing = original.rows[node.name].double() - output_rows(node, value, places[node.name]).double()
            cross = cross_moments(rows, missing, weight.groups, centred)
        return Seen(own, centred, cross)

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in first:
            weight = by_name[first[node.name]]
            changed[weight.name] = make(weight, tensors[weight.name], seen(node, value, args[0], weight))
        if node.name in readers:
            value = node.target(args[0], changed[readers[node.name]], *args[2:])  # type: ignore[operator]
        if not changed or not correct:
            return value
        if node.name in own_bias:
            name = own_bias[node.name]
            value, changed[name] = shifted_bias(node, value, tensors[name], original.outputs[node.name], places.get(node.name))
        if node.name in own_norm:
            names = own_norm[node.name]
            new = moved_statistics(args[0], original.norms[node.name], (tensors[names[0]], tensors[names[1]]))
            changed.update(zip(names, new, strict=True))
            value = node.target(*args[:3], *new, *args[5:])  # type: ignore[operator]
        return value

    with torch.no_grad():
        interpret(program, program.graph, tensors, inputs, visit)
    return {n: t for n, t in changed.items() if n in by_name or not torch.equal(t, tensors[n])}


def _centred(node: fx.Node, own_bias: Mapping[str, str], own_norm: Mapping[str, Any]) -> bool:
    """True if what follows takes the mean of the output: a bias or a batch normalization of its own."""
    users = [u.name for u in node.users]
    return node.name in own_bias or (len(users) == 1 and users[0] in own_norm)


def _moments(rows: Sequence[Tensor], weight: LayerWeight) -> Moments:
    gram = GramAccumulator(rows[0].shape[1], None, groups=weight.groups)
    for part in rows:
        gram.update_rows(part)
    return gram.moments()


def _shared(program: Program, inputs: tuple[Any, ...], places: Mapping[str, Tensor], weights: Sequence[LayerWeight]) -> dict[str, Moments]:
    """Moments of weights that several layers share, over the inputs of all of them."""
    found: dict[str, GramAccumulator] = {}
    wanted = {node: w for w in weights for node in w.nodes}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        weight = wanted.get(node.name)
        if weight is not None and node.name in places:
            rows = input_rows(node, args[0], weight, places[node.name])
            if not len(rows):
                return value
            found.setdefault(weight.name, GramAccumulator(rows.shape[1], None, groups=weight.groups)).update_rows(rows)
        return value

    if wanted:
        interpret(program, program.graph, applied(program, {}), inputs, visit)
    return {name: gram.moments() for name, gram in found.items()}
