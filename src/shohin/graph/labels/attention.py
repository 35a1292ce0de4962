"""Scaled dot-product attention as one operator: two contractions with the head as batch axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from shohin.graph.labels.context import Context, Parameter, rule
from shohin.graph.labels.contraction import carry
from shohin.graph.labels.core import Labels, rigid
from shohin.program import shape_of


@rule("scaled_dot_product_attention")
def attention(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``softmax(q[..., t, d] @ k[..., s, d].T * scale + mask) @ v[..., s, e]``.

    Queries and keys are united dim by dim. The default scale follows the head dim, which the view therefore writes out.
    """
    if node.kwargs.get("enable_gqa") or (len(args) > 4 and args[4] not in (0, 0.0)) or any(isinstance(a, Parameter) for a in args[:3]):
        return NotImplemented
    q, k, v = (context.labels(a) for a in args[:3])
    rank = len(q.shape)
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2] or any(rank - 2 in x.varying for x in (q, k, v)):
        return NotImplemented
    scores_shape = (*q.shape[:-1], k.shape[-2])
    scores = _scores(context, q, k, scores_shape)
    mask = args[3] if len(args) > 3 else None
    if isinstance(mask, (Labels, Parameter)):
        scores = context.merge(node, scores, mask)
    return carry(context, node, context.labels(scores), context.labels(v), shape_of(node))


def _scores(context: Context, q: Labels, k: Labels, shape: tuple[int, ...]) -> Labels:
    context.classes.unite(q.data, k.data)
    data = context.classes.find(np.broadcast_to(q.data, np.broadcast_shapes(q.data.shape, k.data.shape)))
    batch, width = data.shape[:-2], data.shape[-1]
    if not any(n > 1 for n in batch):
        return rigid(shape)
    if width == 1:
        return Labels(data, shape)
    derived = context.classes.fresh(int(np.prod(batch)))
    context.classes.link(derived, list(data.reshape(-1, width)))
    return Labels(context.classes.find(derived).reshape(*batch, 1, 1), shape)
