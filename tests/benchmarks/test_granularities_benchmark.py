"""The benchmark of granularities: what it measures with, and its tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import shohin
from cutting.granularities import CHAIN, HERE, granularity_table, operation, page, pruned, width_rows, width_table
from shohin.targets import timing


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(("kind", "shape"), [("convolution", (1, 24, 14, 14)), ("linear", (32, 24))])
def test_operations_run_in_their_precision(tmp_path: Path, kind: str, shape: tuple[int, ...], precision: str) -> None:
    path = tmp_path / "one.onnx"
    operation(kind, precision, 24, path)
    (out,) = timing.session(str(path), 1).run(None, {"x": np.ones(shape, np.float32)})
    assert out.shape == shape and np.abs(out).max() > 0
    kernels = [row.op for row in shohin.Target("onnxruntime").inspect(path)]
    integer = sum(op.startswith(("QLinear", "QGemm", "MatMulInteger")) for op in kernels)
    assert integer == (CHAIN if precision == "int8" else 0), kernels


def test_wider_operations_take_longer(tmp_path: Path) -> None:
    narrow, wide = width_rows(tmp_path, (16, 64), rounds=20)
    assert [narrow["width"], wide["width"]] == [16, 64] and len(wide) == 5
    assert all(0 < narrow[name] < wide[name] for name in wide if name != "width")
    lines = width_table([narrow, wide], (16, 64))
    assert len(lines) == 4 and lines[-1].count("1.00") == 4


def test_what_a_network_has_not_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    data = shohin.Data(train=[torch.randn(16, 8)])
    said, found = pruned(model, data, "head"), pruned(model, data, "neuron")
    assert isinstance(said, str) and "head" in said
    assert not isinstance(found, str) and found[0] <= 0.5


def test_the_page_is_that_of_the_records_and_of_the_docs() -> None:
    records = json.loads((HERE / "granularities.json").read_text("utf-8"))
    assert (HERE / "granularities.md").read_text("utf-8") == page(records)
    docs = (HERE.parent / "docs" / "pruning.md").read_text("utf-8")
    for table in (granularity_table(records["rows"]), width_table(records["widths"])):
        assert len(table) > 10 and "\n".join(table) in docs
