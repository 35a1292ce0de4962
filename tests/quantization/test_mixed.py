"""Mixed precision: sensitivities, exact choices, and files that keep their budget."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import target_nets as nets
import torch
from torch import Tensor, nn

import shohin
from shohin.errors import BudgetError, DataError, PlanError
from shohin.pipeline import mixed
from shohin.planning.formats import FormatSite, choices_to_time, choose, features, fitted_times, predicted
from shohin.program import capture
from shohin.quantization import quantizable, quantize_layers
from shohin.quantization.sensitivity import MEASURES, sensitivity


def site(name: str, losses: dict[str, float], sizes: dict[str, float], source: str | None = None, macs: float = 1e6) -> FormatSite:
    return FormatSite(name, "convolution", {"float32": 0.0, **losses}, {"float32": 400.0, **sizes}, macs, 1e4, source, frozenset({"int8"}))


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    """Beside every assignment, with bounds on size and time, boundaries between floats and codes included."""
    random = np.random.default_rng(seed)
    sites, last = [], None
    for number in range(5):
        losses = {form: float(random.uniform(0.1, 2)) for form in ("int8", "weights int4 group 32")}
        sites.append(site(f"l{number}", losses, {"int8": 110.0, "weights int4 group 32": 60.0}, last, float(random.uniform(1e5, 1e6))))
        last = f"l{number}" if random.uniform() < 0.7 else None
    rates = {"fixed": 0.1, "convolution, float32": 1e-6, "convolution, int8": 3e-7, "convolution, weights int4 group 32": 1.1e-6}
    rates["boundary"] = 5e-6
    choices = choices_to_time(sites, ("int8", "weights int4 group 32"), 14, seed)

    def milliseconds(chosen: dict[str, str]) -> float:
        return sum(rates[key] * amount for key, amount in features(sites, chosen).items())

    times = fitted_times(sites, choices, [milliseconds(c) for c in choices])
    whole = {s.name: "float32" for s in sites}
    assert predicted(sites, whole, times) == pytest.approx(milliseconds(whole), rel=0.02)
    bounds = {"size_bytes": 1200.0, "latency_ms": 0.8 * predicted(sites, whole, times)}
    chosen, solution = choose(sites, bounds, 100.0, times)

    def fits(c: dict[str, str]) -> bool:
        small = 100 + sum(s.sizes[c[s.name]] for s in sites) <= bounds["size_bytes"] * (1 + 1e-9)
        return small and predicted(sites, c, times) <= bounds["latency_ms"] * (1 + 1e-9)

    every = [dict(zip([s.name for s in sites], forms, strict=True)) for forms in itertools.product(*(s.formats for s in sites))]
    able = [sum(s.losses[c[s.name]] for s in sites) for c in every if fits(c)]
    assert solution.feasible == bool(able)
    if able:
        assert fits(chosen) and solution.objective == pytest.approx(min(able), abs=1e-9)


class Uneven(nn.Module):
    """A residual network of which one layer bears no rounding: it multiplies what is then taken away again."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.fragile = nets.Residual2d(norm=True), nn.Conv2d(3, 3, 1)
        nn.init.eye_(self.fragile.weight.data[:, :, 0, 0])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(100 * self.fragile(x) - 99 * x)
        return out


@pytest.fixture(scope="module")
def uneven() -> tuple[nn.Module, shohin.Data]:
    torch.manual_seed(0)
    return Uneven().eval(), shohin.Data(train=[torch.randn(8, 3, 12, 12) for _ in range(4)])


@pytest.mark.parametrize("measure", MEASURES)
def test_sensitivities_see_the_fragile_layer(uneven: tuple[nn.Module, shohin.Data], measure: str) -> None:
    model, data = uneven
    calls = list(data.calls("train"))
    program = capture(model, calls[0])
    forms = {form: quantize_layers(program, calls, dict.fromkeys(quantizable(program), form)) for form in ("int8", "w4a4")}
    found = sensitivity(program, forms, calls, measure)
    assert found.keys() == set(quantizable(program))
    assert all(losses["w4a4"] > losses["int8"] >= 0 for losses in found.values())
    if measure != "output":  # at its own output it is a layer like others
        assert max(found, key=lambda a: found[a]["int8"]) == "fragile/conv2d.0"


def test_first_order_sensitivities_agree_with_what_is_measured(uneven: tuple[nn.Module, shohin.Data]) -> None:
    model, data = uneven
    calls = list(data.calls("train"))
    program = capture(model, calls[0])
    forms = {"int8": quantize_layers(program, calls, dict.fromkeys(quantizable(program), "int8"))}
    first, measured = (sensitivity(program, forms, calls, measure) for measure in ("fisher", "kl"))
    order = [sorted(found, key=lambda a, f=found: f[a]["int8"]) for found in (first, measured)]  # type: ignore[misc]
    ranks = [[names.index(a) for a in first] for names in order]
    assert np.corrcoef(ranks)[0, 1] > 0.8


