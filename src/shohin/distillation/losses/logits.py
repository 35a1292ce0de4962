"""Losses between answers: classes, several labels at once, numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shohin.distillation.losses.shapes import same, several
from shohin.errors import DataError


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0, dim: int = -1) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, mean over all positions (Hinton et al., 2015, 1503.02531).

    Args:
        student, teacher: logits of one shape with the classes at ``dim``, e.g. ``[N, C]``.
        temperature: T > 0.
        dim: the class dimension.
    """
    same(student, teacher, temperature)
    several(student, dim)
    log_s = F.log_softmax(student / temperature, dim)
    log_t = F.log_softmax(teacher.detach() / temperature, dim)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim).mean() * temperature**2


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor | None = None, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Decoupled distillation (Zhao et al., 2022, 2203.08679): ``alpha * TCKD + beta * NCKD``, times ``T^2``.

    TCKD is the divergence of (target, all others) as two classes; NCKD that among the others alone. `kd` is the special case in
    which NCKD is weighted with the teacher's probability of the others.

    Args:
        student, teacher: logits ``[N, C]`` with C >= 2.
        target: classes ``[N]``; None takes the teacher's answer, so that unlabelled data can be used.
        temperature: T > 0.
        alpha, beta: weights of the two parts.
    """
    same(student, teacher, temperature)
    if student.dim() != 2 or student.shape[1] < 2:
        raise DataError(f"dkd needs logits [N, C] with two classes or more; got {tuple(student.shape)}")
    teacher = teacher.detach()
    chosen = (teacher.argmax(1) if target is None else target).unsqueeze(1)
    own = torch.zeros_like(student, dtype=torch.bool).scatter(1, chosen, True)
    log_s, log_t = (F.log_softmax(z / temperature, 1) for z in (student, teacher))

    def two(log_p: Tensor) -> Tensor:
        return torch.stack([log_p.gather(1, chosen).squeeze(1), log_p.masked_fill(own, -torch.inf).logsumexp(1)], 1)

    def others(log_p: Tensor) -> Tensor:
        return log_p[~own].reshape(len(log_p), -1).log_softmax(1)

    parts = [F.kl_div(part(log_s), part(log_t), reduction="batchmean", log_target=True) for part in (two, others)]
    return (alpha * parts[0] + beta * parts[1]) * temperature**2


def dist(student: Tensor, teacher: Tensor, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """DIST (Huang et al., 2022, 2205.10536): one minus Pearson's correlation of probabilities, over the classes of each sample
    (weight ``beta``) and over the samples of each class (weight ``gamma``), times ``T^2``.

    Args:
        student, teacher: logits ``[N, C]``; for N = 1 there is no second part.
        temperature: T > 0.
        beta, gamma: weights of the two parts.
    """
    same(student, teacher, temperature)
    if student.dim() != 2:
        raise DataError(f"dist needs logits [N, C]; got {tuple(student.shape)}")
    several(student, 1)
    s, t = (F.softmax(z / temperature, 1) for z in (student, teacher.detach()))
    loss = beta * (1 - _pearson(s, t)).mean()
    if len(s) > 1:
        loss = loss + gamma * (1 - _pearson(s.T, t.T)).mean()
    return loss * temperature**2


def logits_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of logits of one shape (Ba & Caruana, 2014, 1312.6184)."""
    same(student, teacher)
    return F.mse_loss(student, teacher.detach())


def multi_label(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2`` times the divergence of independent labels, mean over all of them: each is a choice of two (Yang et al., 2023, 2308.06453,
    the logit part).

    Args:
        student, teacher: logits of one shape; the sigmoid of each is the probability of its label.
        temperature: T > 0.
    """
    same(student, teacher, temperature)
    s, t = student / temperature, teacher.detach() / temperature
    p = torch.sigmoid(t)
    value = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return value.mean() * temperature**2


def bounded_regression(student: Tensor, teacher: Tensor, target: Tensor | None = None, margin: float = 0.0) -> Tensor:
    """Squared error to the teacher, counted only where the student is worse than the teacher by more than ``margin`` (the bounded
    regression loss of Chen et al., 2017, NeurIPS, section 3.3). Without targets: plain squared error.

    Args:
        student, teacher, target: numbers of one shape, ``[N, ...]``.
        margin: in units of squared error, by sample.
    """
    same(student, teacher)
    if target is None:
        return F.mse_loss(student, teacher.detach())
    same(student, target)
    ours = (student - target).square().flatten(1).mean(1) if student.dim() > 1 else (student - target).square()
    theirs = (teacher.detach() - target).square().flatten(1).mean(1) if student.dim() > 1 else (teacher.detach() - target).square()
    return torch.where(ours + margin > theirs, ours, 0.0).mean()


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row of ``[N, C]`` tensors: ``[N]``."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)
