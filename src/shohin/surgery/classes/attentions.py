"""What a cut makes of each `torch.nn.MultiheadAttention`: the same class where one head dim is left, else a drop-in."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import nn

from shohin.program import Program
from shohin.surgery.classes.multihead import MultiheadAttention, as_independent, head_dims, is_multihead
from shohin.surgery.rewritten import Rewritten

PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Attention:
    """The sizes that a cut leaves of one attention module.

    Args:
        path: of the module.
        num_heads, qk_dim, v_dim, scale: what is left.
        width, keys, values: of the queries, keys and values that come in.
        plain: True if torch's class holds these sizes and scales the scores right.
    """

    path: str
    num_heads: int
    qk_dim: int
    v_dim: int
    scale: float
    width: int
    keys: int
    values: int
    plain: bool


def attentions(model: nn.Module, rewritten: Rewritten) -> list[Attention] | str:
    """All multi-head attention modules that the cut changes, or why one has no place in any class."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and is_multihead(module):
            one = _attention(path, module, rewritten)
            if isinstance(one, str):
                return one
            if one is not None:
                found.append(one)
    return found


def _attention(path: str, module: nn.MultiheadAttention, rewritten: Rewritten) -> Attention | str | None:
    prefix = f"{path}." if path else ""
    owned = [n for n, _ in module.named_parameters()]
    if not any(rewritten.kept.get(prefix + n) for n in owned):
        return None

    def kept(name: str, axis: int, size: int) -> np.ndarray:
        indices = rewritten.kept.get(prefix + name, {}).get(axis)
        return np.arange(size) if indices is None else np.asarray(indices)

    heads, (qk, v, scale) = module.num_heads, head_dims(module)
    sizes = (heads * qk, heads * qk, heads * v)
    if module.in_proj_weight is not None:
        rows = kept("in_proj_weight", 0, sum(sizes))
        ends = np.cumsum((0, *sizes))
        parts = [rows[(rows >= a) & (rows < b)] - a for a, b in pairwise(ends)]
        widths = [len(kept("in_proj_weight", 1, module.in_proj_weight.shape[1]))] * 3
        names = ["in_proj_weight"]
    else:
        parts = [kept(name, 0, size) for name, size in zip(PARTS, sizes, strict=True)]
        widths = [len(kept(name, 1, getattr(module, name).shape[1])) for name in PARTS]
        names = list(PARTS)
    left = [sorted(set((part // dim).tolist())) for part, dim in zip(parts, (qk, qk, v), strict=True)]
    if not (left[0] == left[1] == left[2] and all(len(part) % len(left[0]) == 0 for part in parts)):
        return f"{path}: what stays of queries, keys and values are not the same heads"
    count = len(left[0])
    new_qk, new_v = len(parts[0]) // count, len(parts[2]) // count
    if any(prefix + n in rewritten.scaled for n in names):
        scale = new_qk**-0.5
    out = len(kept("out_proj.weight", 0, module.out_proj.weight.shape[0]))
    same = widths[0] == out == count * new_qk == count * new_v and abs(scale - new_qk**-0.5) < 1e-12
    plain = same and not isinstance(module, MultiheadAttention)
    return Attention(path, count, new_qk, new_v, scale, widths[0], widths[1], widths[2], plain)


def inside(program: Program, found: list[Attention]) -> frozenset[str]:
    """Names of the operations that these modules run."""
    paths = {a.path for a in found}
    return frozenset(name for name, origin in program.origins.items() if origin.module in paths)


def apply(copy: nn.Module, found: list[Attention]) -> None:
    """Sets the sizes in a copy that has the sliced tensors, and swaps the modules that torch's class cannot hold."""
    swapped: dict[int, nn.Module] = {}
    for one in found:
        module = copy.get_submodule(one.path)
        if not isinstance(module, nn.MultiheadAttention):
            continue
        module.embed_dim, module.kdim, module.vdim = one.width, one.keys, one.values
        module.num_heads, module.head_dim = one.num_heads, one.qk_dim
        if not one.plain:
            swapped[id(module)] = as_independent(module, one.num_heads, one.qk_dim, one.v_dim, one.scale)
    for parent in list(copy.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in swapped:
                parent._modules[name] = swapped[id(child)]
    for encoder in copy.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, MultiheadAttention) for m in encoder.modules()):
            encoder.use_nested_tensor = False  # nested tensors are for torch's fused path only


def swapped_root(copy: nn.Module, found: list[Attention]) -> nn.Module:
    """The model itself where it is the attention, else the copy."""
    if found and found[0].path == "" and not found[0].plain and isinstance(copy, nn.MultiheadAttention):
        one = found[0]
        return as_independent(copy, one.num_heads, one.qk_dim, one.v_dim, one.scale)
    return copy
