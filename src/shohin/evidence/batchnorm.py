"""Batch-norm statistics anew, after weights or widths have changed (as in slimmable networks, Yu & Huang, 2019)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shohin.data import Data
from shohin.errors import DataError


def recalibrate(model: nn.Module, data: Data, samples: int | None = 1024) -> int:
    """Replaces running means and variances by their averages over training batches, in place.

    Only batch norms that track statistics run in train mode; all else is in eval mode. Batches count equally, so they should
    have one size. Modes and momenta are given back.

    Args:
        model: with `nn.BatchNorm1d`, `2d` or `3d` modules; others are left alone.
        data: batches of ``train``.
        samples: about this many of them; None is all.

    Returns:
        How many layers were recalibrated; 0 if there is none, and then nothing is run.

    Raises:
        DataError: if a layer sees one value per channel, or a statistic becomes NaN or Inf (the old ones are put back).
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None]
    if not layers:
        return 0
    modes = [(m, m.training) for m in model.modules()]
    momenta = [layer.momentum for layer in layers]
    saved = [{name: t.clone() for name, t in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the cumulative average
            layer.train()
        with torch.no_grad():
            for call in data.calls("train", samples):
                model(*call.args, **call.kwargs)
        for layer in layers:
            if not all(bool(torch.isfinite(t).all()) for t in layer.buffers(recurse=False)):
                raise DataError("batch-norm statistics became NaN or Inf on the calibration data: check the data and the weights")
    except BaseException as error:
        for layer, old in zip(layers, saved, strict=True):
            for name, t in layer.named_buffers(recurse=False):
                t.copy_(old[name])
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise DataError("a batch norm sees one value per channel: use batches of two samples or more") from error
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return len(layers)
