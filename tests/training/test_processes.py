"""Two processes that share each batch train as one does, and fail together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import ranked

from two_processes import run_both

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


def both(folder: Path, kind: str) -> list[dict[str, Any]]:
    run_both(ranked.__file__, folder / f"meeting-{kind}", folder, kind)
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    told = both(tmp_path, "plain")
    net = ranked.model(0)
    one = ranked.run(net, slice(None))
    for own in told:
        for there, p in zip(own["weights"], net.parameters(), strict=True):
            assert torch.allclose(torch.tensor(there, dtype=torch.float64), p.detach(), atol=1e-9, rtol=0)
        assert own["quality"] == pytest.approx([r.quality for r in one.history], abs=1e-9)
    assert told[0] == told[1]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["c.safetensors"]
    assert both(tmp_path, "again") == told  # a finished training returns at once, from the one checkpoint


def test_nan_in_one_process_stops_both(tmp_path: Path) -> None:
    first, second = both(tmp_path, "nan")
    assert "the training loss became nan at step 4 (epoch 1, batch 1)" in second["error"]
    assert "process 1 failed" in first["error"] and "step 4" in first["error"]
    assert first["weights"] == second["weights"]
