"""Grids of weights and rounding by second order: against slow references, and never worse than what they start from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shohin.evidence.hessian import damped
from shohin.formats import Quantizer, Scheme
from shohin.quantization.grids import fitted_grid
from shohin.quantization.rounding import adaround, descended, error_of, gptq, hqq, rescaled
from shohin.quantization.scaling import searched

SCHEMES = [
    "weights int4 group 8",
    "weights uint4 group 8",
    "weights uint3 group 5",
    "weights int2 group 16",
    "weights int8 channel",
    "weights uint4 channel",
    "weights int5 tensor",
]


def layer(seed: int, outputs: int = 6, inputs: int = 22, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A weight ``[O, I]`` and correlated second moments ``[G, I, I]`` of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator).add(0.1)
    mix = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    rows = torch.randn(groups, 200, inputs, generator=generator, dtype=torch.float64) @ mix
    rows *= torch.rand(inputs, generator=generator, dtype=torch.float64).add(0.05)
    return weight, rows.transpose(1, 2) @ rows / 200


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_a_fitted_grid_is_at_least_as_good_as_that_of_the_full_range(text: str, seed: int) -> None:
    weight, _ = layer(seed)
    scheme = Scheme.parse(text)
    q = fitted_grid(weight, scheme)
    parts = {"tensor": [weight.flatten()], "channel": list(weight)}.get(scheme.granularity)
    if parts is None:
        parts = [part for row in weight for part in row.split(scheme.group or 0)]
    assert q.scale.numel() == len(parts) and bool((q.scale > 0).all())
    for part, scale, zero in zip(parts, q.scale.flatten().tolist(), q.zero_point.flatten().tolist(), strict=True):
        x, low, high = part.double().numpy(), q.format.low, q.format.high
        if q.format.symmetric:
            full, offset = max(x.max() / high, x.min() / low, 1e-30), 0
        else:
            full = max((max(x.max(), 0) - min(x.min(), 0)) / (high - low), 1e-30)
            offset = int(np.clip(np.rint(low - min(x.min(), 0) / full), low, high))
        full_error = np.square((np.clip(np.rint(x / full) + offset, low, high) - offset) * full - x).sum()
        error = np.square((np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale - x).sum()
        assert low <= zero <= high
        assert error <= full_error * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("text", SCHEMES)
def test_zeros_stay_zero(text: str) -> None:
    weight, hessian = layer(0)
    weight[:, ::3] = 0.0
    weight[2] = 0.0
    for q in (fitted_grid(weight, Scheme.parse(text)), hqq(weight, Scheme.parse(text))):
        again = q.decoded(q.codes(weight))
        assert bool((again[weight == 0] == 0).all())
        assert torch.equal(q.codes(again), q.codes(weight))
    assert bool(torch.isfinite(error_of(weight, hessian, q, gptq(weight, hessian, q))).all())


def test_what_is_important_gets_the_finer_grid() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([9.0])])[None]
    plain = fitted_grid(weight, Scheme.parse("weights int4 channel"))
    first = fitted_grid(weight, Scheme.parse("weights int4 channel"), torch.cat([torch.full((31,), 1e6), torch.ones(1)]))
    assert float(first.scale) < float(plain.scale)


def reference_gptq(weight: Tensor, hessian: Tensor, q: object, damp: float) -> np.ndarray:
    """Optimal brain quantization in a fixed order, with the inverse Hessian downdated after each column (Frantar et al., 2022)."""
    w = weight.double().numpy().copy()
    scale = q.spread(q.scale.float(), weight.double()).expand(weight.shape).numpy()
    zero = q.spread(q.zero_point, weight.double()).expand(weight.shape).numpy()
    inverse = np.linalg.inv(damped(hessian, damp)[0].numpy())
    codes = np.zeros_like(w)
    for i in range(w.shape[1]):
        codes[:, i] = np.clip(np.rint(w[:, i] / scale[:, i]) + zero[:, i], q.format.low, q.format.high)
        error = (w[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / inverse[i, i]
        w -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("text", SCHEMES)
def test_gptq_in_order_is_optimal_brain_quantization(text: str) -> None:
    weight, hessian = layer(7, inputs=90)  # more than a block of columns
    q = fitted_grid(weight, Scheme.parse(text))
    found = gptq(weight, hessian, q, damp=1e-2, in_order=True).numpy()
    assert (found != reference_gptq(weight, hessian, q, 1e-2)).mean() < 0.01  # ties


def test_the_most_important_columns_are_rounded_first() -> None:
    weight, hessian = layer(3, inputs=40)
    order = hessian[0].diagonal().argsort(descending=True)
    q = fitted_grid(weight, Scheme.parse("weights int4 channel"))
    sorted_codes = gptq(weight[:, order], hessian[:, order][:, :, order], q, in_order=True)
    assert torch.equal(gptq(weight, hessian, q)[:, order], sorted_codes)


def test_without_correlations_gptq_is_rounding_to_the_nearest() -> None:
    weight, _ = layer(1)
    q = fitted_grid(weight, Scheme.parse("weights uint4 group 8"))
    assert torch.equal(gptq(weight, torch.eye(22, dtype=torch.float64)[None], q), q.codes(weight))


@given(st.integers(0, 10_000), st.sampled_from(SCHEMES), st.sampled_from([1, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_each_step_lowers_the_error(seed: int, text: str, groups: int) -> None:
    weight, hessian = layer(seed, groups=groups)
    q = fitted_grid(weight, Scheme.parse(text))
    h = damped(hessian, 1e-2)
    codes = gptq(weight, hessian, q)
    before = error_of(weight, h, q, codes)
    for _ in range(3):
        codes = descended(weight, hessian, q, codes, sweeps=1)
        after = error_of(weight, h, q, codes)
        assert bool((after <= before * (1 + 1e-9) + 1e-12).all())
        new = rescaled(weight, hessian, q, codes)
        assert torch.equal(new.zero_point, q.zero_point) and bool((new.scale > 0).all())
        before, q = error_of(weight, h, new, codes), new
        assert bool((error_of(weight, hessian, new, codes) <= error_of(weight, hessian, q, codes) * (1 + 1e-9)).all())
    assert int(codes.min()) >= q.format.low and int(codes.max()) <= q.format.high


def test_second_order_rounding_beats_the_nearest_by_far_on_correlated_inputs() -> None:
    nearest = first = last = 0.0
    for seed in range(4):
        weight, hessian = layer(seed, 32, 64)
        q = fitted_grid(weight, Scheme.parse("weights uint4 group 16"), hessian[0].diagonal())
        codes = gptq(weight, hessian, q)
        nearest, first = (
            nearest + float(error_of(weight, hessian, q, q.codes(weight)).sum()),
            first + float(error_of(weight, hessian, q, codes).sum()),
        )
        for _ in range(4):
            codes = descended(weight, hessian, q, codes)
            q = rescaled(weight, hessian, q, codes)
        last += float(error_of(weight, hessian, q, codes).sum())
    assert last < 0.9 * first < 0.7 * nearest


@given(st.integers(0, 10_000), st.sampled_from(SCHEMES), st.sampled_from([1, 2, 3]))
@settings(max_examples=15, deadline=None)
def test_adaround_chooses_a_neighbour_and_is_never_worse_than_the_nearest(seed: int, text: str, groups: int) -> None:
    weight, hessian = layer(seed, groups=groups)
    q = fitted_grid(weight, Scheme.parse(text))
    h = damped(hessian, 1e-2)
    codes, nearest = adaround(weight, hessian, q, steps=60), q.codes(weight)
    assert int((codes - nearest).abs().max()) <= 1 and int(codes.min()) >= q.format.low and int(codes.max()) <= q.format.high
    assert bool((error_of(weight, h, q, codes) <= error_of(weight, h, q, nearest) * (1 + 1e-3) + 1e-9).all())


def test_adaround_comes_near_the_best_of_all_choices() -> None:
    """Against every combination of up and down, where inputs are strongly correlated."""
    found = best = nearest = 0.0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, 10, generator=generator)
        few, mix, own = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((400, 3), (3, 10), (400, 10)))
        rows = few @ mix + 0.1 * own
        hessian = (rows.T @ rows / 400)[None]
        q, h = fitted_grid(weight, Scheme.parse("weights int3 channel")), damped(hessian, 1e-2)
        below = torch.floor(weight / q.steps(weight)).to(torch.int64)
        choices = [(below + torch.tensor([[i >> k & 1 for k in range(10)]])).clamp(q.format.low, q.format.high) for i in range(1024)]
        best += min(float(error_of(weight, h, q, c)) for c in choices)
        found += float(error_of(weight, h, q, adaround(weight, hessian, q)))
        nearest += float(error_of(weight, h, q, q.codes(weight)))
    assert best <= found < best + 0.35 * (nearest - best)


def test_scales_along_the_inputs_are_found_where_activations_are_uneven() -> None:
    weight, hessian = layer(0, 32, 64)
    strong = torch.ones(64, dtype=torch.float64)
    strong[::9] = 30.0
    uneven = hessian[0] * strong * strong[:, None]

    def nearest(w: Tensor, h: Tensor) -> tuple[Quantizer, Tensor]:
        q = fitted_grid(w, Scheme.parse("weights int4 group 16"), h[0].diagonal().expand_as(w))
        return q, q.codes(w)

    factors = searched([weight[:16], weight[16:]], uneven, nearest)
    assert factors is not None and factors.shape == (64,) and float(factors.log().mean()) == pytest.approx(0, abs=1e-6)
    assert float(factors[::9].mean()) > 1.5 * float(factors.mean())

    def error(s: Tensor) -> float:
        q, codes = nearest(weight * s, (uneven / (s * s[:, None]))[None])
        d = (q.decoded(codes) / s - weight).double()
        return float(((d @ uneven) * d).sum())

    assert error(factors) < 0.95 * error(torch.ones(64, dtype=torch.float64))
    assert searched([weight], torch.eye(64, dtype=torch.float64), nearest) is None
    assert searched([weight], torch.zeros(64, 64, dtype=torch.float64), nearest) is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", ["weights uint4 group 32", "weights uint2 group 16", "weights uint3 channel"])
def test_hqq_never_loses_in_the_norm_that_it_is_for(seed: int, text: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 64, generator=generator) ** 3
    found, fitted = hqq(weight, Scheme.parse(text)), fitted_grid(weight, Scheme.parse(text))
    norms = [(q.decoded(q.codes(weight)) - weight).abs().pow(0.7).sum(1) for q in (found, fitted)]
    assert bool((norms[0] <= norms[1] * (1 + 1e-6)).all())
