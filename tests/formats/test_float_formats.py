"""Floating-point formats against casts of NumPy, torch and ml_dtypes, and against the list of all their values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shohin.errors import PlanError
from shohin.formats import FLOAT_FORMATS, FloatFormat, named_float, power_of_two
from shohin.formats.powers import power_below

#: exponent bits, mantissa bits, bias, how many of the highest codes are not numbers; from the specifications
LAYOUTS = {
    "fp16": (5, 10, 15, 2**10),
    "bf16": (8, 7, 127, 2**7),
    "e4m3": (4, 3, 7, 1),
    "e5m2": (5, 2, 15, 2**2),
    "e3m2": (3, 2, 3, 0),
    "e2m3": (2, 3, 1, 0),
    "e2m1": (2, 1, 1, 0),
}
NAMES = st.sampled_from(sorted(LAYOUTS))
FLOATS = st.floats(width=32, allow_nan=False)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def decoded(name: str) -> np.ndarray:
    """The values of the codes without sign bit, in order."""
    exponent_bits, mantissa_bits, bias, specials = LAYOUTS[name]
    codes = np.arange(2 ** (exponent_bits + mantissa_bits) - specials)
    field, fraction = codes >> mantissa_bits, (codes & (2**mantissa_bits - 1)) / 2.0**mantissa_bits
    return np.where(field == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, field - bias))


VALUES = {name: decoded(name) for name in LAYOUTS}


def nearest(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The value next to each x, the one with the even code at a tie, the last one beyond the end."""
    middles = (values[1:] + values[:-1]) / 2
    index = np.searchsorted(middles, np.abs(x), side="left")
    tied = (index < len(middles)) & (np.append(middles, np.inf)[index] == np.abs(x))
    index = np.where(tied & (index % 2 == 1), index + 1, index)
    return np.copysign(values[index], x)


def corners(name: str, dtype: type) -> np.ndarray:
    """Every value, every middle between two, what lies just beside them in the dtype, and what lies beyond the range."""
    values = VALUES[name]
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2, values[-1:] * [1.01, 1.5, 2, 4]])
    with np.errstate(over="ignore", under="ignore"):  # twice the largest bfloat16 is infinite in float32
        held = exact.astype(dtype)
        beside = [np.nextafter(held, dtype(end)) for end in (0, np.inf)]
    once = np.concatenate([held, *beside, np.array([np.inf, np.finfo(dtype).max, np.finfo(dtype).tiny], dtype)])
    return np.concatenate([once, -once])


def same(got: Tensor, want: Any) -> bool:
    """Equal to the bit, so with the sign of zero."""
    a, b = got.double().numpy(), np.asarray(want.double() if isinstance(want, Tensor) else want, np.float64)
    return bool(np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b)))


# against other implementations


def test_the_fields_say_which_values_there_are() -> None:
    assert list(FLOAT_FORMATS) == list(LAYOUTS)
    largest = {"fp16": 65504, "bf16": 3.3895313892515355e38, "e4m3": 448, "e5m2": 57344, "e3m2": 28, "e2m3": 7.5, "e2m1": 6}
    for name, form in FLOAT_FORMATS.items():
        values = VALUES[name]
        assert (form.name, form.largest, form.smallest) == (name, values[-1], values[1]) and form.largest == largest[name]
        assert (form.exponent_bits, form.mantissa_bits, form.bias) == LAYOUTS[name][:3]
        assert 2.0**form.top_exponent <= form.largest < 2.0 ** (form.top_exponent + 1)
        assert form.bits == {"fp": 16, "bf": 16, "e4": 8, "e5": 8, "e3": 6}.get(name[:2], 1 + sum(LAYOUTS[name][:2]))
        specials = LAYOUTS[name][3]
        assert (form.nan, form.infinity) == (specials > 0, specials > 1)
        assert named_float(name) is form and dataclasses.replace(form) == form and hash(dataclasses.replace(form)) == hash(form)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_values_and_all_middles(name: str, dtype: type) -> None:
    x = corners(name, dtype)
    assert same(FLOAT_FORMATS[name].rounded(torch.from_numpy(x)), nearest(VALUES[name], x.astype(np.float64)))


@given(NAMES, st.lists(FLOATS, min_size=1, max_size=30), st.integers(-30, 30))
def test_the_nearest_of_all_values(name: str, values: list[float], shift: int) -> None:
    for x in (torch.tensor(values), torch.tensor(values, dtype=torch.float64) * 2.0**shift / 3):
        assert same(FLOAT_FORMATS[name].rounded(x), nearest(VALUES[name], x.double().numpy()))


