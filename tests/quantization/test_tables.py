"""Tables of embeddings in 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.data import Call
from shohin.errors import PlanError, TargetError
from shohin.formats import Quantizer
from shohin.program import capture
from shohin.quantization import QAT, AwareModule, quantize_layers, tables
from shohin.targets import get_target


class Words(nn.Module):
    """Two tables, one of which is looked up twice, and positions; the head may be tied to the words."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16, padding_idx=0), nn.Embedding(12, 16)
        self.register_buffer("numbers", torch.arange(12)[None])
        self.a, self.head = nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        with torch.no_grad():
            self.words.weight[3] *= 100
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        x = self.words(tokens) + self.words(kinds) + self.places(self.numbers[:, : tokens.shape[1]])
        out: Tensor = self.head(torch.tanh(self.a(x)).mean(1))
        return out


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [{"tokens": torch.randint(0, 50, (4, 9)), "kinds": torch.randint(0, 50, (4, 9))} for _ in range(4)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Words().eval()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("form", ["int8", "weights uint4 group 16"])
def test_files_hold_rows_in_8_bits(model: nn.Module, form: str, target: str, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    data = shohin.Data(train=batches())
    plain = shohin.export(shohin.quantize(model, data, {"*": form, "*/embedding.*": "float32"}, target), data, target, tmp_path / "f.onnx")
    found = shohin.quantize(model, data, form, target)
    shipped = shohin.export(found, data, target, tmp_path / "q.onnx")
    assert {a for a, f in found.plan.formats.items() if f == "weights int8 channel"} == {
        "words/embedding.0",
        "words/embedding.1",
        "places/embedding.0",
    }
    assert shipped.notes["parity"]["departs"] == [] and shipped.notes["parity"]["boundaries"]["view_runtime"]["max_rel"] < 1e-3
    assert plain.metrics.size_bytes is not None and shipped.metrics.size_bytes is not None
    saved = plain.metrics.size_bytes.value - shipped.metrics.size_bytes.value
    assert saved > (50 + 12) * (16 * 3 - 4) - 2500  # names and operators take bytes too
    again = shohin.export(found, data, target, tmp_path / "again.onnx")
    assert again.artifact is not None and shipped.artifact is not None
    assert again.artifact.read_bytes() == shipped.artifact.read_bytes()


def test_each_row_has_its_own_steps(model: nn.Module) -> None:
    assert isinstance(model.words, nn.Embedding)
    with torch.no_grad():
        model.words.weight[7] = 0.0
    found = shohin.quantize(model, shohin.Data(example=tuple(batches()[0].values())), {"*embedding*": "weights int4 group 16"})
    assert found.model is not None and isinstance(found.model.words, nn.Embedding)
    before, after = model.words.weight, found.model.words.weight
    assert bool(((after - before).abs() <= before.abs().amax(1, keepdim=True) / 127 / 2 * 1.0001).all()) and not bool(after[7].any())
    assert torch.equal(found.model.a.weight, model.a.weight)  # type: ignore[union-attr]
    with pytest.raises(PlanError, match="matches none"):
        shohin.quantize(model, shohin.Data(train=batches()), {"*embeding*": "int8"})


def test_a_table_that_a_layer_multiplies_with_is_left_and_named() -> None:
    torch.manual_seed(0)
    model = Words(tied=True).eval()
    program = capture(model, Call((), batches()[0], None, batches()[0]["tokens"]))
    assert set(tables(program)) == {"places/embedding.0"}
    found = shohin.quantize(model, shohin.Data(train=batches()), "weights uint4 group 16")
    assert "words.weight" in found.notes["float"]


@pytest.mark.parametrize("smoothing", [True, False])
def test_a_head_on_integers_that_is_tied_to_a_table_ships(smoothing: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Words(tied=True).eval(), shohin.Data(train=batches())
    found = shohin.quantize(model, data, smoothing=smoothing)
    assert found.plan.formats["head/linear.0"] == "int8" and "words/embedding.0" not in found.plan.formats
    shipped = shohin.export(found, data, path=tmp_path / "m.onnx")
    assert shipped.notes["parity"]["departs"] == [] and shipped.notes["parity"]["boundaries"]["view_runtime"]["max_rel"] < 1e-3
    planned = shohin.quantize(model, data, ("int8",), smoothing=smoothing, budget="size <= 3x", sensitivity="output")
    assert "int8" in planned.notes["sensitivity"]["head/linear.0"]


def test_tables_are_trained_as_they_are_held(model: nn.Module) -> None:
    calls = [Call((), batch, None, batch["tokens"]) for batch in batches()]
    program = capture(model, calls[0])
    formats = {**dict.fromkeys(tables(program), "weights int8 channel"), "a/linear.0": "int8", "head/linear.0": "int8"}
    module = AwareModule(program, quantize_layers(program, calls, formats), QAT())
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for call in calls * 3:
        optimizer.zero_grad()
        (module(**call.kwargs) - 1).square().mean().backward()
        optimizer.step()
    found = module.eval().quantized()
    table = found.program.tensors["words.weight"]
    assert not torch.equal(table, model.words.weight) and torch.equal(found.weights["words.weight"].fake(table), table)  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(found.view().eval()(**calls[0].kwargs), module(**calls[0].kwargs), rtol=1e-2, atol=1e-2)


def test_another_grid_of_a_table_is_refused(model: nn.Module, tmp_path: Path) -> None:
    q = Quantizer(shohin.formats.named_format("int8"), torch.tensor(0.1, dtype=torch.float64), torch.tensor(0))
    with pytest.raises(TargetError, match=r"words.weight.*scale for each row"):
        get_target("onnxruntime").lower(model, tuple(batches()[0].values()), tmp_path / "m.onnx", weights={"words.weight": q})
