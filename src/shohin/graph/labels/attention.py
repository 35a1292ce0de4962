"""Scaled dot-product attention as one operator: two contractions with the head as batch axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shohin.graph.labels.algebra import contract, merge
from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.core import Labels
from shohin.graph.labels.rules import rule


@rule("scaled_dot_product_attention")
def attention(context: Context, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """``softmax(q[..., t, d] @ k[..., s, d].T * scale + mask) @ v[..., s, e]``.

    Queries and keys are united dim by dim. The default scale follows the head dim, which the view therefore writes out.
    Grouped queries (``enable_gqa``) repeat each head of keys and values for the queries that share it.
    """
    if len(args) > 4 and args[4] not in (0, 0.0):
        return NotImplemented
    q, k, v = (context.labels(a) for a in args[:3])
    if node.kwargs.get("enable_gqa") and k.shape[-3] not in (1, q.shape[-3]):
        k, v = (_repeated(context, x, q.shape[-3] // x.shape[-3]) for x in (k, v))
    rank = len(q.shape)
    if len(k.shape) != rank or len(v.shape) != rank:
        return NotImplemented
    batch = "abcdefgh"[: rank - 2]
    sizes = dict(zip(batch, (max(n) for n in zip(q.shape[:-2], k.shape[:-2], v.shape[:-2], strict=True)), strict=True))
    sizes |= {"t": q.shape[-2], "s": k.shape[-2], "x": q.shape[-1], "y": v.shape[-1]}
    scores = contract(context, node, [(q, batch + "tx"), (k, batch + "sx")], batch + "ts", sizes)
    if scores is None:
        return NotImplemented
    mask = args[3] if len(args) > 3 else None
    if isinstance(mask, (Labels, Parameter, torch.Tensor)):
        scores = merge(context, node, scores, mask)
    context.normalized.extend(p for p in scores.planes if p.shape[-1] > 1)
    result = contract(context, node, [(scores, batch + "ts"), (v, batch + "sy")], batch + "ty", sizes)
    return NotImplemented if result is None else result


def _repeated(context: Context, x: Labels, times: int) -> Labels:
    axis = len(x.shape) - 3
    planes = [p.repeat(times, axis) if p.shape[axis] > 1 else p for p in x.planes]
    shape = tuple(n * times if d == axis else n for d, n in enumerate(x.shape))
    if x.shape[axis] == 1:  # one head for all: it never goes
        return Labels(x.planes, shape)
    return context.tidy(planes, shape)
