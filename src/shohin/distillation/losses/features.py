"""Losses between features: of one shape, or through what both can be reduced to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from shohin.distillation.losses.shapes import pooled, rows, same
from shohin.errors import DataError


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features of one shape (hints of FitNets, Romero et al., 2015, 1412.6550)."""
    same(student, teacher)
    return F.mse_loss(student, teacher.detach())


def normalized_feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """`feature_mse` divided by the variance of the teacher's feature: 1 is as bad as its mean, whatever the layer's scale.

    A constant teacher feature has no variance; its scale is then its mean square, or 1e-12.
    """
    same(student, teacher)
    teacher = teacher.detach()
    variance = teacher.var(correction=0)
    floor = teacher.square().mean() * 1e-6 + 1e-12
    return F.mse_loss(student, teacher) / torch.maximum(variance, floor)


def cosine_embedding(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """One minus the cosine of each pair of vectors, mean (DistilBERT's third loss, Sanh et al., 2019, 1910.01108, section 3).

    Args:
        student, teacher: of one shape, vectors along ``dim``.
    """
    same(student, teacher)
    return (1 - F.cosine_similarity(student, teacher.detach(), dim=dim, eps=1e-8)).mean()


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of normalized maps of activation energy (Zagoruyko & Komodakis, 2017, 1612.03928, equation 2, squared, p = 2).

    Args:
        student, teacher: ``[N, C, *space]``; channels may differ. Where the spaces differ, the larger map is averaged to the smaller.
    """
    rows(student, teacher)
    if student.dim() != teacher.dim() or student.dim() < 3:
        raise DataError(f"attention transfer needs [N, C, *space] of one rank; got {tuple(student.shape)} and {tuple(teacher.shape)}")
    s, t = (x.square().mean(1) for x in (student, teacher.detach()))
    if s.shape != t.shape:
        size = [min(a, b) for a, b in zip(s.shape[1:], t.shape[1:], strict=True)]
        s, t = (pooled(x.unsqueeze(1), size).squeeze(1) for x in (s, t))
    return (F.normalize(s.flatten(1), dim=1) - F.normalize(t.flatten(1), dim=1)).square().mean()


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of row-normalized Gram matrices of a batch, over N^2 (Tung & Mori, 2019, 1907.09682, equation 4).

    Args:
        student, teacher: ``[N, ...]``, N >= 2; other axes may differ.
    """
    rows(student, teacher, 2)
    s, t = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher.detach()))
    return (s - t).square().mean()


def rkd(student: Tensor, teacher: Tensor, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    """Relations of samples: distances of pairs and angles of triplets, Huber losses (Park et al., 2019, 1904.05068, section 3).

    Args:
        student, teacher: ``[N, ...]``, N >= 3 for angles, 2 for distances alone; other axes may differ. Angles take N^3 numbers.
        distance, angle: weights.
    """
    rows(student, teacher, 3 if angle else 2)
    s, t = student.flatten(1), teacher.detach().flatten(1)
    loss = s.new_zeros(())
    if distance:
        loss = loss + distance * F.smooth_l1_loss(_distances(s), _distances(t))
    if angle:
        loss = loss + angle * F.smooth_l1_loss(_angles(s), _angles(t))
    return loss


def _distances(x: Tensor) -> Tensor:
    """Distances of all pairs ``[N, N]`` over the mean of those of distinct samples; safe in gradient where samples are equal."""
    squared = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
    apart = squared > 0
    d = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    return d / d.sum().div(apart.sum().clamp(min=1)).clamp(min=1e-12)


def _angles(x: Tensor) -> Tensor:
    """Cosines of the angles at the second of all triplets ``[N, N, N]``."""
    e = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=-1, eps=1e-12)
    return e @ e.transpose(1, 2)


def crd(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Contrast within a batch: the teacher's view of a sample is the positive, those of the others are negatives, both ways (Tian et
    al., 2020, 1910.10699, with the InfoNCE bound in place of its memory bank).

    Args:
        student, teacher: embeddings of one width ``[N, D]``, N >= 2 (put a linear layer before, where widths differ).
        temperature: > 0.
    """
    same(student, teacher, temperature)
    rows(student, teacher, 2)
    scores = F.normalize(student.flatten(1), dim=1) @ F.normalize(teacher.detach().flatten(1), dim=1).T / temperature
    labels = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def vid(mean: Tensor, log_variance: Tensor, teacher: Tensor) -> Tensor:
    """Negative log likelihood of the teacher's feature under a normal distribution by channel (Ahn et al., 2019, 1904.05835,
    section 3), without its constant term.

    Args:
        mean: what the student predicts, of the teacher's shape ``[N, C, ...]``.
        log_variance: ``[C]``, learned.
        teacher: the feature.
    """
    same(mean, teacher)
    if log_variance.shape != mean.shape[1:2]:
        raise DataError(f"vid needs one log variance for each of {mean.shape[1]} channels; got {tuple(log_variance.shape)}")
    spread = log_variance.reshape(1, -1, *[1] * (mean.dim() - 2))
    return 0.5 * ((mean - teacher.detach()).square() * torch.exp(-spread) + spread).mean()


def channel_wise(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Divergence of the distributions of each channel over space, ``T^2 / C`` (Shu et al., 2021, 2011.13256, section 3). For
    detection and segmentation.

    Args:
        student, teacher: ``[N, C, *space]`` of one shape.
    """
    same(student, teacher, temperature)
    if student.dim() < 3:
        raise DataError(f"channel-wise distillation needs [N, C, *space]; got {tuple(student.shape)}")
    log_s, log_t = (F.log_softmax(x.flatten(2) / temperature, -1) for x in (student, teacher.detach()))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean() * temperature**2


def minilm(student: Tensor, teacher: Tensor, heads: int = 1, mask: Tensor | None = None) -> Tensor:
    """Divergence of self-relations, softmax of scaled products of all pairs of positions (Wang et al., 2021, 2012.15828, MiniLMv2,
    section 3). Queries with queries, keys with keys, values with values: call it for each. Widths need not match.

    Args:
        student, teacher: ``[N, L, D]`` with other D; concatenated over heads.
        heads: relation heads; divides both widths.
        mask: ``[N, L]``, true where there is a word.
    """
    rows(student, teacher)
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[1] != teacher.shape[1]:
        raise DataError(f"minilm needs [N, L, D] of equal length; got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if student.shape[2] % heads or teacher.shape[2] % heads:
        raise DataError(f"{heads} relation heads do not divide the widths {student.shape[2]} and {teacher.shape[2]}")
    log_s, log_t = (_relations(x, heads, mask) for x in (student, teacher.detach()))
    value = F.kl_div(log_s, log_t, reduction="none", log_target=True)
    if mask is None:
        return value.sum(-1).mean()
    there = mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]
    queries = mask.bool().sum() * heads
    return torch.where(there, value, 0.0).sum() / queries.clamp(min=1)


def _relations(x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    n, length, width = x.shape
    parts = x.reshape(n, length, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / math.sqrt(width // heads)
    if mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, -1)


def layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """For each layer of the student the teacher's layer it learns from, evenly spread and ending with the last (TinyBERT, Jiao et al.,
    2020, 1909.10351, section 3.1: the uniform map).

    Raises:
        DataError: if the student has no layer or more than the teacher.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise DataError(f"a layer map needs 1 <= student layers <= teacher layers; got {student_layers} and {teacher_layers}")
    return tuple(round((i + 1) * teacher_layers / student_layers) - 1 for i in range(student_layers))
