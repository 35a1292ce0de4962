"""Distillation losses against independent NumPy formulas and the identities of their papers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import Tensor

from shohin.distillation.losses import dist, dkd, feature_mse, kd, logits_mse, normalized_feature_mse
from shohin.errors import DataError

torch.set_num_threads(1)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kd": kd, "dkd": dkd, "dist": dist, "mse": logits_mse}


def logits(seed: int, n: int = 6, c: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=g).double() * 2, torch.randn(n, c, generator=g).double() * 3


def test_kd_of_two_classes_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = ln 2 - H(1/4) = 0.130812 nats."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    assert float(kd(student, teacher, 1.0)) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-6)
    assert float(kd(student, teacher * 2, 2.0)) == pytest.approx(4 * 0.130812, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 10))
def test_kd_equals_scipy(seed: int, temperature: float) -> None:
    s, t = logits(seed)
    expected = rel_entr(softmax(t.numpy() / temperature, 1), softmax(s.numpy() / temperature, 1)).sum(1).mean() * temperature**2
    assert float(kd(s, t, temperature)) == pytest.approx(expected, rel=1e-9)
    assert float(kd(s.T[None], t.T[None], temperature, dim=1)) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 8), st.integers(2, 6))
def test_dkd_parts_recombine_to_kd(seed: int, temperature: float, classes: int) -> None:
    """Equation 5 of the paper, sample by sample: KD = TCKD + (1 - teacher's probability of the target) * NCKD."""
    s, t = logits(seed, 4, classes)
    target = torch.randint(0, classes, (4,), generator=torch.Generator().manual_seed(seed))
    for i in range(4):
        one = s[i : i + 1], t[i : i + 1], target[i : i + 1]
        other = 1 - float(torch.softmax(one[1] / temperature, 1)[0, target[i]])
        assert float(dkd(*one, temperature, 1.0, other)) == pytest.approx(float(kd(*one[:2], temperature)), rel=1e-7, abs=1e-12)


def test_dkd_equals_numpy() -> None:
    s, t = logits(3)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    ps, pt = softmax(s.numpy() / 4, 1), softmax(t.numpy() / 4, 1)
    total = 0.0
    for i, y in enumerate(target.tolist()):
        a, b = np.array([pt[i, y], 1 - pt[i, y]]), np.array([ps[i, y], 1 - ps[i, y]])
        u, v = np.delete(pt[i], y), np.delete(ps[i], y)
        total += rel_entr(a, b).sum() + 8 * rel_entr(u / u.sum(), v / v.sum()).sum()
    assert float(dkd(s, t, target)) == pytest.approx(total / 6 * 16, rel=1e-9)
    assert float(dkd(s, t)) == pytest.approx(float(dkd(s, t, t.argmax(1))), rel=1e-12)


def test_dist_equals_numpy_correlation() -> None:
    s, t = logits(4)
    ps, pt = softmax(s.numpy(), 1), softmax(t.numpy(), 1)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ps, pt, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ps.T, pt.T, strict=True)])
    assert float(dist(s, t)) == pytest.approx(inter + intra, rel=1e-6)
    assert float(dist(s, t, beta=2.0, gamma=0.5)) == pytest.approx(2 * inter + 0.5 * intra, rel=1e-6)
    assert float(dist(s[:1], t[:1])) == pytest.approx(1 - np.corrcoef(ps[0], pt[0])[0, 1], rel=1e-6)


def test_mean_squared_errors() -> None:
    s, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])
    assert float(logits_mse(s, t)) == 10.0 and float(feature_mse(s, t)) == 10.0
    assert float(normalized_feature_mse(s, t)) == pytest.approx(10 / 2.25)
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert float(normalized_feature_mse(x.mean().expand_as(x), x)) == pytest.approx(1.0, rel=1e-5)
    assert float(normalized_feature_mse(x * 30, x * 50)) == pytest.approx(float(normalized_feature_mse(x * 3, x * 5)), rel=1e-5)
    assert bool(torch.isfinite(normalized_feature_mse(x, torch.zeros_like(x))))


@pytest.mark.parametrize("name", LOSSES)
def test_zero_for_equal_logits_positive_otherwise_and_descending(name: str) -> None:
    s, t = logits(5)
    loss = LOSSES[name]
    assert float(loss(t, t)) == pytest.approx(0.0, abs=1e-9) and float(loss(s, t)) > 0.01
    student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert teacher.grad is None and student.grad is not None
    with torch.no_grad():
        assert loss(student - 0.01 * student.grad, teacher).item() < value.item()
    torch.autograd.gradcheck(lambda z: loss(z, t), (s.clone().requires_grad_(),))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name: str) -> None:
    s = torch.tensor([[1000.0, -1000.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[-1000.0, 1000.0, 0.0], [500.0, -500.0, 0.0]])
    LOSSES[name](s, t).backward()
    assert s.grad is not None and bool(torch.isfinite(s.grad).all())


@pytest.mark.parametrize("name", LOSSES)
def test_other_shapes_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"\(2, 3\) and \(2, 4\)"):
        LOSSES[name](torch.zeros(2, 3), torch.zeros(2, 4))


def test_bad_settings_are_refused() -> None:
    s, t = logits(0)
    with pytest.raises(DataError, match="temperature"):
        kd(s, t, 0.0)
    with pytest.raises(DataError, match="two classes"):
        dkd(s[:, :1], t[:, :1])
    with pytest.raises(DataError, match=r"\[N, C\]"):
        dist(s[None], t[None])