def test_a_file_keeps_its_size_with_the_least_loss(uneven: tuple[nn.Module, shohin.Data], tmp_path: Path) -> None:
    model, data, target = *uneven, "onnxruntime"
    plain = shohin.export(model, data, target, tmp_path / "f.onnx")
    assert plain.metrics.size_bytes is not None
    bound = 0.8 * plain.metrics.size_bytes.value
    found = shohin.quantize(model, data, ("int8",), target, budget=f"size <= {bound} b")
    shipped = shohin.export(found, data, target, tmp_path / "q.onnx")
    assert shipped.metrics.size_bytes is not None and found.metrics.size_bytes is not None
    assert found.notes["met"] and shipped.metrics.size_bytes.value == found.metrics.size_bytes.value <= bound
    assert shipped.notes["parity"]["departs"] == []
    assert found.plan.formats and "fragile/conv2d.0" not in found.plan.formats
    assert found.notes["planned"]["rounds"][-1]["gap"] == 0


def test_time_is_bounded_and_what_cannot_be_is_said(uneven: tuple[nn.Module, shohin.Data], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = uneven
    monkeypatch.setattr(mixed, "TIMED", 1)
    found = shohin.quantize(model, data, ("int8",), budget="latency <= 1 %, size <= 500 kb")
    assert not found.notes["met"] and found.notes["unmet"][0].startswith("latency_ms") and found.metrics.latency_ms is not None
    assert found.notes["planned"]["timed"] >= 2
    easy = shohin.quantize(model, data, ("int8", "float32"), budget="latency <= 3x")
    assert easy.notes["met"] and not easy.plan.formats  # what need not be rounded is not


def test_a_layer_that_the_runtime_computes_in_floats_is_not_planned_on_integers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 160), nn.ReLU(), nn.Linear(160, 4)).eval()
    data = shohin.Data(train=[torch.randn(8, 12) for _ in range(3)])
    found = shohin.quantize(model, data, ("int8",), budget="size <= 95 %")
    assert found.notes["floats"] == [] or not found.notes["met"]
    assert found.notes["planned"]["rounds"][0]["formats"].keys() == {"0/linear.0", "2/linear.0"}


def test_answers_without_gradients_are_judged_at_the_layers(uneven: tuple[nn.Module, shohin.Data]) -> None:
    _, data = uneven
    calls = list(data.calls("train"))
    torch.manual_seed(0)
    program = capture(nets.Decided(Uneven()).eval(), calls[0])
    forms = {"int8": quantize_layers(program, calls, dict.fromkeys(quantizable(program), "int8"))}
    assert all(losses["int8"] > 0 for losses in sensitivity(program, forms, calls).values())


def test_wishes_that_contradict_each_other(uneven: tuple[nn.Module, shohin.Data]) -> None:
    model, data = uneven
    with pytest.raises(PlanError, match="under a budget"):
        shohin.quantize(model, data, ("int8", "w4a8"))
    with pytest.raises(PlanError, match="nothing to decide"):
        shohin.quantize(model, data, {"*": "int8"}, budget="size <= 1 mb")
    with pytest.raises(PlanError, match="target=None has none"):
        shohin.quantize(model, data, ("int8",), None, budget="size <= 1 mb")
    with pytest.raises(BudgetError, match="size and latency"):
        shohin.quantize(model, data, ("int8",), budget="drop <= 1 %")
    with pytest.raises(PlanError, match="under a budget"):
        shohin.quantize(model, data, sensitivity="kl")
    with pytest.raises(PlanError, match="at least one other"):
        shohin.quantize(model, data, "float32", budget="size <= 50 %")
    with pytest.raises(PlanError, match="sensitivity='hessian'"):
        shohin.quantize(model, data, ("int8",), budget="size <= 50 %", sensitivity="hessian")
    with pytest.raises(PlanError, match="w4a4"):
        shohin.quantize(model, data, ("int8", "w4a4"), budget="size <= 50 %")
    with pytest.raises(DataError, match="batches"):
        shohin.quantize(model, shohin.Data(example=(torch.randn(2, 3, 12, 12),)), ("int8",), budget="size <= 50 %")


def test_layers_that_share_a_weight_are_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))
            return out

    torch.manual_seed(0)
    data = shohin.Data(train=[torch.randn(8, 32) for _ in range(3)])
    found = shohin.quantize(Twice().eval(), data, ("weights uint4 group 16",), budget="size <= 70 %")
    assert {"a/linear.0", "a/linear.1"} <= found.plan.formats.keys() and found.notes["met"]
    assert "a/linear.1" not in found.notes["sensitivity"]
