"""Block formats against a plain loop over blocks that knows the elements as lists of values, and against ml_dtypes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shohin.errors import PlanError
from shohin.formats import BLOCK_FORMATS, FLOAT_FORMATS, BlockFormat, named_block


def small_float(exponent_bits: int, mantissa_bits: int, bias: int, specials: int) -> list[float]:
    """The values of the codes without sign bit, in order; the highest ``specials`` codes are not numbers."""
    steps = 2**mantissa_bits
    out = []
    for code in range(2**exponent_bits * steps - specials):
        field, fraction = divmod(code, steps)
        out.append(fraction / steps * 2.0 ** (1 - bias) if field == 0 else (1 + fraction / steps) * 2.0 ** (field - bias))
    return out


#: values of the elements from the specification, and the exponent of the largest power of two among them
ELEMENTS = {
    "mxfp8-e4m3": (small_float(4, 3, 7, 1), 8),
    "mxfp8-e5m2": (small_float(5, 2, 15, 4), 15),
    "mxfp6-e3m2": (small_float(3, 2, 3, 0), 4),
    "mxfp6-e2m3": (small_float(2, 3, 1, 0), 2),
    "mxfp4": ([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], 2),
    "mxint8": ([code / 64 for code in range(128)], 0),
}
NAMES = st.sampled_from(sorted(ELEMENTS))
ROWS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70)
#: one magnitude, so that few elements are lost beside the largest
EVEN = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=70)


def element(values: list[float], x: float) -> float:
    """The value next to x by trying all, the even code at a tie, the last one beyond the end."""
    x = min(max(x, -values[-1]), values[-1])
    return math.copysign(min(enumerate(values), key=lambda at: (abs(at[1] - abs(x)), at[0] % 2))[1], x)


def reference(name: str, row: list[float], size: int = 32) -> tuple[list[float], list[float]]:
    """What a row is rounded to, and its scales."""
    values, emax = ELEMENTS[name]
    out, scales = [], []
    for block in (row[i : i + size] for i in range(0, len(row), size)):
        most = max(abs(v) for v in block)
        exponent = math.frexp(most)[1] - 1 - emax if most else -127
        scales.append(2.0 ** min(max(exponent, -127), 127))
        out += [element(values, v / scales[-1]) * scales[-1] for v in block]
    return out, scales


def same(got: Tensor, want: Any) -> bool:
    """Equal to the bit, so with the sign of zero."""
    a, b = got.double().numpy(), np.asarray(want.double() if isinstance(want, Tensor) else want, np.float64)
    return bool(np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b)))


# against other implementations


@pytest.mark.parametrize(
    ("name", "largest", "bits"),
    [
        ("mxfp8-e4m3", 448.0, 8.25),
        ("mxfp8-e5m2", 57344.0, 8.25),
        ("mxfp6-e3m2", 28.0, 6.25),
        ("mxfp6-e2m3", 7.5, 6.25),
        ("mxfp4", 6.0, 4.25),
        ("mxint8", 127 / 64, 8.25),
    ],
)
def test_the_formats_of_the_specification(name: str, largest: float, bits: float) -> None:
    form = BLOCK_FORMATS[name]
    assert named_block(name) is form and form.name == name and form.block == 32
    assert form.element.largest == largest == ELEMENTS[name][0][-1] and form.element.top_exponent == ELEMENTS[name][1]
    assert form.bits == bits and dataclasses.replace(form, block=16).bits == bits + 0.25
    assert list(BLOCK_FORMATS) == list(ELEMENTS)
    assert torch.equal(form.element.rounded(torch.tensor(ELEMENTS[name][0])), torch.tensor(ELEMENTS[name][0]))


@given(NAMES, st.one_of(ROWS, EVEN))
def test_a_plain_loop_over_blocks(name: str, row: list[float]) -> None:
    want, scales = reference(name, row)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(row, dtype=dtype)
        assert BLOCK_FORMATS[name].rounded(x).dtype == dtype
        assert same(BLOCK_FORMATS[name].rounded(x), want) and same(BLOCK_FORMATS[name].scales(x), scales)


@given(NAMES, st.lists(st.floats(), min_size=1, max_size=10).filter(lambda row: all(map(math.isfinite, row))), st.integers(1, 5))
def test_doubles_and_other_sizes_of_blocks(name: str, row: list[float], size: int) -> None:
    form = dataclasses.replace(BLOCK_FORMATS[name], block=size)
    assert same(form.rounded(torch.tensor(row, dtype=torch.float64)), reference(name, row, size)[0])


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_element_and_every_middle(name: str) -> None:
    values = ELEMENTS[name][0]
    x = [*values, *((a + b) / 2 for a, b in itertools.pairwise(values)), (values[-1] + 2.0 ** (ELEMENTS[name][1] + 1)) / 2]
    top = 2.0 ** ELEMENTS[name][1]
    for scale in (2.0**-100, 0.125, 1.0, 2.0**40):
        row = [v * scale for pair in x for v in (pair, -top)]  # a block of two: an element and what fixes the scale
        got = dataclasses.replace(BLOCK_FORMATS[name], block=2).rounded(torch.tensor(row))
        assert same(got[::2] / scale, [element(values, v) for v in x]) and same(got[1::2], [-top * scale] * len(x))


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("mxfp8-e4m3", "float8_e4m3fn"),
        ("mxfp8-e5m2", "float8_e5m2"),
        ("mxfp6-e3m2", "float6_e3m2fn"),
        ("mxfp6-e2m3", "float6_e2m3fn"),
        ("mxfp4", "float4_e2m1fn"),
    ],
)
def test_elements_and_scales_of_ml_dtypes(name: str, small: str) -> None:
    ml = pytest.importorskip("ml_dtypes")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 96, generator=g) * 2.0 ** torch.randint(-60, 60, (200, 1), generator=g)
    scales = BLOCK_FORMATS[name].scales(x)
    assert scales.shape == (200, 3)
    assert same(scales, scales.numpy().astype(ml.float8_e8m0fnu).astype(np.float64))  # the type of shared scales holds them
    spread = scales.repeat_interleave(32, 1)
    largest = float(ml.finfo(getattr(ml, small)).max)
    elements = (x.double() / spread).clamp(-largest, largest).float().numpy().astype(getattr(ml, small)).astype(np.float64)
    assert same(BLOCK_FORMATS[name].rounded(x), elements * spread.numpy())


def test_the_extreme_scales_are_those_of_e8m0() -> None:
    ml = pytest.importorskip("ml_dtypes")
    info = ml.finfo(ml.float8_e8m0fnu)
    x = torch.tensor([1e300, 1e-300], dtype=torch.float64)
    assert dataclasses.replace(BLOCK_FORMATS["mxint8"], block=1).scales(x).tolist() == [float(info.max), 2.0**-127]
    assert float(np.float64(2.0**-127).astype(ml.float8_e8m0fnu)) == 2.0**-127


@given(EVEN)
def test_mxint8_is_int8_with_a_scale(row: list[float]) -> None:
    form, x = BLOCK_FORMATS["mxint8"], torch.tensor(row, dtype=torch.float64)
    step = form.scales(x).repeat_interleave(32)[: len(row)] / 64
    codes = np.clip(np.rint((x / step).numpy()), -127, 127)
    assert np.array_equal(form.rounded(x).numpy(), codes * step.numpy())


def test_a_block_by_hand() -> None:
    # the largest, 7, fixes the scale at 2**(2 - 2) = 1 and becomes the largest element; the smallest is lost beside it
    x = torch.tensor([7.0, -5.0, 2.4, -0.3, 0.25, 0.75, -0.1])
    assert BLOCK_FORMATS["mxfp4"].rounded(x).tolist() == [6.0, -4.0, 2.0, -0.5, 0.0, 1.0, 0.0]
    assert BLOCK_FORMATS["mxint8"].rounded(torch.tensor([-1.999, 1.0, 0.01])).tolist() == [-127 / 64, 1.0, 1 / 64]


# laws


@given(NAMES, st.one_of(ROWS, EVEN))
def test_rounding_is_idempotent_odd_and_monotone_in_a_block(name: str, row: list[float]) -> None:
    form, x = BLOCK_FORMATS[name], torch.tensor(row)
    y = form.rounded(x)
    assert same(form.rounded(y), y) and same(form.rounded(-x), -y)
    for before, after in zip(x.split(32), y.split(32), strict=True):
        assert bool((after[before.argsort()].diff() >= 0).all())


@given(NAMES, EVEN, st.integers(-40, 40))
def test_powers_of_two_change_nothing(name: str, row: list[float], shift: int) -> None:
    form, x = BLOCK_FORMATS[name], torch.tensor(row, dtype=torch.float64)
    x = x.where(x.abs() > 1e-20, 0.0)  # smaller blocks meet the smallest scale
    assert same(form.rounded(x * 2.0**shift), form.rounded(x) * 2.0**shift)


@given(NAMES, st.integers(0, 2), st.integers(1, 40), st.booleans())
def test_blocks_lie_along_the_axis_and_are_independent(name: str, axis: int, size: int, negative: bool) -> None:
    form = dataclasses.replace(BLOCK_FORMATS[name], block=size)
    x = torch.randn(3, 5, 37, generator=torch.Generator().manual_seed(size)).movedim(-1, axis)
    at = axis - 3 if negative else axis
    y = form.rounded(x, at)
    assert y.shape == x.shape and same(y, torch.cat([form.rounded(part, axis) for part in x.split(size, axis)], axis))
    for i, j in itertools.product(range(3), range(5)):  # x.movedim(axis, -1) is 3 x 5 x 37
        assert same(y.movedim(axis, -1)[i, j], form.rounded(x.movedim(axis, -1)[i, j]))
    assert form.scales(x, at).shape == tuple(-(-n // size) if d == axis else n for d, n in enumerate(x.shape))


@pytest.mark.parametrize("name", ELEMENTS)
def test_what_stays_as_it_is(name: str) -> None:
    form = BLOCK_FORMATS[name]
    assert same(form.rounded(torch.zeros(3, 40)), torch.zeros(3, 40)) and same(form.rounded(-torch.zeros(40)), -torch.zeros(40))
    assert form.rounded(torch.zeros(3, 0)).shape == (3, 0) and form.rounded(torch.zeros(0, 3)).shape == (0, 3)
    assert form.rounded(torch.zeros(0, 3), 0).shape == (0, 3)
    mixed = torch.cat([torch.zeros(32), torch.full((32,), 3.0)])
    assert same(form.rounded(mixed), mixed)  # a block of zeros beside another


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_block_without_a_scale_is_nan_throughout(name: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(70)
        x[40] = bad
        y = BLOCK_FORMATS[name].rounded(x)
        assert bool(y[32:64].isnan().all()) and torch.equal(y[:32], torch.ones(32)) and torch.equal(y[64:], torch.ones(6))


@pytest.mark.parametrize("name", ELEMENTS)
def test_the_ends_of_float32(name: str) -> None:
    form, info = BLOCK_FORMATS[name], torch.finfo(torch.float32)
    values, emax = ELEMENTS[name]
    assert form.rounded(torch.tensor([info.max, -info.max])).tolist() == [
        values[-1] * 2.0 ** (127 - emax),
        -values[-1] * 2.0 ** (127 - emax),
    ]
    least = values[1] * 2.0**-127  # with the smallest scale
    assert form.rounded(torch.tensor([least, -least / 4])).tolist() == [least, 0.0]


@given(
    NAMES,
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1),
)
def test_every_dtype_holds_what_is_rounded_in_it(name: str, dtype: torch.dtype, row: list[float]) -> None:
    x = torch.tensor(row).to(dtype)
    y = BLOCK_FORMATS[name].rounded(x)
    assert y.dtype == dtype and same(y, BLOCK_FORMATS[name].rounded(x.double()))


# gradients


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_pass_straight_through(name: str, axis: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 50, generator=g, requires_grad=True), torch.randn(40, 50, generator=g)
    (BLOCK_FORMATS[name].rounded(x, axis) * weight).sum().backward()
    blocks = x.detach().split(32, axis)
    limit = torch.cat([BLOCK_FORMATS[name].scales(b, axis).expand_as(b) for b in blocks], axis)
    inside = x.detach().abs() <= limit * BLOCK_FORMATS[name].element.largest
    assert x.grad is not None and torch.equal(x.grad, torch.where(inside, weight, 0.0)) and bool(inside.any())


def test_gradients_stop_where_an_element_saturates() -> None:
    x = torch.tensor([7.0, -6.5, 6.0, 0.1, -0.0, 0.0], requires_grad=True)
    (BLOCK_FORMATS["mxfp4"].rounded(x) * torch.arange(1.0, 7.0)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0, 3.0, 4.0, 5.0, 6.0]


# errors


def test_what_has_no_blocks_is_refused() -> None:
    form = BLOCK_FORMATS["mxfp4"]
    for x, axis in ((torch.zeros(2, 3), 2), (torch.zeros(2, 3), -3), (torch.tensor(1.0), -1), (torch.tensor(1.0), 0)):
        with pytest.raises(PlanError, match=rf"'mxfp4' has no axis {axis} in a tensor of shape"):
            form.rounded(x, axis)
    with pytest.raises(PlanError, match=r"'mxfp4' rounds floating-point tensors, not torch.int32 \(shape \(4,\)\)"):
        form.rounded(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(PlanError, match="'mine' has blocks of 0 values; give at least 1"):
        BlockFormat("mine", FLOAT_FORMATS["e2m1"], 0)


def test_an_unknown_format_says_which_are_known() -> None:
    with pytest.raises(PlanError, match=r"unknown block format 'mxfp8'; known: mxfp8-e4m3, .*did you mean .*'mxfp4'"):
        named_block("mxfp8")
    with pytest.raises(PlanError, match="unknown block format 'e4m3'"):
        named_block("e4m3")
