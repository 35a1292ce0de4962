"""Losses for language models: by word, with the direction of the divergence to choose, and for whole sequences; text embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from shohin.data import IGNORED
from shohin.distillation.losses.shapes import rows, same, several
from shohin.errors import DataError


def tokens(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, beta: float = 0.0) -> Tensor:
    """Divergence of next-word distributions, mean over the words that count, times ``T^2``.

    ``beta = 0`` is the forward ``KL(teacher || student)``, ``beta = 1`` the reverse ``KL(student || teacher)`` (it seeks modes: Gu et
    al., 2023, 2306.08543), between them the generalized Jensen-Shannon divergence ``beta KL(t || m) + (1 - beta) KL(s || m)`` with
    ``m = beta t + (1 - beta) s`` (GKD, Agarwal et al., 2023, 2306.13649, section 2).

    Args:
        student, teacher: logits ``[..., V]`` of one shape.
        mask: ``[...]``, true for the words that count; None: all.
        temperature: T > 0.
        beta: in [0, 1].
    """
    same(student, teacher, temperature)
    several(student, -1)
    if not 0 <= beta <= 1:
        raise DataError(f"beta must be in [0, 1]; got {beta}")
    s, t = (F.log_softmax(x / temperature, -1) for x in (student, teacher.detach()))
    if beta == 0:
        value = _divergence(t, s)
    elif beta == 1:
        value = _divergence(s, t)
    else:
        mixed = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
        value = beta * _divergence(t, mixed) + (1 - beta) * _divergence(s, mixed)
    return _mean(value, mask) * temperature**2


def sequence(student: Tensor, targets: Tensor) -> Tensor:
    """Sequence-level distillation: the log likelihood of a sequence that the teacher wrote (Kim & Rush, 2016, 1606.07947, section 3.2).

    Args:
        student: logits ``[N, L, V]``, position i predicting ``targets[:, i]``.
        targets: words of the teacher ``[N, L]``; -100 does not count.
    """
    if student.dim() != 3 or targets.shape != student.shape[:2]:
        raise DataError(f"sequence needs logits [N, L, V] and words [N, L]; got {tuple(student.shape)} and {tuple(targets.shape)}")
    if not bool((targets != IGNORED).any()):
        raise DataError("no word of the batch counts: all targets are -100")
    return F.cross_entropy(student.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def embeddings(student: Tensor, teacher: Tensor, temperature: float = 0.05) -> Tensor:
    """For text embeddings of other widths: each sample's similarities to the rest of the batch, as a distribution, follow the
    teacher's; plus, of equal widths, the cosine (the contrastive form of similarity transfer, Fang et al., 2021, SEED, 2101.04731).

    Args:
        student, teacher: ``[N, D]``, N >= 3; D may differ.
        temperature: of the similarities, > 0.
    """
    rows(student, teacher, 3)
    if student.dim() != 2 or teacher.dim() != 2 or not temperature > 0:
        raise DataError(f"embeddings needs [N, D] and a temperature > 0; got {tuple(student.shape)}, {tuple(teacher.shape)}, {temperature}")
    s, t = (F.normalize(x, dim=1) for x in (student, teacher.detach()))
    log_s, log_t = (F.log_softmax(_others(x @ x.T) / temperature, -1) for x in (s, t))
    loss = _divergence(log_t, log_s).mean()
    return loss + (1 - (s * t).sum(1)).mean() if s.shape == t.shape else loss


def _others(square: Tensor) -> Tensor:
    """``[N, N - 1]``: each row without its diagonal."""
    n = len(square)
    return square.masked_select(~torch.eye(n, dtype=torch.bool, device=square.device)).reshape(n, n - 1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` along the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _mean(value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return value.mean()
    if mask.shape != value.shape:
        raise DataError(f"the mask has shape {tuple(mask.shape)}, the words {tuple(value.shape)}")
    counts = mask.bool()
    if not bool(counts.any()):
        raise DataError("no word of the batch counts: the mask is false everywhere")
    return value[counts].mean()
