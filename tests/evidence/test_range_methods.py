"""All range methods: what holds for each, what each one means, and what is refused."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shohin.errors import DataError, PlanError
from shohin.evidence import Histogram, grid, quantization_error
from shohin.evidence.calibration import METHODS, chosen_range, observe, range_method, site_methods
from shohin.evidence.histogram import Extremes
from shohin.formats import FORMATS, Quantizer

ALL = (*METHODS, "percentile 99.9")
KINDS = ("normal", "relu", "uniform", "laplace", "long tail", "positive tail", "shifted", "negative", "outlier", "few", "sparse")


def distribution(kind: str, n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, generator=g), torch.rand(n, generator=g)
    return {
        "normal": x,
        "relu": x.relu(),
        "uniform": y - 0.25,
        "laplace": x * (-y.clamp_min(1e-6).log()).sqrt(),
        "long tail": x / (y + 0.02),
        "positive tail": x.exp(),
        "shifted": x + 6,
        "negative": -x.abs() - 1,
        "outlier": torch.cat([x, torch.tensor([90.0])]),
        "few": (x * 2).round(),
        "sparse": torch.where(y < 0.95, torch.zeros(()), x),
    }[kind]


def watched(method: str, *batches: Tensor) -> Histogram | Extremes:
    observer = range_method(method).observer("here")
    for x in batches:
        observer.update(x)
    return observer


@settings(max_examples=250)
@given(
    st.sampled_from(ALL),
    st.sampled_from(KINDS),
    st.sampled_from(["uint8", "int8", "int7", "uint4", "int4", "int2"]),
    st.sampled_from([1e-9, 1e-3, 1.0, 7.3, 1e6]),
    st.sampled_from([1, 2, 17, 400, 3000]),
    st.integers(0, 1000),
)
def test_a_range_holds_zero_and_nothing_that_was_not_seen(method: str, kind: str, form: str, scale: float, n: int, seed: int) -> None:
    x = distribution(kind, n, seed) * scale
    low, high = chosen_range(watched(method, *x.split(101)), FORMATS[form], method)
    assert min(float(x.min()), 0.0) <= low <= 0.0 <= high <= max(float(x.max()), 0.0)
    assert low < high or not bool(x.any()) or kind == "sparse"  # where nearly all is zero, a percentile may be
    step, zero = grid(low, high, FORMATS[form])
    assert step > 0 and FORMATS[form].low <= zero <= FORMATS[form].high


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_minimum_and_maximum(kind: str) -> None:
    x = distribution(kind, 1000, 3)
    observer = watched("minmax", *x.split(77))
    assert (observer.low, observer.high) == (x.numpy().min(), x.numpy().max())
    for seen in (observer, watched("mse", *x.split(77))):  # a histogram has them too
        assert chosen_range(seen, FORMATS["uint8"], "minmax") == (min(x.numpy().min(), 0), max(x.numpy().max(), 0))


def test_moving_is_an_average_of_the_batches() -> None:
    batches = [distribution("normal", 50, s) * (s + 1) for s in range(12)]
    low, high = (float(f(batches[0].numpy())) for f in (np.min, np.max))
    for x in batches[1:]:
        low, high = 0.9 * low + 0.1 * float(x.min()), 0.9 * high + 0.1 * float(x.max())
    assert chosen_range(watched("moving", *batches), FORMATS["uint8"], "moving") == pytest.approx((low, high), rel=1e-12)
    same = watched("moving", *[batches[3]] * 50)
    assert (same.low, same.high) == (float(batches[3].min()), float(batches[3].max()))
    large = torch.cat(batches * 300)  # one batch, however large
    one = METHODS["moving"].observer("")
    observe(one, batches[0])
    observe(one, large)
    assert one.high == pytest.approx(0.9 * float(batches[0].max()) + 0.1 * float(large.max()), rel=1e-12)


@pytest.mark.parametrize("form", ["uint8", "int8", "uint4", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_never_worse_than_minmax(kind: str, form: str) -> None:
    f = FORMATS[form]
    for seed, n in ((0, 300), (1, 5000)):
        x = distribution(kind, n, seed)
        h = watched("mse", x)
        assert isinstance(h, Histogram)
        best, full = (chosen_range(h, f, method) for method in ("mse", "minmax"))
        assert quantization_error(h, *best, f) <= quantization_error(h, *full, f) * (1 + 1e-12)
        errors = []
        for low, high in (best, full):
            scale, zero = grid(low, high, f)
            q = Quantizer(f, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))
            errors.append(float((q.fake(x) - x).double().square().mean()))
        if kind != "few":  # whole numbers can lie on a grid by chance, which a histogram does not see
            assert errors[0] <= errors[1] * 1.03 + 1e-12


@pytest.mark.parametrize("percent", [100, 99.99, 99.9, 99, 90, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_that_of_numpy(kind: str, percent: float) -> None:
    for n in (30, 1000, 20_000):
        x = distribution(kind, n, 4)
        h = watched(f"percentile {percent}", *x.split(333))
        assert isinstance(h, Histogram)
        low, high = chosen_range(h, FORMATS["uint8"], f"percentile {percent}")
        tail = (100 - percent) / 2
        upper = float(np.percentile(x.double().numpy(), 100 - tail, method="inverted_cdf"))
        lower = -float(np.percentile(-x.double().numpy(), 100 - tail, method="inverted_cdf"))
        assert low == pytest.approx(min(lower, 0), abs=h.width) and high == pytest.approx(max(upper, 0), abs=h.width)


def test_percentile_in_words() -> None:
    x = distribution("normal", 50_000, 0)
    h = watched("percentile", x)
    f = FORMATS["uint8"]
    assert chosen_range(h, f, "percentile") == chosen_range(h, f, "percentile 99.99") == chosen_range(h, f, "percentile  99.99 %")
    assert chosen_range(h, f, "percentile 100") == chosen_range(h, f, "minmax")
    assert chosen_range(h, f, "percentile 90")[1] < chosen_range(h, f, "percentile 99")[1] < chosen_range(h, f, "percentile")[1]


@pytest.mark.parametrize("text", ["0", "-1", "0.9999", "49.9", "100.1", "1e9", "nan", "inf", "most", "99 9"])
def test_a_percentile_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"write the per cent of the values to keep, from 50 to 100, such as 'percentile 99\.9'"):
        range_method(f"percentile {text}")


def test_unknown_methods_are_refused() -> None:
    known = "known: mse, percentile, entropy, minmax, moving"
    for text, near in (("entropie", "'entropy'"), ("min-max", "'minmax'"), ("mse 3", "'mse'"), ("percentiles", "'percentile'")):
        with pytest.raises(PlanError, match=f"unknown range method {text!r}; {known}; did you mean {near}"):
            range_method(text)
    for other in ("", "x", None, 3, ("mse",)):
        with pytest.raises(PlanError, match=re.escape(f"unknown range method {other!r}; {known}")):
            range_method(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ALL)
def test_nothing_seen_and_values_that_are_no_numbers(method: str) -> None:
    observer = range_method(method).observer("stem/relu.0")
    observe(observer, torch.zeros(0, 4))
    with pytest.raises(DataError, match=r"no calibration data reached 'stem/relu\.0': give Data\(train=loader\)"):
        chosen_range(observer, FORMATS["uint8"], method)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for x in (torch.tensor([1.0, bad, 2.0]), torch.zeros(1 << 18).index_fill(0, torch.tensor([77_777]), bad)):
            with pytest.raises(DataError, match=r"an activation is NaN or Inf on the calibration data at 'stem/relu\.0': check the data"):
                observe(observer, x)
    observe(observer, torch.tensor([1.0, 2.0]))  # what was refused left no trace
    assert chosen_range(observer, FORMATS["uint8"], "minmax") == (0.0, 2.0)


def test_an_observer_of_another_method_is_refused() -> None:
    x = torch.randn(9)
    for method in ("mse", "percentile", "entropy"):
        with pytest.raises(DataError, match="needs a Histogram"):
            chosen_range(watched("minmax", x), FORMATS["uint8"], method)
    for other in ("minmax", "mse"):
        with pytest.raises(DataError, match="'moving' needs what Extremes"):
            chosen_range(watched(other, x), FORMATS["uint8"], "moving")
    with pytest.raises(DataError, match=r"momentum of a moving average must be in \[0, 1\); got 1"):
        Extremes(1.0)


@pytest.mark.parametrize("form", ["uint8", "int8", "int7", "uint4", "int4"])
@pytest.mark.parametrize("method", ALL)
def test_constants_are_codes(method: str, form: str) -> None:
    """A tensor that never changes, with and without zeros beside it, is held to the rounding of a scale; nothing is divided by zero."""
    f = FORMATS[form]
    for value in (0.0, 3.0, -2.0, 0.1, -1e-30, 1e30, 1e-7):
        for zeros in (0, 5):
            x = torch.cat([torch.full((40,), value), torch.zeros(zeros)])
            scale, zero = grid(*chosen_range(watched(method, x, x), f, method), f)
            q = Quantizer(f, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))
            exact = zeros == 0 or method != "mse"  # a histogram takes the value as spread over its bin
            torch.testing.assert_close(q.fake(x), x, rtol=1e-6 if exact else 1e-2, atol=0.0)
    tiny = watched(method, torch.full((3,), 1e-44))  # float32 has no scale for it
    scale, zero = grid(*chosen_range(tiny, f, method), f)
    q = Quantizer(f, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))
    assert float(q.scale.float()) > 0 and bool(q.fake(torch.tensor([1e-44, 0.0, 1.0])).isfinite().all())


@pytest.mark.parametrize("method", ALL)
def test_memory_does_not_depend_on_the_number_of_batches(method: str) -> None:
    observer = range_method(method).observer("here")
    sizes = []
    for i in range(1000):
        observer.update(distribution("normal", 64, i) * (1 + i / 100))
        if i + 1 in (10, 1000):
            tensors = sum(v.numel() * v.element_size() for v in vars(observer).values() if isinstance(v, Tensor))
            sizes.append((tensors, len(pickle.dumps(observer)) // 100))  # integers take a few bytes more as they grow
    assert sizes[0] == sizes[1]
    assert sizes[0][0] == {"minmax": 0, "moving": 0, "entropy": 131_072}.get(method, 32_768)


def test_large_tensors_are_sampled_with_their_extremes() -> None:
    x = distribution("normal", 1_000_001, 0)
    x[123_457], x[999] = 50.0, -40.0
    h = METHODS["mse"].observer("")
    observe(h, x)
    assert isinstance(h, Histogram) and (h.low, h.high) == (-40.0, 50.0) and 100_000 < h.count < 200_000


def test_patterns_choose_the_methods_of_sites() -> None:
    sites = ["x", "stem/relu.0", "body/relu.0", "head/add.0"]
    shared = {"stem/max_pool2d.0": "stem/relu.0"}

    def names(ranges: object) -> list[str]:
        found = site_methods(ranges, sites, shared)  # type: ignore[arg-type]
        assert list(found) == sites
        return [next(n for n, m in METHODS.items() if m == found[s]) for s in sites]

    assert names("moving") == ["moving"] * 4 and names({}) == ["mse"] * 4
    assert names({"*relu*": "entropy"}) == ["mse", "entropy", "entropy", "mse"]
    assert names({"*": "minmax", "*relu*": "entropy", "body/*": "percentile"}) == ["minmax", "entropy", "percentile", "minmax"]
    assert names({"x": "moving", "*": "minmax"}) == ["minmax"] * 4
    assert names({"stem/*": "moving"}) == ["mse", "moving", "mse", "mse"]  # the pooling has the range of what it pools
    with pytest.raises(PlanError, match=r"the pattern 'body/relu\.1' matches none of 5 names; did you mean 'body/relu\.0'"):
        names({"body/relu.1": "minmax"})
    with pytest.raises(PlanError, match=r"'stem/max_pool2d\.0' has the range of 'stem/relu\.0': write a pattern that matches that one"):
        names({"*pool*": "minmax"})
    with pytest.raises(PlanError, match="unknown range method 'max'"):
        names({"*": "max"})
    with pytest.raises(PlanError, match="unknown range method 7"):
        names(7)
    assert site_methods("mse", [], {}) == {}
