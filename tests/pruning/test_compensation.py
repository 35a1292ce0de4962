"""Closed-form compensation and least squares: exact where it can be, never worse than slicing on the calibration data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shohin.errors import DataError, ModelError
from shohin.evidence import GramAccumulator, Window, conv_rows
from shohin.evidence.gram import Moments
from shohin.pruning.compensation import compensate, ridge_solve
from shohin.pruning.reconstruct import RIDGES, LeastSquares, fitted

torch.set_num_threads(1)


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return [
        (nn.Linear(12, 5), (200, 12)),
        (nn.Linear(12, 5, bias=False), (200, 12)),
        (nn.Conv1d(12, 5, 3, padding=1), (10, 12, 30)),
        (nn.Conv2d(12, 6, (3, 2), stride=2, bias=False), (8, 12, 11, 12)),
        (nn.Conv2d(12, 6, 3, groups=3, padding=1), (8, 12, 9, 9)),
    ]


def window(layer: nn.Module) -> Window | None:
    if isinstance(layer, nn.Linear):
        return None
    return Window(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]


def correlated(shape: tuple[int, ...], seed: int) -> Tensor:
    """Non-negative channels with a mean, as after a ReLU, that depend on each other."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    mixing = torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(99)) / 3
    return torch.relu(x + torch.einsum("nc...,cd->nd...", x, mixing) + 0.3)


def moments(layer: nn.Module, x: Tensor) -> Moments:
    accumulator = GramAccumulator(layer.weight[0].numel() * getattr(layer, "groups", 1), None, groups=getattr(layer, "groups", 1))  # type: ignore[operator, index]
    accumulator.update(x, window(layer))
    return accumulator.moments()


