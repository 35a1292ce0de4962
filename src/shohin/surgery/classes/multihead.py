"""Multi-head attention whose embedding width, number of heads and head dims are independent.

`torch.nn.MultiheadAttention` asserts that heads times head dim is the embedding width, so that a cut of heads, or of head
dims alone, has no place in it. This class has the same parameters (names and layout), the same call and the same results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shohin.errors import ModelError


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention` (Vaswani et al. 2017, 1706.03762) with head dims of its own.

    Args:
        embed_dim: width of the queries that come in and of what goes out.
        num_heads: heads.
        qk_dim, v_dim: dims of each head's queries and keys, and of its values; ``embed_dim // num_heads`` by default.
        scale: of the scores; ``qk_dim ** -0.5`` by default.

    The others are torch's. ``in_proj_weight`` has ``num_heads * (2 * qk_dim + v_dim)`` rows: queries, keys, values.
    torch's fused path for evaluation is never taken: it knows one head dim only.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        made = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.qk_dim = self.head_dim = qk_dim or embed_dim // num_heads
        self.v_dim = v_dim or embed_dim // num_heads
        self.scale = scale if scale is not None else self.qk_dim**-0.5
        self.add_zero_attn = add_zero_attn
        self._qkv_same_embed_dim = False
        keys, values = num_heads * self.qk_dim, num_heads * self.v_dim
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(2 * keys + values, embed_dim, **made))
            for name in names:
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            for name, rows, columns in zip(names, (keys, keys, values), (embed_dim, self.kdim, self.vdim), strict=True):
                self.register_parameter(name, nn.Parameter(torch.empty(rows, columns, **made)))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(2 * keys + values, **made))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(values, embed_dim, bias=bias, **made)
        for name, rows in (("bias_k", keys), ("bias_v", values)):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, rows, **made)) if add_bias_kv else None)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As torch's class."""
        for name, parameter in self.named_parameters():
            if name in ("bias_k", "bias_v"):
                nn.init.xavier_normal_(parameter)
            elif parameter.dim() > 1 and name != "out_proj.weight":
                nn.init.xavier_uniform_(parameter)
            elif parameter.dim() == 1:
                nn.init.zeros_(parameter)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: (L, N, E), with ``batch_first`` (N, L, E), or (L, E) without a batch.

        Returns:
            The output, shaped as the query, and the scores (N, L, S), with ``average_attn_weights=False`` (N, heads, L, S),
            or None with ``need_weights=False``.

        Raises:
            ModelError: if ``is_causal`` is given without a mask.
        """
        if is_causal and attn_mask is None:
            raise ModelError("MultiheadAttention: is_causal is a hint that describes attn_mask; give the mask too")
        batched = query.dim() == 3
        if not batched:
            own = query is key and key is value
            query = query.unsqueeze(0)
            key, value = (query, query) if own else (key.unsqueeze(0), value.unsqueeze(0))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            own = query is key and key is value
            query = query.transpose(0, 1)
            key, value = (query, query) if own else (key.transpose(0, 1), value.transpose(0, 1))
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        q, k, v = self._projected(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q, v.shape[2] - key.shape[1])
        rate = self.dropout if self.training else 0.0
        scores = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = (scores if mask is None else scores + mask).softmax(-1)
            scores = F.dropout(scores, rate) if rate else scores
            out = scores @ v
            scores = scores.mean(1) if average_attn_weights else scores
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal, scale=self.scale)
        out = out.transpose(1, 2).flatten(2)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), None if scores is None else scores.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), scores

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values (N, heads, L, dim), with what is appended to keys and values."""
        heads, dims = self.num_heads, (self.qk_dim, self.qk_dim, self.v_dim)
        sizes = [heads * dim for dim in dims]
        packed = self.in_proj_weight is not None and query is key and key is value
        if packed and self.qk_dim == self.v_dim:  # packed as torch packs them, so that its unit groups and these are the same
            q, k, v = torch.unflatten(F.linear(query, self.in_proj_weight, self.in_proj_bias), -1, (3, heads, self.v_dim)).unbind(-3)
        else:
            if packed:
                flat = list(torch.split(F.linear(query, self.in_proj_weight, self.in_proj_bias), sizes, -1))
            else:
                weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
                weights = weights if self.in_proj_weight is None else torch.split(self.in_proj_weight, sizes)
                biases: Any = (None, None, None) if self.in_proj_bias is None else torch.split(self.in_proj_bias, sizes)
                flat = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
            q, k, v = (torch.unflatten(x, -1, (heads, dim)) for x, dim in zip(flat, dims, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            more = [torch.unflatten(b, -1, (heads, -1)).expand(x.shape[0], -1, -1, -1) for x, b in ((k, self.bias_k), (v, self.bias_v))]
            k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        return [x.transpose(1, 2) for x in (q, k, v)]

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, appended: int) -> Tensor | None:
        """What is added to the scores; it broadcasts to (N, heads, L, S)."""
        masks = []
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, q)
            masks.append(torch.unflatten(attn_mask, 0, (q.shape[0], self.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:
            masks.append(_additive(key_padding_mask, q)[:, None, None])
        if not masks:
            return None
        mask = masks[0] if len(masks) == 1 else masks[0] + masks[1]
        return F.pad(mask, (0, appended)) if appended else mask

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.embed_dim}, {self.num_heads} heads, qk_dim={self.qk_dim}, v_dim={self.v_dim}"


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask


def is_multihead(module: nn.Module) -> bool:
    """True for torch's class and this one; a subclass that computes something else is not."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward in (nn.MultiheadAttention.forward, MultiheadAttention.forward)


def head_dims(module: nn.MultiheadAttention) -> tuple[int, int, float]:
    """Dims of each head's queries and keys, of its values, and the scale of its scores."""
    if isinstance(module, MultiheadAttention):
        return module.qk_dim, module.v_dim, module.scale
    dim = module.embed_dim // module.num_heads
    return dim, dim, dim**-0.5


def as_independent(module: nn.MultiheadAttention, num_heads: int, qk_dim: int, v_dim: int, scale: float) -> MultiheadAttention:
    """The same parameters, hooks and modes in a `MultiheadAttention`; the module itself is left as it is."""
    made = MultiheadAttention.__new__(MultiheadAttention)
    vars(made).update(vars(module))
    made._qkv_same_embed_dim = False
    made.num_heads, made.qk_dim, made.head_dim, made.v_dim, made.scale = num_heads, qk_dim, qk_dim, v_dim, scale
    return made