def by_numpy_half(x: Tensor) -> Tensor:
    with np.errstate(over="ignore"):
        return torch.from_numpy(x.numpy().astype(np.float16).astype(np.float32)).clamp(-65504, 65504)


def by_torch(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A cast of torch; what lies beyond the range is clipped before, since casts make it infinite or NaN."""
    largest = torch.finfo(dtype).max
    return lambda x: x.clamp(-largest, largest).to(dtype).float()


def by_ml_dtypes(name: str) -> Callable[[Tensor], Tensor]:
    def cast(x: Tensor) -> Tensor:
        ml = pytest.importorskip("ml_dtypes")
        small = getattr(ml, name)
        largest = float(ml.finfo(small).max)
        return torch.from_numpy(x.clamp(-largest, largest).numpy().astype(small).astype(np.float32))

    return cast


CASTS = {
    "fp16-numpy": by_numpy_half,
    "fp16-torch": by_torch(torch.float16),
    "bf16-torch": by_torch(torch.bfloat16),
    "e4m3-torch": by_torch(torch.float8_e4m3fn),
    "e5m2-torch": by_torch(torch.float8_e5m2),
    "bf16-ml_dtypes": by_ml_dtypes("bfloat16"),
    "e4m3-ml_dtypes": by_ml_dtypes("float8_e4m3fn"),
    "e5m2-ml_dtypes": by_ml_dtypes("float8_e5m2"),
    "e3m2-ml_dtypes": by_ml_dtypes("float6_e3m2fn"),
    "e2m3-ml_dtypes": by_ml_dtypes("float6_e2m3fn"),
    "e2m1-ml_dtypes": by_ml_dtypes("float4_e2m1fn"),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_of_other_libraries(cast: str) -> None:
    name = cast.split("-")[0]
    g = torch.Generator().manual_seed(0)
    spread = torch.randn(20_000, generator=g) * 2.0 ** torch.randint(-40, 40, (20_000,), generator=g)
    for x in (torch.from_numpy(corners(name, np.float32)), spread, torch.arange(-600.0, 600.0) / 7):
        assert same(FLOAT_FORMATS[name].rounded(x), CASTS[cast](x))


@given(st.sampled_from(sorted(CASTS)), st.lists(FLOATS, min_size=1, max_size=30))
def test_casts_of_other_libraries_on_any_floats(cast: str, values: list[float]) -> None:
    assert same(FLOAT_FORMATS[cast.split("-")[0]].rounded(torch.tensor(values)), CASTS[cast](torch.tensor(values)))


# laws


@given(NAMES, st.lists(FLOATS, min_size=1, max_size=30))
def test_rounding_is_idempotent_monotone_and_odd(name: str, values: list[float]) -> None:
    form, x = FLOAT_FORMATS[name], torch.tensor(values).sort().values
    y = form.rounded(x)
    assert same(form.rounded(y), y) and same(form.rounded(-x), -y) and bool((y.diff() >= 0).all())
    assert bool((y.abs() <= form.largest).all())


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_stays_as_it_is(name: str) -> None:
    form = FLOAT_FORMATS[name]
    assert same(form.rounded(torch.from_numpy(VALUES[name])), VALUES[name])  # subnormals among them
    assert same(form.rounded(torch.tensor([0.0, -0.0, -form.smallest / 4])), [0.0, -0.0, -0.0])
    found = form.rounded(torch.tensor([math.nan, -math.inf, math.inf, 1.0]))
    assert found[0].isnan() and found[1:].tolist() == [-form.largest, form.largest, 1.0]
    assert form.rounded(torch.zeros(0, 3)).shape == (0, 3) and form.rounded(torch.tensor(1.0)).shape == ()
    turned = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).permute(2, 0, 1)
    assert same(form.rounded(turned), form.rounded(turned.contiguous()))
    kept = turned.clone()
    form.rounded(turned)
    assert torch.equal(turned, kept)


@given(NAMES, st.sampled_from(DTYPES), st.lists(st.floats(width=16, allow_nan=False), min_size=1, max_size=20))
def test_every_dtype_holds_what_is_rounded_in_it(name: str, dtype: torch.dtype, values: list[float]) -> None:
    form, x = FLOAT_FORMATS[name], torch.tensor(values).to(dtype)
    limit = form.largest_in(dtype)
    want = form.rounded(x.double()).clamp(-limit, limit)  # float64 holds every format
    assert form.rounded(x).dtype == dtype and same(form.rounded(x), want)


def test_the_largest_value_that_format_and_dtype_share() -> None:
    assert FLOAT_FORMATS["fp16"].largest_in(torch.bfloat16) == FLOAT_FORMATS["bf16"].largest_in(torch.float16) == 65280.0
    assert FLOAT_FORMATS["e5m2"].largest_in(torch.float8_e4m3fn) == 448.0
    for name, form in FLOAT_FORMATS.items():
        for dtype in DTYPES:
            most = form.largest_in(dtype)
            assert float(torch.tensor(most, dtype=dtype)) == most and most in VALUES[name]
            above = VALUES[name][VALUES[name] > most]
            assert not bool((torch.from_numpy(above).to(dtype).double() == torch.from_numpy(above)).any())
            assert form.rounded(torch.tensor([math.inf, -math.inf], dtype=dtype)).tolist() == [most, -most]


# gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_pass_inside_the_range_and_stop_outside(name: str, dtype: torch.dtype) -> None:
    most = FLOAT_FORMATS[name].largest_in(dtype)
    x = torch.tensor([-math.inf, -most, -0.3, -0.0, 0.0, 0.77, most, math.inf], dtype=dtype, requires_grad=True)
    y = FLOAT_FORMATS[name].rounded(x)
    (y * torch.arange(1, 9, dtype=dtype)).sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]
    assert same(y.detach(), FLOAT_FORMATS[name].rounded(x.detach()))


def test_gradients_stop_just_beyond_the_range() -> None:
    x = torch.tensor([6.0, 6.5, -7.0], requires_grad=True)
    FLOAT_FORMATS["e2m1"].rounded(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0, 0.0]


# powers of two


@given(st.floats(min_value=0, exclude_min=True, max_value=2.0**1023))
def test_the_power_of_two_at_or_above(scale: float) -> None:
    power = float(power_of_two(torch.tensor(scale, dtype=torch.float64)))
    assert math.frexp(power)[0] == 0.5 and power / 2 < scale <= power


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_of_every_dtype(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    least, top = info.smallest_normal * info.eps, 2.0 ** (math.frexp(info.max)[1] - 1)  # the smallest subnormal, the last power
    powers = torch.tensor([least, info.smallest_normal, 0.25, 1.0, 1024.0, top], dtype=dtype)
    found = power_of_two(powers)
    assert found.dtype == dtype and same(found, powers)
    assert same(power_of_two(powers[1:-1] * (1 + info.eps)), powers[1:-1] * 2)
    assert same(power_of_two(powers[1:] * (1 - info.eps / 2)), powers[1:])
    assert power_of_two(torch.rand(2, 3).to(dtype) + 0.1).shape == (2, 3)
    with pytest.raises(PlanError, match="1 of 2 scales"):
        power_of_two(torch.tensor([1.0, info.max], dtype=dtype))


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_scale_without_a_power_of_two_says_so(scale: float) -> None:
    with pytest.raises(PlanError, match=r"1 of 3 scales, the first .* must be positive and finite"):
        power_of_two(torch.tensor([1.0, scale, 2.0]))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False), min_size=1, max_size=20))
def test_the_power_of_two_at_or_below(values: list[float]) -> None:
    found = power_below(torch.tensor(values, dtype=torch.float64)).tolist()
    assert found == [2.0 ** (math.frexp(v)[1] - 1) if v else 0.0 for v in values]


# errors


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_point_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(PlanError, match=rf"'e4m3' rounds floating-point tensors, not {dtype} \(shape \(2, 3\)\)"):
        FLOAT_FORMATS["e4m3"].rounded(torch.zeros(2, 3, dtype=dtype))


def test_an_unknown_format_says_which_are_known() -> None:
    with pytest.raises(PlanError, match=r"unknown float format 'e4m2'; known: fp16, .*did you mean .*'e4m3'"):
        named_float("e4m2")
    with pytest.raises(PlanError, match="unknown float format 'int8'"):
        named_float("int8")


def test_a_format_is_a_value() -> None:
    mine = FloatFormat("e4m1", 4, 1, 7, 384.0)
    assert mine.bits == 6 and mine.rounded(torch.tensor([5.0, 7.0, 1000.0])).tolist() == [4.0, 8.0, 384.0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.bias = 3  # type: ignore[misc]