def call(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    conv = {3: nn.functional.conv1d, 4: nn.functional.conv2d}[x.dim()]
    return conv(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]


def kept_of(layer: nn.Module) -> Tensor:
    return torch.tensor([0, 1, 5, 7, 8, 11] if getattr(layer, "groups", 1) > 1 else [0, 2, 3, 5, 8, 9, 11])


def sliced(layer: nn.Module, kept: Tensor) -> Tensor:
    groups, per_group = getattr(layer, "groups", 1), layer.weight.shape[1]  # type: ignore[index]
    parts = [w[:, kept[kept // per_group == g] % per_group] for g, w in enumerate(layer.weight.detach().chunk(groups))]  # type: ignore[operator]
    return torch.cat(parts)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0, 100.0])
def test_never_worse_than_slicing_on_the_calibration_data(index: int, ridge: float) -> None:
    layer, shape = layers()[index]
    x, kept = correlated(shape, 1), kept_of(layer)
    weight, bias = compensate(layer.weight, layer.bias, moments(layer, x), kept, groups=getattr(layer, "groups", 1), ridge=ridge)
    y = layer(x)
    cut = (call(layer, x[:, kept], weight, bias) - y).square().mean()
    plain = (call(layer, x[:, kept], sliced(layer, kept), layer.bias) - y).square().mean()
    assert weight.shape == sliced(layer, kept).shape and weight.dtype == torch.float32
    assert (bias is None) == (layer.bias is None)
    assert cut.item() <= plain.item() * (1 + 1e-5)
    if ridge <= 1e-3:
        assert cut.item() < 0.8 * plain.item()


@pytest.mark.parametrize("index", range(5))
def test_helps_on_new_data(index: int) -> None:
    layer, shape = layers()[index]
    kept = kept_of(layer)
    weight, bias = compensate(layer.weight, layer.bias, moments(layer, correlated(shape, 1)), kept, groups=getattr(layer, "groups", 1))
    x = correlated(shape, 2)
    cut = (call(layer, x[:, kept], weight, bias) - layer(x)).square().mean()
    plain = (call(layer, x[:, kept], sliced(layer, kept), layer.bias) - layer(x)).square().mean()
    assert cut.item() < 0.9 * plain.item()


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_exact_where_removed_channels_are_combinations_of_kept_ones(index: int, offset: float) -> None:
    """Linear combinations always; with a constant added wherever there is a bias to take it and no zero padding."""
    layer, shape = layers()[index]
    padded = any(p for p in (layer.padding if not isinstance(layer, nn.Linear) else ()))  # type: ignore[union-attr]
    if offset and (layer.bias is None or padded):
        offset = 0.0
    layer, x, kept = layer.double(), correlated(shape, 3).double(), kept_of(layer)
    groups = getattr(layer, "groups", 1)
    size = 12 // groups
    for c in set(range(12)) - set(kept.tolist()):
        mates = kept[kept // size == c // size]
        mix = torch.randn(len(mates), generator=torch.Generator().manual_seed(c)).double()
        x[:, c] = torch.einsum("nk...,k->n...", x[:, mates], mix) + offset
    weight, bias = compensate(layer.weight, layer.bias, moments(layer, x), kept, groups=groups, ridge=1e-11)
    torch.testing.assert_close(call(layer, x[:, kept], weight, bias), layer(x), rtol=1e-6, atol=1e-6)


def test_the_formula_of_the_literature_without_ridge() -> None:
    layer = nn.Linear(12, 5, bias=False).double()
    x, kept = correlated((300, 12), 4).double(), kept_of(layer)
    m = moments(layer, x)
    weight, _ = compensate(layer.weight, None, m, kept, ridge=0.0)
    g = m.second[0]
    torch.testing.assert_close(weight, (layer.weight @ g[:, kept] @ torch.linalg.inv(g[kept][:, kept])).detach())


def test_large_ridge_is_slicing_and_keeping_all_is_identity() -> None:
    layer, shape = layers()[2]
    m = moments(layer, correlated(shape, 1))
    kept = kept_of(layer)
    weight, _ = compensate(layer.weight, layer.bias, m, kept, ridge=1e9)
    torch.testing.assert_close(weight, sliced(layer, kept), atol=1e-6, rtol=1e-6)
    weight, bias = compensate(layer.weight, layer.bias, m, torch.arange(12))
    torch.testing.assert_close(weight, layer.weight.detach())
    torch.testing.assert_close(bias, layer.bias.detach())


def test_duplicate_and_dead_channels_do_not_break_it() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1], x[:, 2] = x[:, 0], 0.0
    weight, bias = compensate(layer.weight, layer.bias, moments(layer, x), torch.tensor([0, 1, 2]), ridge=0.0)
    assert bool(torch.isfinite(weight).all())
    constant = torch.full((50, 4), 3.0)
    weight, bias = compensate(layer.weight, layer.bias, moments(layer, constant), torch.tensor([2]))
    torch.testing.assert_close(nn.functional.linear(constant[:, [2]], weight, bias), layer(constant).detach())


def test_refusals() -> None:
    layer, shape = layers()[4]
    m = moments(layer, correlated(shape, 1))
    with pytest.raises(ModelError, match="must keep as many inputs in each group"):
        compensate(layer.weight, layer.bias, m, torch.tensor([0, 1, 4, 8]), groups=3)
    with pytest.raises(ModelError, match="needs moments"):
        compensate(layer.weight, layer.bias, m, torch.tensor([0, 4, 8]))
    for bad in ([], [3, 2], [0, 12], [-1, 4]):
        with pytest.raises(ModelError, match="ascending indices of 12"):
            compensate(layer.weight, layer.bias, m, torch.tensor(bad), groups=3)
    with pytest.raises(DataError, match="hold NaN or Inf"):
        ridge_solve(torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]).double(), torch.ones(2, 1).double(), 0.0)


def chain(seed: int) -> tuple[Tensor, Tensor, nn.Module]:
    """The original layer's input, a cut and disturbed version of it, and the layer."""
    torch.manual_seed(seed)
    layer = nn.Conv1d(12, 5, 3)
    x = correlated((10, 12, 30), seed)
    kept = kept_of(layer)
    return x, x[:, kept] * 0.5 + 0.1 * torch.randn(10, len(kept), 30), layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-8, 1e-2, 10.0])
def test_least_squares_never_worse_than_its_prior(bias: bool, ridge: float) -> None:
    x, fed, layer = chain(5)
    y, prior = layer(x), sliced(layer, kept_of(layer))
    squares = LeastSquares(prior[0].numel(), 5)
    for a, b in zip(fed.split(3), y.split(3), strict=True):
        squares.update(*conv_rows(a, Window((3,)), output=b))  # type: ignore[arg-type]
    weight, new_bias = squares.solve(prior, ridge, bias)
    assert weight.shape == prior.shape and (new_bias is not None) == bias
    before = squares.error(prior, layer.bias if bias else None)
    after = squares.error(weight, new_bias)
    assert after <= before
    true = (nn.functional.conv1d(fed, weight, new_bias) - y).square().mean()
    assert after == pytest.approx(true.item(), rel=1e-4)


