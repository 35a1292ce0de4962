"""Every distillation loss against plain loops over numbers, and what all of them promise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, rel_entr, softmax
from torch import Tensor

from shohin.distillation import losses
from shohin.errors import DataError

torch.set_num_threads(1)


def pair(seed: int, *shape: int, teacher: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).double(), 1.5 * torch.randn(*(teacher or shape), generator=g).double()


def vid(s: Tensor, t: Tensor) -> Tensor:
    return losses.vid(s, torch.zeros(s.shape[1], dtype=s.dtype), t)


#: name -> (loss, student's shape, teacher's shape, its least value)
ALL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "kd": (losses.kd, (6, 5), (6, 5)),
    "dkd": (losses.dkd, (6, 5), (6, 5)),
    "dist": (losses.dist, (6, 5), (6, 5)),
    "logits_mse": (losses.logits_mse, (6, 5), (6, 5)),
    "multi_label": (losses.multi_label, (6, 5), (6, 5)),
    "bounded_regression": (losses.bounded_regression, (6, 5), (6, 5)),
    "feature_mse": (losses.feature_mse, (6, 5, 3), (6, 5, 3)),
    "normalized_feature_mse": (losses.normalized_feature_mse, (6, 5, 3), (6, 5, 3)),
    "cosine_embedding": (losses.cosine_embedding, (6, 5), (6, 5)),
    "attention_transfer": (losses.attention_transfer, (6, 5, 4, 4), (6, 7, 4, 4)),
    "similarity_preserving": (losses.similarity_preserving, (6, 5), (6, 7, 2)),
    "rkd": (losses.rkd, (6, 5), (6, 7)),
    "crd": (losses.crd, (6, 5), (6, 5)),
    "vid": (vid, (6, 5, 3), (6, 5, 3)),
    "channel_wise": (losses.channel_wise, (6, 5, 4, 4), (6, 5, 4, 4)),
    "minilm": (losses.minilm, (6, 4, 6), (6, 4, 10)),
    "tokens": (losses.tokens, (6, 4, 9), (6, 4, 9)),
    "embeddings": (losses.embeddings, (6, 5), (6, 7)),
}
#: of these the least value is not 0 and not at the teacher's answer
NO_ZERO = {"crd"}


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_student_only_and_equal_answers_are_best(name: str) -> None:
    loss, ours, theirs = ALL[name]
    s, t = pair(1, *ours, teacher=theirs)
    s.requires_grad_()
    t.requires_grad_()
    value = loss(s, t)
    value.backward()
    assert value.dim() == 0 and bool(torch.isfinite(value)) and s.grad is not None and bool(torch.isfinite(s.grad).all())
    assert float(s.grad.abs().max()) > 0 and t.grad is None
    value = value.detach()
    equal = t.detach().clone().requires_grad_()
    best = loss(equal, t)
    best.backward()
    if name not in NO_ZERO:
        assert float(best.detach()) == pytest.approx(0.0, abs=1e-9) and float(value) > float(best.detach())
        assert equal.grad is not None and float(equal.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_constant_features_and_equal_samples_give_finite_gradients(name: str) -> None:
    loss, ours, theirs = ALL[name]
    s = torch.ones(*ours, dtype=torch.float64, requires_grad=True)
    value = loss(s, torch.zeros(*theirs, dtype=torch.float64))
    value.backward()
    assert bool(torch.isfinite(value)) and s.grad is not None and bool(torch.isfinite(s.grad).all())


@pytest.mark.parametrize("name", ALL)
def test_other_batches_and_empty_ones_are_refused(name: str) -> None:
    loss, ours, theirs = ALL[name]
    s, t = pair(2, *ours, teacher=theirs)
    with pytest.raises(DataError):
        loss(s, t[:-1])
    with pytest.raises(DataError):
        loss(s[:0], t[:0])


def test_other_vocabularies_are_named() -> None:
    with pytest.raises(DataError, match=r"9 classes .* in the student and 8 in the teacher"):
        losses.tokens(*pair(0, 2, 3, 9, teacher=(2, 3, 8)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 6))
def test_multi_label_is_the_divergence_of_pairs(seed: int, temperature: float) -> None:
    s, t = pair(seed, 4, 3)
    p, q = expit(t.numpy() / temperature), expit(s.numpy() / temperature)
    wanted = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean() * temperature**2
    assert float(losses.multi_label(s, t, temperature)) == pytest.approx(wanted, rel=1e-7)


def test_bounded_regression_by_hand() -> None:
    student, teacher, target = (torch.tensor(v) for v in ([1.0, 3.0, 0.5], [2.0, 1.0, 0.6], [0.0, 0.0, 0.0]))
    assert float(losses.bounded_regression(student, teacher, target)) == pytest.approx(9 / 3)  # only the second is worse
    assert float(losses.bounded_regression(student, teacher, target, margin=0.2)) == pytest.approx((9 + 0.25) / 3)


def test_attention_transfer_by_hand() -> None:
    s, t = pair(3, 2, 3, 2, 2, teacher=(2, 5, 2, 2))
    total = 0.0
    for i in range(2):
        a, b = ((x[i].numpy() ** 2).mean(0).reshape(-1) for x in (s, t))
        total += (((a / np.linalg.norm(a)) - (b / np.linalg.norm(b))) ** 2).sum()
    assert float(losses.attention_transfer(s, t)) == pytest.approx(total / 8, rel=1e-9)
    halves = t.repeat_interleave(2, 2).repeat_interleave(2, 3)  # a map of twice the size, averaged back
    assert float(losses.attention_transfer(s, halves)) == pytest.approx(total / 8, rel=1e-9)


def test_similarity_preserving_by_hand() -> None:
    s, t = pair(4, 3, 4, teacher=(3, 2))
    g = [x.numpy() @ x.numpy().T for x in (s, t)]
    g = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in g]
    assert float(losses.similarity_preserving(s, t)) == pytest.approx(((g[0] - g[1]) ** 2).sum() / 9, rel=1e-9)


def test_rkd_by_hand() -> None:
    s, t = (x.numpy() for x in pair(5, 4, 3, teacher=(4, 2)))

    def huber(x: float) -> float:
        return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5

    def distances(x: np.ndarray) -> np.ndarray:
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    wanted = np.mean([huber(v) for v in (distances(s) - distances(t)).reshape(-1)])
    assert float(losses.rkd(torch.tensor(s), torch.tensor(t), angle=0.0)) == pytest.approx(wanted, rel=1e-9)
    wanted = sum(huber(cosine(s, i, j, k) - cosine(t, i, j, k)) for i, j, k in permutations(range(4), 3)) / 4**3
    assert float(losses.rkd(torch.tensor(s), torch.tensor(t), distance=0.0, angle=1.0)) == pytest.approx(wanted, rel=1e-9)


def test_crd_is_smallest_for_equal_directions() -> None:
    t = torch.eye(5, dtype=torch.float64)
    low = float(losses.crd(3 * t, t))
    assert low == pytest.approx(np.log(1 + 4 * np.exp(-10)), rel=1e-6)
    assert float(losses.crd(t.roll(1, 0), t)) > 9


def test_vid_by_hand_and_its_best_variance() -> None:
    mean, teacher = pair(6, 3, 2, 4)
    log_variance = torch.tensor([0.3, -0.7], dtype=torch.float64)
    error = (mean - teacher).square().numpy()
    wanted = np.mean([0.5 * (error[:, c] / np.exp(v) + v).mean() for c, v in enumerate(log_variance.tolist())])
    assert float(losses.vid(mean, log_variance, teacher)) == pytest.approx(wanted, rel=1e-9)
    best = torch.tensor(error.mean((0, 2))).log().requires_grad_()
    losses.vid(mean, best, teacher).backward()
    assert best.grad is not None and float(best.grad.abs().max()) < 1e-12


def test_channel_wise_equals_scipy() -> None:
    s, t = pair(7, 2, 3, 2, 2)
    p, q = (softmax(x.reshape(2, 3, 4).numpy() / 4, -1) for x in (t, s))
    assert float(losses.channel_wise(s, t)) == pytest.approx(16 * rel_entr(p, q).sum(-1).mean(), rel=1e-9)


def test_minilm_equals_scipy_with_and_without_a_mask() -> None:
    s, t = pair(8, 2, 4, 6, teacher=(2, 4, 8))

    def relations(x: Tensor, i: int, h: int, length: int) -> np.ndarray:
        width = x.shape[2] // 2
        part = x[i, :length, h * width : (h + 1) * width].numpy()
        return softmax(part @ part.T / np.sqrt(width), -1)

    lengths = (3, 4)
    rows = [rel_entr(relations(t, i, h, n), relations(s, i, h, n)).sum(-1) for i, n in enumerate(lengths) for h in (0, 1)]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert float(losses.minilm(s, t, 2, mask)) == pytest.approx(np.concatenate(rows).mean(), rel=1e-9)
    rows = [rel_entr(relations(t, i, h, 4), relations(s, i, h, 4)).sum(-1) for i in (0, 1) for h in (0, 1)]
    assert float(losses.minilm(s, t, 2)) == pytest.approx(np.concatenate(rows).mean(), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.floats(0.5, 4))
def test_tokens_equal_scipy(seed: int, beta: float, temperature: float) -> None:
    s, t = pair(seed, 2, 3, 7)
    q, p = (softmax(x.numpy() / temperature, -1) for x in (s, t))
    m = beta * p + (1 - beta) * q
    value = rel_entr(p, q) if beta == 0 else rel_entr(q, p) if beta == 1 else beta * rel_entr(p, m) + (1 - beta) * rel_entr(q, m)
    wanted = value.sum(-1) * temperature**2
    assert float(losses.tokens(s, t, temperature=temperature, beta=beta)) == pytest.approx(wanted.mean(), rel=1e-6)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert float(losses.tokens(s, t, mask, temperature, beta)) == pytest.approx(wanted[mask.numpy()].mean(), rel=1e-6)


def test_words_that_do_not_count() -> None:
    s, _ = pair(9, 2, 3, 7)
    words = torch.tensor([[1, -100, 2], [0, 6, -100]])
    log_p = np.log(softmax(s.numpy(), -1))
    wanted = -np.mean([log_p[0, 0, 1], log_p[0, 2, 2], log_p[1, 0, 0], log_p[1, 1, 6]])
    assert float(losses.sequence(s, words)) == pytest.approx(wanted, rel=1e-9)
    with pytest.raises(DataError, match="no word"):
        losses.sequence(s, torch.full((2, 3), -100))
    with pytest.raises(DataError, match="no word"):
        losses.tokens(s, s, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(DataError, match="mask has shape"):
        losses.tokens(s, s, torch.ones(2, 2, dtype=torch.bool))


def test_embeddings_equal_scipy() -> None:
    s, t = pair(10, 4, 3, teacher=(4, 6))

    def neighbours(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return np.stack([softmax(np.delete(row, i) / 0.05) for i, row in enumerate(x @ x.T)])

    wanted = rel_entr(neighbours(t.numpy()), neighbours(s.numpy())).sum(-1).mean()
    assert float(losses.embeddings(s, t)) == pytest.approx(wanted, rel=1e-8)


def test_layer_maps_are_even_and_end_with_the_last() -> None:
    assert losses.layer_map(4, 12) == (2, 5, 8, 11) and losses.layer_map(3, 6) == (1, 3, 5) and losses.layer_map(6, 6) == tuple(range(6))
    with pytest.raises(DataError):
        losses.layer_map(7, 6)
