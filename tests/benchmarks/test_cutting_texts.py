"""The benchmark of pruning a text encoder, on an encoder of two small layers, and its verdicts on made-up records."""

import copy
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shohin
from cutting import texts as bench
from cutting.texts import DROP, PATTERNS, ROWS, Headed, Row, merged, moved, pruned, share_left, table, verdicts

WORDS, LENGTH, SIZE = 50, 12, 16


class Bert(nn.Module):
    """Words to vectors: one layer of attention and one of neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=SIZE)
        self.words = nn.Embedding(WORDS, SIZE)
        self.up, self.down, self.norm = nn.Linear(SIZE, 32), nn.Linear(32, SIZE), nn.LayerNorm(SIZE)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> types.SimpleNamespace:
        x = self.words(input_ids)
        return types.SimpleNamespace(last_hidden_state=self.norm(x + self.down(nn.functional.gelu(self.up(x)))))


class Tiny(nn.Module):
    """Words to one vector of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = Bert()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def rows_of_words(count: int, seed: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LENGTH + 1, (count,), generator=g).tolist()
    return [torch.randint(1, WORDS, (n,), generator=g).tolist() for n in lengths]


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def data() -> shohin.Data:
    return bench.batches(rows_of_words(128, 1), LENGTH)


def error(model: nn.Module, teacher: nn.Module) -> float:
    batch = next(bench.batches(rows_of_words(64, 2), LENGTH).calls("train")).kwargs
    with torch.no_grad():
        return float((model(**batch) - teacher(**batch)).square().sum(1).mean())


def test_batches_hold_every_text_in_one_width(data: shohin.Data) -> None:
    calls = list(data.calls("train"))
    lengths = torch.cat([c.kwargs["attention_mask"].sum(1) for c in calls]).tolist()
    assert lengths == [len(row) for row in rows_of_words(128, 1)] and {c.kwargs["input_ids"].shape[1] for c in calls} == {LENGTH}


def test_sparse_rows_come_in_the_demanded_order(teacher: nn.Module, data: shohin.Data) -> None:
    found = {}
    for row in (r for r in ROWS if r.name in [f"unstructured, {way}" for way in bench.ORDER]):
        before = copy.deepcopy(teacher.state_dict())
        model, record = pruned(teacher, row, data)
        found[row.name] = error(model, teacher)
        assert abs(record["left"] - 0.5) < 0.01 and record["bytes"] < bench.dense_bytes(teacher)
        assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert 0 < found["unstructured, SparseGPT"] < min(found["unstructured, Wanda"], found["unstructured, magnitude"])


def test_a_quarter_of_the_neurons_goes_and_compensation_pays(teacher: nn.Module, data: shohin.Data) -> None:
    errors = []
    for name in ("25%, uniform, taylor", "25%, uniform, taylor, cut alone"):
        row = next(r for r in ROWS if r.what == "neurons" and r.name == name)
        model, record = pruned(teacher, row, data)
        assert list(record["widths"].values()) == [24] and record["form"] == "module"
        errors.append(error(model, teacher))
    assert 0 < errors[0] < errors[1]


def test_a_head_lets_the_residual_stream_become_narrower(teacher: nn.Module, data: shohin.Data) -> None:
    assert error(Headed(teacher), teacher) < 1e-12
    with pytest.raises(SystemExit, match="no width"):
        pruned(teacher, Row("width", "x", {"granularity": "width"}, 0.25), data)  # the embedding itself is that wide
    graph = shohin.understand(Headed(teacher).eval(), data)
    assert 0.7 < share_left(graph, "width", 0.25) < 0.8  # type: ignore[arg-type]


def test_what_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = nn.functional.normalize(torch.randn(5, SIZE, generator=torch.Generator().manual_seed(3)), dim=1)
    monkeypatch.setattr(bench, "embed", lambda model, lines: model(vectors))
    wanted, lines = {"a": vectors}, {"a": ["x"] * 5}
    assert abs(moved(nn.Identity(), wanted, lines)["turned"]) < 1e-6 and moved(nn.Identity(), wanted, lines)["squared"] == 0
    opposite = moved(lambda x: -x, wanted, lines)  # type: ignore[arg-type]
    np.testing.assert_allclose([opposite["squared"], opposite["turned"]], [4, 2], rtol=1e-6)


def made_up(what: str, name: str, squared: float, drop: float = 0.0, recover: str | None = "auto") -> dict[str, object]:
    people = {who: {"spearman": 0.5, "drop": drop, "interval": [drop - 0.01, drop + 0.01]} for who in ("words", "news", "mean")}
    held = {"squared": squared, "turned": squared / 2, "kinds": {}}
    fixed = {"left": 0.5, "bytes": 10, "seconds": 1.0, "options": {"recover": recover}}
    return {"what": what, "name": name, "held_out": held, "people": people, **fixed}


@pytest.mark.parametrize(
    ("errors", "met"), [((0.1, 0.2, 0.3), True), ((0.2, 0.1, 0.3), False), ((0.1, 0.3, 0.2), False), ((0.1, 0.1, 0.2), False)]
)
def test_the_order_that_is_demanded(errors: tuple[float, ...], met: bool) -> None:
    for pattern in PATTERNS:
        records = [made_up("sparse", f"{pattern}, {way}", e) for way, e in zip(bench.ORDER, errors, strict=True)]
        assert verdicts(records)[pattern]["met"] is met and pattern not in verdicts(records[1:])


@pytest.mark.parametrize(("drop", "met", "sure"), [(DROP - 0.015, True, True), (DROP - 0.005, True, False), (DROP + 0.001, False, False)])
def test_neurons_are_chosen_by_held_out_texts(drop: float, met: bool, sure: bool) -> None:
    records = [
        made_up("neurons", "25%, uniform, taylor", 0.1, drop),
        made_up("neurons", "25%, planned, taylor", 0.2, -1.0 if not met else 1.0),  # people would choose otherwise
        made_up("neurons", "25%, uniform, taylor, cut alone", 0.05, 0.5, None),
        made_up("neurons", "50%, uniform, taylor", 0.01, 0.5),
    ]
    entry = verdicts(records)["neurons 25%"]
    assert (entry["row"], entry["met"], entry["whole_interval"]) == ("25%, uniform, taylor", met, sure)
    text = table({"words": 0.7, "news": 0.5, "bytes": 20}, records)
    assert text.index("| 50%, uniform, taylor |") < text.index("| 25%, planned, taylor |") and ("not met" in text) is not met


def test_a_new_record_replaces_the_old_one_of_its_row() -> None:
    old = [made_up("neurons", "25%, uniform, taylor", 0.3), made_up("sparse", "2:4, auto", 0.4), made_up("sparse", "no row", 0.4)]
    got = merged(old, made_up("neurons", "25%, uniform, taylor", 0.1))
    assert [(r["name"], r["held_out"]["squared"]) for r in got] == [("2:4, auto", 0.4), ("25%, uniform, taylor", 0.1)]
