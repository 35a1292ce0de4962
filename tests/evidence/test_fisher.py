"""Saliencies against per-sample gradients and true removals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.errors import DataError
from shohin.evidence import UnitSaliency, gate_gradients, unit_contributions, unit_saliency

torch.set_num_threads(1)


def conv_net() -> tuple[nn.Sequential, dict[str, dict[int, Tensor]], Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3)).double()
    each = torch.arange(6).unsqueeze(1)
    slices = {"0.weight": {0: each}, "0.bias": {0: each}, "3.weight": {1: torch.arange(96).reshape(6, 16)}}
    return net, slices, torch.randn(12, 2, 6, 6).double(), torch.randint(0, 3, (12,))


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_sum_of_squared_group_contributions_by_hand() -> None:
    net, slices, x, y = conv_net()
    params = dict(net.named_parameters())
    batches = [gradients(net, x[i : i + 1], y[i : i + 1]) for i in range(4)]
    expected = torch.zeros(6, dtype=torch.float64)
    for g in batches:
        for u in range(6):
            s = (g["0.weight"][u] * params["0.weight"][u]).sum() + g["0.bias"][u] * params["0.bias"][u]
            s += (g["3.weight"][:, 16 * u : 16 * u + 16] * params["3.weight"][:, 16 * u : 16 * u + 16]).sum()
            expected[u] += s.detach() ** 2
    torch.testing.assert_close(unit_saliency(params, batches, slices), expected)


def test_obd_by_hand() -> None:
    net, slices, x, y = conv_net()
    params = dict(net.named_parameters())
    only = {"0.weight": slices["0.weight"]}
    saliency = UnitSaliency(only)
    batches = [gradients(net, x[i : i + 1], y[i : i + 1]) for i in range(5)]
    for g in batches:
        saliency.update(params, g)
    fisher = torch.stack([g["0.weight"] ** 2 for g in batches]).mean(0)
    torch.testing.assert_close(saliency.obd(), (0.5 * fisher * params["0.weight"].detach() ** 2).sum((1, 2, 3)))


def test_gates_equal_parameter_contributions_of_the_producer() -> None:
    """For a ReLU unit, sum of g*w over its incoming weights and bias equals the gradient of a gate on its output."""
    net, slices, x, y = conv_net()
    producer = {name: slices[name] for name in ("0.weight", "0.bias")}
    params = dict(net.named_parameters())
    per_sample = torch.stack([unit_contributions(params, gradients(net, x[i : i + 1], y[i : i + 1]), producer) for i in range(12)])
    hidden = net[1](net[0](x))
    hidden.retain_grad()
    F.cross_entropy(net[3](net[2](hidden)), y).backward()
    gates = gate_gradients(hidden, hidden.grad)
    torch.testing.assert_close(gates, per_sample)
    saliency = UnitSaliency({})
    saliency.update_gates(gates[:5])
    saliency.update_gates(gates[5:])
    torch.testing.assert_close(saliency.taylor(), per_sample.square().mean(0))
    torch.testing.assert_close(saliency.first_order(), per_sample.mean(0))
    with pytest.raises(DataError):
        saliency.obd()


def test_first_order_predicts_a_small_change_of_the_loss() -> None:
    net, slices, x, y = conv_net()
    params = dict(net.named_parameters())
    grads = gradients(net, x, y)
    producer = {name: slices[name] for name in ("0.weight", "0.bias")}
    s = unit_contributions(params, grads, producer)
    base = F.cross_entropy(net(x), y).item()
    for u in range(6):
        with torch.no_grad():
            old = params["0.weight"][u].clone(), params["0.bias"][u].clone()
            params["0.weight"][u] *= 1 - 1e-6
            params["0.bias"][u] *= 1 - 1e-6
            change = F.cross_entropy(net(x), y).item() - base
            params["0.weight"][u], params["0.bias"][u] = old
        assert change == pytest.approx(-1e-6 * float(s[u]), rel=1e-3, abs=1e-11)


def test_batch_scaling_keeps_noise_gradients_comparable() -> None:
    """With independent zero-mean gradients, the value does not depend on the batch size."""
    torch.manual_seed(0)
    w = {"w": torch.ones(4, 3)}
    noise = torch.randn(4096, 4, 3)
    units = {"w": {0: torch.arange(4).unsqueeze(1)}}
    single, batched = UnitSaliency(units), UnitSaliency(units)
    for g in noise[:2048]:
        single.update(w, {"w": g})
    for g in noise.reshape(512, 8, 4, 3).mean(1):
        batched.update(w, {"w": g}, samples=8)
    torch.testing.assert_close(single.taylor(), torch.full((4,), 3.0).double(), rtol=0.2, atol=0)
    torch.testing.assert_close(batched.taylor(), single.taylor(), rtol=0.25, atol=0)


def test_refusals() -> None:
    w = {"a": torch.ones(4, 2), "b": torch.ones(3)}
    each = torch.arange(4).unsqueeze(1)
    with pytest.raises(DataError, match="has a gradient"):
        unit_contributions(w, {}, {"a": {0: each}})
    with pytest.raises(DataError, match="NaN or Inf"):
        unit_contributions(w, {"a": torch.full((4, 2), float("nan"))}, {"a": {0: each}})
    with pytest.raises(DataError, match="3 units, the others 4"):
        unit_contributions(w, w, {"a": {0: each}, "b": {0: torch.arange(3).unsqueeze(1)}})
    with pytest.raises(DataError, match="no gradients"):
        UnitSaliency({}).taylor()
