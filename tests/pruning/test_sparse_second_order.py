"""SparseGPT, exact OBS and the best weights for a mask, against brute force and least squares."""

import itertools

import pytest
import torch

from shohin.errors import DataError, PlanError
from shohin.evidence.hessian import damped
from shohin.pruning.sparse import Pattern, improved, obc, optimal, output_error, sparsegpt

PATTERNS = ["unstructured 0.5", "unstructured 0.8", "2:4", "1:4", "block 1x4 0.5", "block 4x1 0.5", "block 2x2 0.5"]


def layer(shape: tuple[int, ...], seed: int, groups: int = 1, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and moments of correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    features = torch.Size(shape[1:]).numel()
    mix = (
        torch.randn(groups, features, features, generator=g, dtype=torch.float64)
        * torch.rand(features, generator=g, dtype=torch.float64).square()
    )
    x = torch.randn(groups, rows, features, generator=g, dtype=torch.float64) @ mix + 0.3
    return torch.randn(shape, generator=g), x.transpose(1, 2) @ x / rows


@pytest.mark.parametrize(("shape", "groups"), [((8, 16), 1), ((8, 8, 3, 3), 1), ((16, 4, 3), 4), ((8, 260), 1)])
@pytest.mark.parametrize("text", PATTERNS)
def test_error_is_never_above_masking_alone(text: str, shape: tuple[int, ...], groups: int) -> None:
    pattern = Pattern.parse(text)
    for seed in range(2):
        w, h = layer(shape, seed, groups)
        ways = [sparsegpt] + ([obc] if pattern.height == 1 and shape[1] < 100 else [])
        for way in ways:
            new, mask = way(w, h, pattern)
            assert pattern.holds(new) and not bool(new[~mask].any()) and new.dtype == w.dtype
            assert int((~mask).sum()) == pattern.dropped(mask.numel() // (pattern.height * pattern.width)) * pattern.height * pattern.width
            exact = damped(h, 1e-2)
            assert output_error(w, new, exact) <= output_error(w, w * mask, exact) * (1 + 1e-6)
            best = optimal(w, h, mask)
            assert output_error(w, best, exact) <= output_error(w, new, exact) * (1 + 1e-5)
            assert output_error(w, best, h) <= output_error(w, w * mask, h) * (1 + 1e-6)
            fixed, same = sparsegpt(w, h, pattern, mask=mask)
            assert torch.equal(same, mask) and not bool(fixed[~mask].any())
            assert output_error(w, fixed, exact) <= output_error(w, w * mask, exact) * (1 + 1e-6)


@pytest.mark.parametrize("text", ["unstructured 0.4", "2:4", "block 1x4 0.5", "block 4x1 0.5"])
@pytest.mark.parametrize("shape", [(8, 16), (8, 8, 3)])
def test_white_inputs_make_it_magnitude(text: str, shape: tuple[int, ...]) -> None:
    w, _ = layer(shape, 7)
    pattern = Pattern.parse(text)
    features = torch.Size(shape[1:]).numel()
    expected = pattern.select(w.double().square())
    for way in (sparsegpt, obc) if pattern.height == 1 else (sparsegpt,):
        new, mask = way(w, 3 * torch.eye(features), pattern)
        assert torch.equal(mask, expected) and torch.allclose(new, w * mask)


def test_optimal_is_least_squares() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 7, generator=g, dtype=torch.float64), torch.randn(3, 7, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 7, generator=g) > 0.4
    found = optimal(w, x.T @ x / 200, mask, damp=0.0)
    for row in range(3):
        inside = mask[row]
        solved = torch.linalg.lstsq(x[:, inside], (x @ w[row]).unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(found[row, inside], solved)


@pytest.mark.parametrize(("shape", "groups"), [((8, 40), 1), ((8, 8, 3, 3), 1), ((16, 4, 3), 4)])
def test_conjugate_gradients_fall_to_the_optimum(shape: tuple[int, ...], groups: int) -> None:
    w, h = layer(shape, 5, groups)
    w = w.double()
    exact = damped(h, 1e-2)
    start, mask = sparsegpt(w, h, Pattern.unstructured(0.5))
    best = output_error(w, optimal(w, exact, mask, damp=0.0), exact)
    errors = [output_error(w, start, exact)]
    for steps in (1, 2, 4, 8, 200):
        new = improved(w, start, h, mask, steps=steps)
        assert not bool(new[~mask].any())
        errors.append(output_error(w, new, exact))
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.05 * best
    assert errors[-1] == pytest.approx(best, rel=1e-6)


def test_nothing_or_everything_masked() -> None:
    w, h = layer((4, 6), 1)
    assert torch.equal(optimal(w, h, torch.ones(4, 6, dtype=torch.bool)), w)
    assert not bool(optimal(w, h, torch.zeros(4, 6, dtype=torch.bool)).any())
    assert torch.allclose(sparsegpt(w, h, Pattern.unstructured(0.0))[0], w)


@pytest.mark.parametrize("seed", range(4))
def test_one_removal_is_the_best_of_all(seed: int) -> None:
    w, h = layer((1, 6), seed)
    found, _ = obc(w, h, Pattern.unstructured(1 / 6))
    exact = damped(h, 1e-2)
    masks = 1 - torch.eye(6)
    best = min(output_error(w, optimal(w, h, m.bool().unsqueeze(0)), exact) for m in masks)
    assert output_error(w, found, exact) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_exact_obs_is_near_the_best_of_all_masks(seed: int) -> None:
    """Greedy, so not always the best; on tiny layers it must be close, and no worse than SparseGPT's masks on the whole."""
    w, h = layer((2, 6), seed + 10)
    exact = damped(h, 1e-2)
    masks = [torch.tensor(m).reshape(2, 6) for m in itertools.product([False, True], repeat=12) if sum(m) == 6]
    best = min(output_error(w, optimal(w, h, m), exact) for m in masks)
    assert output_error(w, obc(w, h, Pattern.unstructured(0.5))[0], exact) <= 1.5 * best + 1e-9
    assert best > 0


def test_independent_inputs_make_both_the_best_of_all_masks() -> None:
    w, _ = layer((2, 5), 3)
    h = torch.diag(torch.tensor([4.0, 0.1, 1.0, 2.0, 0.5]))
    best = min(output_error(w, w * torch.tensor(m).reshape(2, 5), h) for m in itertools.product([0, 1], repeat=10) if sum(m) == 5)
    for way in (sparsegpt, obc):
        assert output_error(w, way(w, h, Pattern.unstructured(0.5), damp=0.0)[0], h) == pytest.approx(best, rel=1e-5)


def test_order_of_quality() -> None:
    """Masks by magnitude lose to Wanda's, those to SparseGPT, and that to exact OBS, on inputs of different sizes."""
    from shohin.pruning.sparse.scores import wanda

    pattern, wins = Pattern.unstructured(0.5), 0
    for seed in range(5):
        w, h = layer((24, 32), seed)
        plain = output_error(w, w * pattern.select(w.abs()), h)
        by_input = output_error(w, w * pattern.select(wanda(w, h.diagonal(dim1=1, dim2=2)), per_row=True), h)
        updated = output_error(w, sparsegpt(w, h, pattern)[0], h)
        exact = output_error(w, obc(w, h, pattern)[0], h)
        assert exact < updated < by_input < plain
        wins += 1
    assert wins == 5


def test_inputs_that_are_always_zero() -> None:
    w, h = layer((4, 8), 2)
    h[:, 3], h[:, :, 3] = 0, 0
    for way in (sparsegpt, obc):
        new, mask = way(w, h, Pattern.unstructured(0.25), damp=1e-8)
        assert not bool(mask[:, 3].any()) and bool(torch.isfinite(new).all())
    assert bool(torch.isfinite(sparsegpt(w, torch.zeros(8, 8), Pattern.unstructured(0.5))[0]).all())


def test_misfits() -> None:
    w, h = layer((4, 8), 2)
    with pytest.raises(PlanError, match="Hessian"):
        sparsegpt(w, h[:, :4, :4], Pattern.unstructured(0.5))
    with pytest.raises(PlanError, match="row by row"):
        obc(w, h, Pattern.parse("block 4x1 0.5"))
    h[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        sparsegpt(w, h, Pattern.unstructured(0.5))
