"""Optimal brain surgeon, one unit after the other: what a unit costs once all that cost less have gone and the rest has been refitted.

Of two copies of a channel each alone costs nothing, but not both: scores of single removals cannot say so, an order can (Kurtic et
al. 2023, ZipLM, arXiv 2302.04089). The sum of the scores of the units that go is the cost of their going together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shohin.graph.kinds import uses
from shohin.pruning.criteria.inputs import Inputs, Scores
from shohin.pruning.criteria.moments import LIMIT, second_moments
from shohin.pruning.criteria.obs import DAMPING, inverse_and_weights, sensitivities, unit_costs, weighted_matrix
from shohin.pruning.criteria.readings import Reading, readings

#: rounds of elimination in which all matrices of a group are updated; up to this many units go strictly one by one
ROUNDS = 64


@dataclass(frozen=True, eq=False)
class Piece:
    """One matrix of weights and its features, seen by the units that own them.

    Args:
        units: (n,) that are left.
        inverse: float64 (n * k, n * k), of the features' second moments, unit by unit.
        product: float64 (n * k, n * k), ``W^T W`` of the weights, refitted.
        width: k, features of each unit.
    """

    units: Tensor
    inverse: Tensor
    product: Tensor
    width: int

    def costs(self, size: int) -> Tensor:
        """What each unit costs if it goes next: float64 (size,), zero for units that are not here."""
        shape = (len(self.units), self.width, len(self.units), self.width)
        a, b = (m.reshape(shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1) for m in (self.inverse, self.product))
        found = (b / a).flatten() if self.width == 1 else torch.linalg.solve(a, b).diagonal(dim1=1, dim2=2).sum(1)
        return torch.zeros(size, dtype=torch.float64).index_add_(0, self.units, found)

    def only(self, chosen: Tensor) -> Piece:
        """The part of the units for which a mask (size,) is true, the others being neither removed nor looked at."""
        f = self._features(chosen[self.units])
        return replace(self, units=self.units[chosen[self.units]], inverse=self.inverse[f][:, f], product=self.product[f][:, f])

    def without(self, gone: Tensor) -> Piece:
        """After the removal of the units for which a mask (size,) is true, the other weights refitted."""
        mine = gone[self.units]
        if not bool(mine.any()):
            return self
        r, s = self._features(mine), self._features(~mine)
        a, b = self.inverse, self.product
        gain = torch.linalg.solve(a[r][:, r], a[r][:, s])
        inverse = a[s][:, s].addmm_(a[s][:, r], gain, alpha=-1)
        half = (b[s][:, r] - gain.T @ b[r][:, r] / 2) @ gain
        product = b[s][:, s].sub_(half).sub_(half.T)
        return replace(self, units=self.units[~mine], inverse=inverse, product=product)

    def _features(self, mine: Tensor) -> Tensor:
        return (torch.nonzero(mine) * self.width + torch.arange(self.width)).flatten()


def obs_greedy(inputs: Inputs, *, damping: float = DAMPING) -> Scores:
    """The estimated increase of the loss when a unit goes, all units with lower scores having gone before.

    As "obs" in all else. Scores rise in the order of removal, so that a cost that falls on the way counts as the highest before it.
    Up to 64 units of a group go one by one; of larger groups about a 64th at a time, one by one among those that cost least.
    Memory: two matrices ``features**2`` for each layer that reads a group, up to 1 GiB for the group; beyond that, layers count
    with the costs of single removals.
    """
    weighted, direct = sensitivities(inputs, readings(inputs.graph))
    fixed = {name: values + direct[name] / 2 if name in direct else values for name, values in inputs.zeros().items()}
    missing = {name: sum(name in one.owners for one in weighted) for name in uses(inputs.graph)}
    pieces: dict[str, list[Piece]] = {name: [] for name in fixed}
    scores = inputs.zeros()
    for one, second in second_moments(inputs, list(weighted)):
        matrix = weighted_matrix(one, inputs.graph.program, weighted[one])
        for group in one.owners:
            held = sum(16 * p.inverse.numel() for p in pieces[group])
            if held + 16 * one.features**2 > LIMIT and pieces[group]:
                fixed[group] += unit_costs(one, matrix, second, group, damping)
            else:
                pieces[group] += pieces_of(one, matrix, second, group, damping)
            missing[group] -= 1
            if not missing[group]:
                scores[group] = eliminate(pieces.pop(group), fixed[group])
    return scores | {name: eliminate([], fixed[name]) for name in pieces}


def pieces_of(one: Reading, matrix: Tensor, second: Tensor, group: str, damping: float) -> list[Piece]:
    """A reading as its units see it; arguments as of `unit_costs`."""
    out = []
    for number, units, features in one.unit_features(group):
        inverse, weights = inverse_and_weights(matrix[number], second[number], damping)
        flat = features.flatten()
        out.append(Piece(units, inverse[flat][:, flat], weights[:, flat].T @ weights[:, flat], features.shape[1]))
    return out


def eliminate(pieces: Sequence[Piece], fixed: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Scores of units in the order of elimination: float64 (units,).

    Args:
        fixed: float64 (units,), a cost that does not depend on what has gone.
    """
    size = len(fixed)
    scores, level = torch.zeros(size, dtype=torch.float64), 0.0
    alive = torch.ones(size, dtype=torch.bool)
    at_once = -(-size // rounds)
    while bool(alive.any()):
        costs = _costs(pieces, fixed, alive)
        near = torch.zeros_like(alive)
        near[costs.argsort(stable=True)[: 2 * at_once]] = True
        near &= alive
        parts, gone = [p.only(near) for p in pieces], torch.zeros_like(alive)
        for _ in range(min(at_once, int(near.sum()))):
            costs = _costs(parts, fixed, near & ~gone)
            unit = int(costs.argmin())
            level = max(level, float(costs[unit]))
            scores[unit] = level
            gone[unit] = True
            parts = [p.without(gone) for p in parts]
        pieces = [p.without(gone) for p in pieces]
        alive &= ~gone
    return scores


def _costs(pieces: Sequence[Piece], fixed: Tensor, alive: Tensor) -> Tensor:
    total = fixed.clone()
    for piece in pieces:
        if len(piece.units):
            total += piece.costs(len(fixed))
    return torch.where(alive, total, torch.inf)
