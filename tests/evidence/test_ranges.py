"""Histograms that grow, and ranges chosen from them, against the data themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shohin.errors import DataError
from shohin.evidence import ChannelRange, Histogram, grid, mse_range, percentile_range, quantization_error
from shohin.formats import FORMATS, Quantizer

torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(-100, 100), st.integers(1, 200)), min_size=1, max_size=6),
    st.integers(0, 10_000),
    st.sampled_from([16, 64, 2048]),
)
def test_streamed_counts_are_those_of_one_pass(batches: list[tuple[float, float, int]], seed: int, bins: int) -> None:
    """Whatever the order of magnitudes, counts equal a histogram of all data at the final bin width, in bounded memory."""
    g = torch.Generator().manual_seed(seed)
    data = [torch.relu(torch.randn(n, generator=g) * scale + shift * scale / 50) for scale, shift, n in batches]
    h = Histogram(bins)
    for x in data:
        h.update(x)
    everything = torch.cat(data).double()
    assert h.count == len(everything) and h.zeros == int((everything == 0).sum())
    assert h.low == float(everything.min()) and h.high == float(everything.max())
    nonzero = everything[everything != 0]
    if len(nonzero):
        index, expected = np.unique(np.floor(nonzero.numpy() / h.width).astype(np.int64), return_counts=True)
        found = np.zeros(bins, dtype=np.int64)
        found[index - h.first] = expected
        assert np.array_equal(h.counts.numpy(), found)
        assert float(h.sums.sum()) == pytest.approx(float(nonzero.sum()), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(-100, 100), st.integers(0, 60)), min_size=1, max_size=6),
    st.integers(0, 10_000),
    st.sampled_from([16, 64, 2048]),
)
def test_any_split_into_batches_gives_the_same_histogram(parts: list[tuple[float, float, int]], seed: int, bins: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.relu(torch.randn(n, generator=g) * scale + shift * scale / 50) - (n % 2) * scale for scale, shift, n in parts])
    shuffled = x[torch.randperm(len(x), generator=g)]
    cuts = sorted({int(i) for i in torch.randint(0, len(x) + 1, (5,), generator=g)})
    found = []
    for batches in ([x], x.split(1), x.tensor_split(cuts), shuffled.split(7)):
        h = Histogram(bins)
        for batch in batches:
            h.update(batch)
        found.append(h)
    one = found[0]
    for h in found[1:]:
        assert (h.width, h.first, h.zeros, h.low, h.high) == (one.width, one.first, one.zeros, one.low, one.high)
        assert torch.equal(h.counts, one.counts)
        torch.testing.assert_close(h.sums, one.sums, rtol=1e-9, atol=1e-9 * one.width)


def test_growth_over_all_magnitudes() -> None:
    h = Histogram(64)
    for scale in (1e-38, -1e-20, 1.0, -1e20, 1e38):
        h.update(torch.full((3,), scale))
    assert h.counts.nonzero().numel() == 3 and h.count == 15  # below zero, around zero, far above
    assert h.low == pytest.approx(-1e20) and h.high == pytest.approx(1e38)
    assert h.points()[0].tolist() == sorted(h.points()[0].tolist())


def test_resolution_is_used() -> None:
    h = Histogram(2048)
    h.update(torch.randn(10_000))
    used = h.counts.nonzero()
    assert int(used.max() - used.min()) >= 2048 // 2 - 2


@pytest.mark.parametrize("name", ["int8", "uint8", "int7"])
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "shifted", "outlier"])
def test_mse_range_beats_minmax_on_the_data_itself(name: str, kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000)
    x = {
        "normal": x,
        "relu": x.relu(),
        "heavy": torch.distributions.StudentT(3.0).sample((20_000,)),
        "shifted": x + 3,
        "outlier": torch.cat([x, torch.tensor([80.0])]),
    }[kind]
    h = Histogram()
    for part in x.split(3000):
        h.update(part)
    form = FORMATS[name]

    def true_error(low: float, high: float) -> float:
        scale, zero = grid(low, high, form)
        q = Quantizer(form, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))
        return float((q.fake(x) - x).double().square().mean())

    low, high = mse_range(h, form)
    assert low <= 0 <= high
    chosen, full = true_error(low, high), true_error(h.low, h.high)
    assert chosen <= full * 1.02
    if kind in ("normal", "heavy") and form.symmetric:
        assert chosen < full * 0.97
    assert quantization_error(h, low, high, form) == pytest.approx(chosen, rel=0.05)
    brute = min(true_error(h.low * a, h.high * b) for a in np.linspace(0.05, 1, 20) for b in np.linspace(0.05, 1, 20))
    assert chosen <= brute * 1.05


def test_grid_holds_zero_and_covers_the_range() -> None:
    for form in (FORMATS["int8"], FORMATS["uint8"]):
        for low, high in [(-1.0, 2.0), (0.5, 3.0), (-4.0, -1.0), (0.0, 0.0), (-1e-9, 5.0)]:
            scale, zero = grid(low, high, form)
            assert scale > 0 and form.low <= zero <= form.high
            assert (form.high - zero) * scale >= high - scale and (form.low - zero) * scale <= low + scale
        for extent in (1e-42, 1e-300, 3e38):
            scale, zero = grid(0.0, extent, form)
            assert 0 < float(torch.tensor(scale).float()) < float("inf") and zero == (0 if form.symmetric else form.low)


def test_the_error_of_a_range_is_that_of_its_grid() -> None:
    h = Histogram()
    h.update(torch.linspace(2, 3, 5000))  # a grid reaches to zero, wherever the values lie
    for form in (FORMATS["int8"], FORMATS["uint8"]):
        step = grid(2.0, 3.0, form)[0]
        assert quantization_error(h, 2.0, 3.0, form) == pytest.approx(step**2 / 12, rel=0.05)


def test_percentile_of_uniform_values() -> None:
    h = Histogram()
    h.update(torch.linspace(-1, 3, 100_001))
    low, high = percentile_range(h, 0.9)
    assert low == pytest.approx(-0.8, abs=0.01) and high == pytest.approx(2.8, abs=0.01)
    assert percentile_range(h, 1.0) == (-1.0, 3.0)
    with pytest.raises(DataError, match="share"):
        percentile_range(h, 0.0)


def test_constant_and_zero_tensors() -> None:
    h = Histogram()
    h.update(torch.zeros(5))
    assert mse_range(h, FORMATS["uint8"]) == (0.0, 0.0)
    h.update(torch.full((5,), 2.5))
    low, high = mse_range(h, FORMATS["uint8"])
    assert low == 0.0 and quantization_error(h, low, high, FORMATS["uint8"]) < 1e-5


def test_channel_range() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5)
    r = ChannelRange(1)
    for part in x.split(2):
        r.update(part)
    assert torch.equal(r.low, x.amin((0, 2))) and torch.equal(r.high, x.amax((0, 2)))


def test_bad_values_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="NaN or Inf"):
            Histogram().update(torch.tensor([1.0, bad]))
        with pytest.raises(DataError, match="NaN or Inf"):
            ChannelRange(0).update(torch.tensor([1.0, bad]))
    with pytest.raises(DataError, match="no calibration data"):
        mse_range(Histogram(), FORMATS["int8"])
