"""Normalizations: their affine parameters follow the axis; those that compute statistics over it are noted."""

from __future__ import annotations

from typing import Any

from torch import fx

from shohin.graph.labels.context import Context, Parameter, rule


@rule("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Four vectors along axis 1; statistics are over the other axes, so labels must vary on axis 1 only."""
    x = context.labels(args[0])
    if set(x.varying) - {1}:
        return NotImplemented
    for vector in args[1:5]:
        if isinstance(vector, Parameter):
            context.axis(vector, 0, x.along(1))
    return context.labels(x)


@rule("layer_norm", "rms_norm")
def layer_norm(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Statistics over the trailing axes: removing a unit changes them, so the axis is noted as normalized."""
    x = context.labels(args[0])
    normalized = len(args[1])
    affine = [v for v in args[2:4] if isinstance(v, Parameter)]
    inside = [d for d in x.varying if d >= len(x.shape) - normalized]
    if inside:
        context.normalized.append(x.data)
    if not affine or not x.varying:
        return x
    if normalized != 1:
        return NotImplemented if inside else x
    if inside:
        from shohin.graph.labels.contraction import consume

        x, vector = consume(context, x, -1)
        if vector is not None:
            for parameter in affine:
                context.axis(parameter, 0, vector)
    return x
