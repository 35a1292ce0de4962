"""Loss tables: what removing units costs, from their saliency, corrected by a few losses that were really measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from shohin.errors import DataError, PlanError
from shohin.planning.options import GroupOptions

Floats = npt.NDArray[np.float64]


def kept_units(saliency: npt.ArrayLike, count: int) -> tuple[int, ...]:
    """Indices of the ``count`` most salient units, ascending; of equal ones the first stays.

    Args:
        saliency: one value for each unit; shape (units,).
        count: 1 to the number of units.
    """
    values = _checked(saliency)
    if not 1 <= count <= len(values):
        raise PlanError(f"cannot keep {count} of {len(values)} units")
    order = np.argsort(-values, kind="stable")
    return tuple(sorted(int(i) for i in order[:count]))


def loss_table(saliency: npt.ArrayLike, counts: Sequence[int]) -> Floats:
    """Estimated loss of each count: the sum of the saliencies of the units that go, the least salient first.

    Second-order terms of single units are added, which ignores how they act together; `correct` repairs the scale. Negative
    saliencies (noise of a first-order estimate) count as zero, so the table never rises with the count and ends with 0.

    Args:
        saliency: increase of the loss if a unit is removed; shape (units,).
        counts: kept counts.

    Raises:
        DataError: if a saliency is NaN or infinite.
    """
    values = _checked(saliency)
    if any(not 1 <= c <= len(values) for c in counts):
        raise PlanError(f"counts must be 1 to {len(values)}, got {tuple(counts)[:8]}")
    removed = np.concatenate([[0.0], np.cumsum(np.sort(np.maximum(values, 0.0)))])
    return np.asarray(removed[len(values) - np.asarray(counts, dtype=np.int64)])


def group_options(name: str, saliency: npt.ArrayLike, counts: Sequence[int]) -> GroupOptions:
    """Options of a group with the loss of its saliencies."""
    return GroupOptions(name, len(_checked(saliency)), tuple(counts), loss_table(saliency, counts))


def correct(options: Mapping[str, GroupOptions], measured: Mapping[tuple[str, int], float], prior: float = 0.25) -> dict[str, GroupOptions]:
    """Tables rescaled to measured losses: least squares of ``log real = log scale + power * log table`` for each group.

    Scale and power are drawn towards what all groups share (the pooled mean ratio, power 1) with the weight of ``prior``
    measurements, so that one point moves the scale and several also bend the curve. A group without measurements gets the
    pooled scale. The result stays monotone.

    Args:
        options: by group.
        measured: (group, count) -> increase of the calibration loss of a view that cuts only this group. Not positive
            (noise) counts as 1 % of the table's own value at the pooled scale.
        prior: weight of the shared values, in measurements.

    Raises:
        DataError: if a measured loss is NaN or infinite.
        PlanError: if a measurement names an unknown group or count.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for (name, count), real in sorted(measured.items()):
        if name not in options:
            raise PlanError(f"a loss was measured for the unknown group {name!r}")
        if not np.isfinite(real):
            raise DataError(f"the measured loss of group {name!r} at {count} units is {real}; look for NaN in the data or the weights")
        table = float(options[name].loss[options[name].index(count)])
        if table > 0:
            points.setdefault(name, []).append((table, float(real)))
    ratios = [np.log(real / table) for rows in points.values() for table, real in rows if real > 0]
    if not ratios:
        return dict(options)
    pooled = float(np.median(ratios))
    out = {}
    for name, group in options.items():
        rows = points.get(name, [])
        scale, power, centre = pooled, 1.0, 0.0
        if rows:
            x = np.log([table for table, _ in rows])
            y = np.log([max(real, 0.01 * table * np.exp(pooled)) for table, real in rows])
            # Around the mean of x scale and power are independent, so that the priors do not disturb each other.
            centre = float(x.mean())
            weight = prior if len(points) > 1 else 0.0
            scale = float(((y - x).sum() + weight * pooled) / (len(rows) + weight))
            spread = x - centre
            power = float(np.clip((spread @ y + prior) / (spread @ spread + prior), 0.25, 4.0))
        with np.errstate(divide="ignore"):
            logs = np.log(group.loss)
        loss = np.where(group.loss > 0, np.exp(scale + centre + power * (logs - centre)), 0.0)
        out[name] = replace(group, loss=np.maximum.accumulate(loss[::-1])[::-1])
    return out


def _checked(saliency: npt.ArrayLike) -> Floats:
    values = np.asarray(saliency, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise DataError(f"saliency must have one value for each unit, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise DataError(
            f"the saliency of unit {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite; look for NaN in data or weights"
        )
    return values
