"""The comparison of understandings on two tiny models, without the peer; what it takes for wrong is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sweep.entry import Entry, floats
from understanding import ours
from understanding.limits import Late, limit, peaks
from understanding.models import build, last_layer, runs
from understanding.peer import Partial, weaken, zero_in_place
from understanding.summary import summary, table
from understanding.trial import trial


class Residual(nn.Module):
    """A convolution and a residual of a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.body(x)).mean((2, 3)))


def _chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 5))


def _entry(name: str) -> Entry:
    made = {"residual": Residual, "chain": _chain}
    return Entry(name, "classification", made[name], lambda batch, g: ((floats(g, batch, 3, 6, 6),), {}))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [trial(_entry(n), 1, 30, with_peer=False) for n in ("residual", "chain")]


def test_records_hold_verdict_seconds_and_memory(records: list[dict[str, Any]]) -> None:
    for record in records:
        own = record["shohin"]
        assert own["verdict"] == "right" and own["form"] == "module" and own["error"] <= ours.TOLERANCE
        assert 0 < own["ratio"] < 0.7
        seconds = own["seconds"]
        assert 0 < seconds["export"] <= seconds["captured"] and seconds["understand"] == pytest.approx(
            seconds["captured"] + seconds["labels"], abs=1e-3
        )
        assert set(own["peak_mb"]) == {"understand", "all"} and own["peak_mb"]["all"] >= own["peak_mb"]["understand"] >= 0


def test_the_summary_counts_by_tool(records: list[dict[str, Any]]) -> None:
    peers = [
        {"verdict": "right", "ratio": 0.3, "seconds": {"understand": 0.1, "cut": 0.1}, "peak_mb": {}},
        {"verdict": "raised", "detail": "no"},
    ]
    both = [{**r, "torch_pruning": p} for r, p in zip(records, peers, strict=True)]
    found = summary(both)
    assert found["shohin"]["verdicts"] == {"right": 2} and found["torch_pruning"]["verdicts"] == {"raised": 1, "right": 1}
    assert found["models_both_finish"] == 1
    assert found["torch_pruning"]["right_and_at_most_70_percent"] == 1
    assert sum(line.startswith(("| residual", "| chain")) for line in table(both).splitlines()) == 2


def test_a_cut_that_is_not_the_oracle_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: nn.Module, graph: Any, plan: Any) -> nn.Module:
        return build(_entry("chain")).double()

    monkeypatch.setattr(ours, "oracle", other)
    assert ours.judged(_entry("chain"))["verdict"] == "wrong"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 4, 3), (2, 6, 5, 5)),
        (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
        (nn.ConvTranspose2d(6, 4, 3), (2, 6, 5, 5)),
        (nn.Linear(6, 4), (2, 6)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_zeroed_slices_are_those_of_the_channel(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    silent = x.clone()
    silent[:, [1, 4]] = 0
    wanted, before = layer(silent), layer(x)
    model = nn.Sequential(layer)
    zero_in_place(model, {"0": {1, 4}})
    assert torch.allclose(model(x), wanted, atol=1e-6) and not torch.allclose(model(x), before, atol=1e-3)


def test_a_replayed_normalization_sees_what_is_left() -> None:
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(6), torch.randn(2, 5, 6)
    nn.init.normal_(norm.weight)
    kept = [0, 2, 3, 5]
    smaller = nn.LayerNorm(4)
    smaller.load_state_dict({k: v[kept] for k, v in norm.state_dict().items()})
    got = Partial(norm, [1, 4])(x)
    assert torch.allclose(got[..., kept], smaller(x[..., kept])) and not got[..., [1, 4]].any()
    model = nn.Sequential(nn.Linear(6, 6), norm)
    weaken(model, {"0": {1}, "1": {1, 4}})
    assert not model[0](x)[..., 1].any() and model[0](x)[..., 4].any() and isinstance(model[1], Partial)


def test_the_final_classifier_is_found_and_a_broken_model_is_said_to_break() -> None:
    entry = _entry("chain")
    model = build(entry)
    assert last_layer(model, entry.arguments(2, 0)) is model[-1]
    assert runs(model, entry, double=False) == ""
    model[-1] = nn.Linear(11, 5)
    assert runs(model, entry, double=False).startswith("batch 1: RuntimeError")


def test_time_is_limited_even_where_errors_are_swallowed() -> None:
    with pytest.raises(Late), limit(1):
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue


def test_memory_of_a_step_is_what_it_holds() -> None:
    def steps(note: Any) -> None:
        note("before")
        held = torch.ones(2**23)  # 32 MB
        note("held")
        del held

    found = peaks(steps, 10)
    if not found:
        pytest.skip("this system cannot reset the peak of resident memory")
    assert found["before"] < 8 and 28 < found["held"] < 48
