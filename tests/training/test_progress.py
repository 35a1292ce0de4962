"""The progress bar: on a terminal it tells epoch, loss and quality; elsewhere it is silent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from shohin.data import Data
from shohin.training import TrainConfig, train

SCRIPT = """
import torch
from torch import nn
from shohin.data import Data
from shohin.training import TrainConfig, train
train(nn.Linear(2, 1), Data([torch.randn(4, 2)] * 3), lambda m, c, g: (m(*c.args).square().mean(), {}), TrainConfig(epochs=2),
      evaluate=lambda m: 0.25, progress=True)
"""


def run(progress: bool) -> None:
    torch.manual_seed(0)
    train(
        nn.Linear(2, 1),
        Data([torch.randn(4, 2)]),
        lambda m, c, g: (m(*c.args).square().mean(), {}),
        TrainConfig(epochs=2),
        progress=progress,
    )


@pytest.mark.parametrize("progress", [True, False])
def test_silent_without_a_terminal(progress: bool, capfd: pytest.CaptureFixture[str]) -> None:
    run(progress)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_on_a_terminal_it_tells_epoch_loss_and_quality() -> None:
    parent, child = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=child, stdout=subprocess.PIPE, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            block = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(parent)
    assert process.wait(30) == 0
    text = shown.decode(errors="replace")
    assert "epoch 2/2" in text and "loss" in text and "best 0.25" in text
    assert process.stdout is not None and process.stdout.read() == b""
    process.stdout.close()
