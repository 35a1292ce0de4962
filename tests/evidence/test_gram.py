"""Rows, patches and Gram matrices against torch's own linear layers and convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shohin.errors import DataError
from shohin.evidence import GramAccumulator, Window, conv_rows, linear_rows

torch.set_num_threads(1)

CONVS = [
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 11)),
    (nn.Conv1d(4, 6, 5, stride=2, dilation=2, padding=4), (3, 4, 20)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding="valid", dilation=(1, 2)), (2, 4, 7, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 7, 6)),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 6)),
    (nn.Conv3d(2, 3, 2, stride=2), (1, 2, 4, 6, 5)),
]


def window(conv: nn.Module) -> Window:
    return Window(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]


@pytest.mark.parametrize(("conv", "shape"), CONVS)
@pytest.mark.parametrize("limit", [None, 13])
def test_patches_times_weight_is_the_convolution(conv: nn.Module, shape: tuple[int, ...], limit: int | None) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = conv(x)
    rows, outputs = conv_rows(x, window(conv), limit, torch.Generator().manual_seed(1), y)
    g = conv.groups
    patches = rows.reshape(len(rows), g, -1)
    weight = conv.weight.reshape(g, conv.out_channels // g, -1)  # type: ignore[operator]
    expected = torch.einsum("ngf,gof->ngo", patches, weight).flatten(1) + conv.bias
    assert len(rows) == (min(limit, y.numel() // y.shape[1]) if limit else y.numel() // y.shape[1])
    torch.testing.assert_close(outputs, expected)


def test_linear_rows_pairs_inputs_and_outputs() -> None:
    x = torch.randn(3, 5, 4)
    a, b = linear_rows(x, 7, torch.Generator().manual_seed(0), x * 2)
    assert a.shape == (7, 4)
    torch.testing.assert_close(b, a * 2)
    assert len({tuple(r.tolist()) for r in a}) == 7  # drawn without replacement


@pytest.mark.parametrize("groups", [1, 2])
def test_streamed_moments_equal_one_pass(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=groups)
    accumulator = GramAccumulator(36, None, groups=groups)
    x = torch.randn(10, 4, 6, 6) + 1
    for batch in x.split([1, 4, 5]):
        accumulator.update(batch, window(conv))
    rows = conv_rows(x, window(conv))[0].double().reshape(-1, groups, 36 // groups)
    m = accumulator.moments()
    torch.testing.assert_close(m.second, torch.einsum("ngf,ngh->gfh", rows, rows) / len(rows))
    torch.testing.assert_close(m.mean, rows.mean(0))
    torch.testing.assert_close(m.covariance[0], torch.cov(rows[:, 0].T, correction=0))
    assert m.rows == len(rows)


def test_sampling_bounds_rows_and_is_seeded_and_unbiased() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 30, 30)
    first, second = GramAccumulator(27, 500, seed=4), GramAccumulator(27, 500, seed=4)
    full = GramAccumulator(27, None)
    for accumulator in (first, second, full):
        for batch in x.split(2):
            accumulator.update(batch, Window((3, 3), padding=1))
    assert first.rows == 2000 and torch.equal(first.gram, second.gram)
    assert (first.moments().second - full.moments().second).norm() < 0.2 * full.moments().second.norm()


def test_bad_rows_are_refused() -> None:
    accumulator = GramAccumulator(4)
    with pytest.raises(DataError, match="4 features"):
        accumulator.update(torch.randn(3, 5))
    with pytest.raises(DataError, match="NaN or Inf"):
        accumulator.update(torch.tensor([[1.0, 2.0, float("inf"), 0.0]]))
    with pytest.raises(DataError, match="no calibration data"):
        accumulator.moments()
    with pytest.raises(DataError, match="2 spatial"):
        accumulator.update(torch.randn(1, 4, 8), Window((1, 1)))
    with pytest.raises(DataError, match="does not fit the input"):
        conv_rows(torch.randn(1, 4, 8), Window((3,)), output=torch.randn(1, 2, 8))
    with pytest.raises(DataError, match="larger than the padded input"):
        conv_rows(torch.randn(1, 4, 2), Window((3,)))