def test_least_squares_corrects_what_compensation_cannot_see() -> None:
    """The cut model feeds scaled inputs: statistics of the uncut model do not show it, least squares does."""
    x, fed, layer = chain(6)
    kept, y = kept_of(layer), layer(x)
    weight, bias = compensate(layer.weight, layer.bias, moments(layer, x), kept)
    squares = LeastSquares(weight[0].numel(), 5)
    squares.update(*conv_rows(fed, Window((3,)), output=y))  # type: ignore[arg-type]
    assert squares.error(*squares.solve(weight)) < 0.7 * squares.error(weight, bias)


def test_least_squares_recovers_exactly_and_agrees_with_lstsq() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 6).double() + 1
    w, b = torch.randn(4, 6).double(), torch.randn(4).double()
    squares = LeastSquares(6, 4)
    squares.update(x, x @ w.T + b)
    weight, bias = squares.solve(torch.zeros(4, 6).double(), ridge=1e-13)
    torch.testing.assert_close(weight, w, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(bias, b, atol=1e-8, rtol=1e-8)
    noisy = LeastSquares(6, 4)
    y = x @ w.T + torch.randn(100, 4).double()
    noisy.update(x, y)
    torch.testing.assert_close(noisy.solve(w, 0.0, bias=False)[0].T, torch.linalg.lstsq(x, y).solution)


def test_least_squares_with_few_rows_stays_near_the_prior() -> None:
    torch.manual_seed(0)
    prior = torch.randn(3, 50)
    squares = LeastSquares(50, 3)
    squares.update(torch.randn(5, 50), torch.randn(5, 3))
    weight, _ = squares.solve(prior, ridge=1.0)
    free, _ = squares.solve(prior, ridge=1e-6)
    assert (weight - prior).norm() < (free - prior).norm() and bool(torch.isfinite(free).all())
    with pytest.raises(DataError, match="no calibration data"):
        LeastSquares(5, 3).solve(torch.zeros(3, 5))
    with pytest.raises(DataError, match="expected rows"):
        squares.update(torch.randn(5, 50), torch.randn(4, 3))
    with pytest.raises(DataError, match="NaN or Inf"):
        squares.update(torch.full((5, 50), float("nan")), torch.randn(5, 3))


def test_least_squares_by_group_equals_each_group_alone() -> None:
    torch.manual_seed(1)
    x, y, prior = torch.randn(90, 6), torch.randn(90, 9), torch.randn(9, 2)
    together = LeastSquares(2, 3, 3)
    together.update(x, y)
    weight, bias = together.solve(prior, 1e-2)
    assert bias is not None
    for g in range(3):
        alone = LeastSquares(2, 3)
        alone.update(x[:, 2 * g : 2 * g + 2], y[:, 3 * g : 3 * g + 3])
        w, b = alone.solve(prior[3 * g : 3 * g + 3], 1e-2)
        torch.testing.assert_close(weight[3 * g : 3 * g + 3], w)
        torch.testing.assert_close(bias[3 * g : 3 * g + 3], b)


@pytest.mark.parametrize("seed", range(4))
def test_weights_move_as_far_as_rows_that_were_not_fitted_ask_for(seed: int) -> None:
    """Few noisy rows for many inputs: a small ridge learns the noise; many clean ones: it finds the truth."""
    g = torch.Generator().manual_seed(seed)
    truth, prior = torch.randn(4, 60, generator=g), torch.zeros(4, 60)
    prior += truth + 0.05 * torch.randn(4, 60, generator=g)

    def error(rows: int, noise: float, ridges: tuple[float, ...]) -> float:
        x = torch.randn(rows, 60, generator=torch.Generator().manual_seed(seed + 10))
        y = x @ truth.T + noise * torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed + 20))
        weight, _ = fitted(x, y, prior, ridges=ridges)
        return float((weight - truth).square().mean())

    assert error(80, 2.0, RIDGES) < 0.2 * error(80, 2.0, (1e-3,))
    assert error(4000, 0.01, RIDGES) < 0.01 * float((prior - truth).square().mean())
