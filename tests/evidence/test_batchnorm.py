"""Recalibration of batch-norm statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shohin.data import Data
from shohin.errors import DataError
from shohin.evidence import recalibrate

torch.set_num_threads(1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5))


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_the_means_over_batches(training: bool) -> None:
    model = net().train(training)
    model[1].eval()
    batches = [torch.randn(8, 3, 12) * 3 + 1 for _ in range(5)]
    weights = [p.clone() for p in model.parameters()]
    assert recalibrate(model, Data(batches), None) == 2
    outputs = [model[0](x) for x in batches]
    mean = torch.stack([o.mean((0, 2)) for o in outputs]).mean(0)
    variance = torch.stack([o.transpose(0, 1).flatten(1).var(1) for o in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert [m.training for m in model] == [training, False, training, training, training, training]
    assert model[1].momentum == 0.1 and model.training is training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert bool(torch.isfinite(model[5].running_var).all())


def test_number_of_samples_is_bounded() -> None:
    model = net()
    recalibrate(model, Data([torch.randn(4, 3, 9) for _ in range(10)]), 10)
    assert int(model[1].num_batches_tracked) == 3


def test_without_batch_norm_nothing_is_run() -> None:
    assert recalibrate(nn.Linear(3, 3), Data(example=(torch.zeros(1),))) == 0
    assert recalibrate(nn.BatchNorm1d(3, track_running_stats=False), Data(example=(torch.zeros(1),))) == 0


def test_failure_puts_the_old_statistics_back() -> None:
    model = net()
    model(torch.randn(8, 3, 12))
    before = {n: b.clone() for n, b in model.named_buffers()}
    bad = torch.randn(4, 3, 12)
    bad[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN or Inf"):
        recalibrate(model, Data([torch.randn(4, 3, 12), bad]))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    pooled = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(DataError, match="two samples or more"):
        recalibrate(pooled, Data([torch.randn(1, 3)]))
    assert torch.equal(pooled[1].running_var, torch.ones(2)) and pooled.training
