"""The verbs beside `optimize`: each returns a candidate, keeps what it was asked, and leaves the user's model alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import shohin
import small_models as models
from shohin.data import Data
from shohin.errors import DataError, ModelError, PlanError, RunError, TargetError

CLASSES = 4


class Small(nn.Module):
    """A residual 2-d net with batch norm, depthwise convolution and a hidden linear layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depth, self.norm1 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width)
        self.point, self.norm2 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.hidden, self.head = nn.Linear(2 * width, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm2(self.point(F.relu(self.norm1(self.depth(x))))))
        return self.head(F.relu(self.hidden(F.relu(self.last(x)).mean((2, 3)))))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stripes in noise: their direction and their width are the class."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=g)
    along = torch.arange(8) * 0.7854 * (1 + y % 2).reshape(-1, 1) + 6.2832 * torch.rand(count, 1, generator=g)
    wave = torch.where((y < 2).reshape(-1, 1, 1), along.sin()[:, None, :].expand(-1, 8, 8), along.sin()[:, :, None].expand(-1, 8, 8))
    x = wave[:, None] + 0.9 * torch.randn(count, 3, 8, 8, generator=g)
    return x, y


class Task:
    model: nn.Module
    data: Data


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOHIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def task() -> Task:
    made = Task()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made.model = Small()
        x, y = images(512, 1)
        optimizer = torch.optim.AdamW(made.model.parameters(), 4e-3)
        for _ in range(4):
            for i in torch.randperm(512).split(64):
                optimizer.zero_grad()
                F.cross_entropy(made.model(x[i]), y[i]).backward()
                optimizer.step()
        made.model.zero_grad(set_to_none=True)
        made.model.eval()
    batches = [(a, b) for a, b in zip(x.split(64), y.split(64), strict=True)]
    held = images(256, 2)
    made.data = Data(batches, [held])
    assert made.data.quality(made.model) > 0.8
    return made


@pytest.fixture
def untouched(task: Task) -> Iterator[None]:
    """The user's model and the random state are after the verb as they were before."""
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    modes, random = [m.training for m in task.model.modules()], torch.get_rng_state()
    yield
    assert all(torch.equal(t, before[n]) for n, t in task.model.state_dict().items())
    assert [m.training for m in task.model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in task.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def snr(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.detach(), other.detach()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum().clamp_min(1e-30)))


# prune


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
@pytest.mark.parametrize(("of", "keep"), [("macs", 0.5), ("params", 0.5), ("macs", 0.25)])
def test_prune_keeps_what_it_was_asked(task: Task, criterion: str, of: str, keep: float) -> None:
    found = shohin.prune(task.model, task.data, keep=keep, of=of, criterion=criterion, recover=None)
    assert found.model is not None and isinstance(found.model, Small) and found.notes["form"] == "module"
    whole, small = (shohin.understand(m, task.data) for m in (task.model, found.model))
    left = {
        "macs": small.macs() / whole.macs(),
        "params": sum(p.numel() for p in found.model.parameters()) / sum(p.numel() for p in task.model.parameters()),
    }
    assert 0.5 * keep < left[of] <= keep + 1e-9
    values = found.metrics.values()
    assert values["macs"] == pytest.approx(small.macs()) and values["params"] == sum(p.numel() for p in found.model.parameters())
    for name, units in found.plan.widths.items():
        assert len(units) % 8 == 0, name


def without(tensor: Tensor, removed: dict[int, list[int]]) -> Tensor:
    for axis, gone in removed.items():
        tensor = tensor.index_select(axis, torch.tensor([i for i in range(tensor.shape[axis]) if i not in set(gone)]))
    return tensor


def test_prune_without_recovery_only_removes(task: Task) -> None:
    found = shohin.prune(task.model, task.data, keep=0.5, recover=None)
    assert found.model is not None and found.removed
    state = found.model.state_dict()
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(without(tensor, found.removed.get(name, {})), state[name]), name
    assert set(found.removed) == {n for n, t in task.model.state_dict().items() if t.shape != state[n].shape}
    x = images(4, 9)[0]
    torch.testing.assert_close(found.model(x), shohin.view(task.model, found.plan)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.model(x), shohin.cut(task.model, found.plan)(x))


@pytest.mark.usefixtures("untouched")
def test_recovery_wins_accuracy_back(task: Task) -> None:
    kinds: tuple[str | None, ...] = (None, "compensate", "distill")
    found = {r: shohin.prune(task.model, task.data, keep=0.15, criterion="magnitude", recover=r, epochs=6) for r in kinds}
    assert len({c.plan for c in found.values()}) == 1
    quality = {r: task.data.quality(c.model.eval()) for r, c in found.items() if c.model is not None}
    assert quality[None] + 0.05 < quality["compensate"] < quality["distill"], quality
    assert found["distill"].notes["training"]["history"]


def test_prune_is_the_same_twice(task: Task) -> None:
    once, again = (shohin.prune(task.model, task.data, keep=0.4) for _ in range(2))
    assert once.plan == again.plan and once.model is not None and again.model is not None
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in once.model.state_dict().items())


def test_prune_by_magnitude_needs_no_data_and_keeping_all_changes_nothing(task: Task) -> None:
    x = images(4, 9)[0]
    alone = shohin.prune(task.model, Data(example=(x,)), keep=0.5, criterion="magnitude")
    bare = shohin.prune(task.model, task.data, keep=0.5, criterion="magnitude", recover=None)
    assert alone.plan == bare.plan and alone.model is not None and bare.model is not None
    torch.testing.assert_close(alone.model(x), bare.model(x))  # without batches "auto" recovers nothing, and with them it does
    made = [shohin.prune(task.model, task.data, keep=0.5, criterion="magnitude", **how).model for how in ({}, {"recover": "compensate"})]
    assert made[0] is not None and made[1] is not None and torch.equal(made[0](x), made[1](x))
    assert not torch.allclose(made[0](x), bare.model(x))
    whole = shohin.prune(task.model, task.data, keep=1.0)
    assert whole.plan.is_identity and whole.model is not None and not whole.removed
    torch.testing.assert_close(whole.model(x), task.model(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0}, r"keep must be a share in \(0, 1\]"),
        ({"keep": 1.5}, "keep must be a share"),
        ({"of": "latency"}, "of='latency' is not known; one of 'macs', 'params'"),
        ({"criterion": "taylr"}, "criterion='taylr' is not known.*did you mean"),
        ({"granularity": "weight"}, "granularity='weight' is not known"),
        ({"granularity": ("channel", "2:4")}, "is not known; one or more of 'channel'"),
        ({"granularity": ()}, "is not known"),
        ({"granularity": "2:4", "keep": 0.3}, "keeps 0.5 of the weights; it contradicts keep=0.3"),
        ({"granularity": "head"}, "the model has no head to remove; it has: channel"),
        ({"granularity": "unstructured", "criterion": "taylor_"}, "criterion='taylor_' is not known; one of"),
        ({"granularity": "2:4", "allocation": "erk"}, "allocation='erk' has nothing to decide"),
        ({"granularity": ("channel", "depth"), "allocation": "global"}, "planned by losses"),
        ({"allocation": "best"}, "allocation='best' is not known; one of 'planned'"),
        ({"normalization": "isomorphic"}, "for allocation='global'"),
        ({"budget": "latency <= 50 %", "keep": 0.5}, "keep= or budget="),
        ({"budget": "latency <= 50 %", "criterion": "obs"}, "criterion= has nothing to decide"),
        ({"recover": "finetune"}, "recover='finetune' is not known; one of None"),
        ({"keep": 0.001}, "keep=0.001 of macs cannot be reached.*multiples of 8.*is keep=0.12"),
        ({"keep": 40}, r"got 40: for 40 % write keep=0.4"),
        ({"keep": True}, "keep must be a share"),
        ({"keep": "half"}, "keep must be a share.*got 'half'"),
        ({"align": 0}, "align must be a whole number, at least 1; got 0"),
        ({"samples": 2.5}, "samples must be a whole number"),
        ({"epochs": -1}, "epochs must be a whole number, at least 0"),
        ({"granularity": 3}, "granularity=3 is not known"),
        ({"granularity": "unstructurd"}, "did you mean 'unstructured'"),
        ({"criterion": 7}, "criterion=7 is not known"),
        ({"criterion": "sparsegpt"}, "decides about zeros.*not about units"),
        ({"granularity": "2:4", "criterion": "obd"}, "decides about units.*not about zeros"),
        ({"granularity": "depth"}, r"by skipping blocks \(/add.0\): the least that can be left is keep=0.8; add another granularity"),
        ({"budget": "latency <= 50 %", "align": 16}, "align= has nothing to decide"),
        ({"budget": "latency <= 50 %", "of": "params"}, "of= has nothing to decide"),
    ],
)
def test_prune_says_what_cannot_be(task: Task, options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        shohin.prune(task.model, task.data, **options)


def test_prune_finds_a_file_where_its_folder_should_be_before_it_works(task: Task, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for out in (tmp_path / "taken", tmp_path / "taken" / "deeper"):
        with pytest.raises(RunError, match=r"should be a folder, but .*taken is a file"):
            shohin.prune(task.model, task.data, out=out)
    with pytest.raises(RunError, match="out is a folder, not int"):
        shohin.prune(task.model, task.data, out=3)  # type: ignore[arg-type]


def test_prune_names_data_that_give_no_answers(task: Task) -> None:
    x, y = images(16, 4)
    x[3] = torch.nan
    with pytest.raises(DataError, match="calibration batches hold NaN or Inf"):
        shohin.prune(task.model, Data(train=[(x, y)], validation=[images(16, 5)]), keep=0.5)


@pytest.mark.parametrize("allocation", ["planned", "uniform", "global"])
def test_a_share_of_the_parameters_holds_where_a_weight_is_shared(allocation: str) -> None:
    """Tables count a tied weight at each of its uses; what is left is counted once."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up, self.down = nn.Embedding(64, 32), nn.Linear(32, 64), nn.Linear(64, 32)
            self.out = nn.Linear(32, 64, bias=False)
            self.out.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            return self.out(x + self.down(torch.relu(self.up(x))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(64, (8, 6))
    found = shohin.prune(model, Data(example=(ids,)), 0.5, "params", "magnitude", allocation=allocation, align=2)
    left = sum(p.numel() for p in found.model.parameters()) / sum(p.numel() for p in model.parameters())  # type: ignore[union-attr]
    assert 0.25 < left <= 0.5 and found.notes["left"] == pytest.approx(left)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"Data\(train=loader\), or criterion='magnitude'"),
        ({"recover": None}, r"Data\(train=loader\), or criterion='magnitude'"),
        ({"criterion": "magnitude", "recover": "compensate"}, r"'compensate' needs batches: give Data\(train=loader\), or recover=None"),
        ({"criterion": "magnitude", "recover": "distill"}, r"'distill' needs batches: give Data\(train=loader\), or recover=None"),
    ],
)
def test_prune_asks_for_the_batches_that_it_needs_before_it_works(options: dict[str, Any], said: str) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model was run")

    with pytest.raises(DataError, match=said):
        shohin.prune(Never(), Data(example=(images(4, 9)[0],)), **options)


def test_the_seed_decides_everything_and_the_random_state_is_given_back(task: Task, tmp_path: Path) -> None:
    """A loader that shuffles, with a generator of its own or torch's, gives each verb the same batches every time."""

    def state(made: shohin.Candidate) -> dict[str, Tensor]:
        assert made.model is not None
        return {n: t.clone() for n, t in made.model.state_dict().items()}

    def losses(made: shohin.Candidate) -> dict[str, Any]:
        return {str(row["epoch"]): row["loss"] for row in made.notes["training"]["history"]}

    examples = TensorDataset(*images(300, 4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Small(8)
    verbs: dict[str, Callable[[Data, int], Any]] = {
        "prune": lambda data, seed: state(shohin.prune(task.model, data, keep=0.4, seed=seed)),
        "quantize": lambda data, seed: {n: q.to_json() for n, q in shohin.quantize(task.model, data, seed=seed).evidence.items()},
        "distill": lambda data, seed: losses(shohin.distill(student, task.model, data, epochs=1, seed=seed)),
        "export": lambda data, seed: shohin.export(task.model, data, path=tmp_path / "m.onnx") and {},
        "profile": lambda data, seed: shohin.profile(task.model, data, seed=seed) and {},
        "understand": lambda data, seed: shohin.understand(task.model, data) and {},
    }
    for own in (torch.Generator().manual_seed(3), None):
        data = Data(DataLoader(examples, 100, shuffle=True, generator=own))
        for name, verb in verbs.items():
            found = []
            for seed in (0, 0, 1) if name in ("prune", "quantize", "distill") else (0,):
                before = torch.get_rng_state(), None if own is None else own.get_state(), random.getstate()
                found.append(verb(data, seed))
                after = torch.get_rng_state(), None if own is None else own.get_state(), random.getstate()
                assert torch.equal(before[0], after[0]), name
                assert own is None or torch.equal(before[1], after[1]), name  # type: ignore[arg-type]
                assert before[2] == after[2], name
                torch.rand(1, generator=own)
                torch.rand(1)
            assert len(found) == 1 or (same(found[0], found[1]) and not same(found[0], found[2])), name


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(a, other[n]) if isinstance(a, Tensor) else a == other[n] for n, a in one.items())


# quantize and export


@pytest.mark.usefixtures("untouched")
def test_quantize_snaps_the_weights_and_simulates_the_file(task: Task, tmp_path: Path) -> None:
    found = shohin.quantize(task.model, task.data)
    assert isinstance(found.model, Small) and found.view is not None
    assert set(found.plan.formats.values()) == {"int8"} and len(found.plan.formats) == 6
    shipped = shohin.export(found, task.data, path=tmp_path / "q.onnx")
    assert shipped.artifact == tmp_path / "q.onnx" and shipped.notes["parity"]["departs"] == []
    x, y = next(iter(task.data.validation))  # type: ignore[arg-type]
    outputs = shohin.Target("onnxruntime").runner(tmp_path / "q.onnx")(x)
    assert snr(outputs, found.view(x)) > 30 and shipped.view is not None and snr(outputs, shipped.view(x)) > 30
    assert snr(task.model(x), outputs) > 15 and snr(task.model(x), found.model(x)) > 15
    values = shipped.metrics.values()
    assert values["quality"] == float((outputs.argmax(-1) == y).double().mean()) == pytest.approx(task.data.quality(task.model), abs=0.03)
    assert values["size_bytes"] == (tmp_path / "q.onnx").stat().st_size
    assert shohin.verify(tmp_path / "q.onnx")["passes"]
    content = bytearray((tmp_path / "q.onnx").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "q.onnx").write_bytes(content)
    with pytest.raises(RunError, match="damaged or was replaced"):
        shohin.verify(tmp_path / "q.onnx")


@pytest.mark.usefixtures("untouched")
def test_patterns_choose_layers_and_the_last_one_decides(task: Task) -> None:
    found = shohin.quantize(task.model, task.data, {"*": "int8", "head/*": "float32", "stem/*": "float32"})
    assert {a.split("/")[0] for a in found.plan.formats} == {"depth", "point", "last", "hidden"}
    assert "head.weight" not in found.evidence and "last.weight" in found.evidence
    assert found.model is not None and torch.equal(found.model.state_dict()["head.weight"], task.model.state_dict()["head.weight"])
    only = shohin.quantize(task.model, task.data, {"*": "float32", "l*": "int8"})
    assert {a.split("/")[0] for a in only.plan.formats} == {"last"}
    with pytest.raises(PlanError, match=r"the pattern 'heads/\*' matches none of 6 names"):
        shohin.quantize(task.model, task.data, {"heads/*": "int8"})
    with pytest.raises(PlanError, match="format='int3' is not known"):
        shohin.quantize(task.model, task.data, "int3")
    with pytest.raises(DataError, match="needs calibration batches"):
        shohin.quantize(task.model, Data(example=(images(4, 9)[0],)))


@pytest.mark.usefixtures("untouched")
def test_export_of_a_plain_and_of_a_pruned_model(task: Task, tmp_path: Path) -> None:
    plain = shohin.export(task.model, task.data, path=tmp_path / "a" / "plain.onnx")
    pruned = shohin.export(shohin.prune(task.model, task.data, keep=0.3), task.data, path=tmp_path / "b" / "pruned.onnx")
    x = images(32, 6)[0]
    run = shohin.Target("onnxruntime").runner
    assert plain.artifact is not None and pruned.artifact is not None and pruned.model is not None
    torch.testing.assert_close(run(plain.artifact)(x), task.model(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(pruned.artifact)(x), pruned.model(x), rtol=1e-3, atol=1e-4)
    assert pruned.metrics.values()["size_bytes"] < 0.6 * plain.metrics.values()["size_bytes"]
    assert plain.metrics.latency_ms is not None and plain.metrics.latency_ms.how.startswith("measured")
    assert plain.metrics.values()["quality"] == pytest.approx(task.data.quality(task.model), abs=0.01)
    assert shohin.verify(tmp_path / "a")["passes"] and shohin.verify(pruned.artifact)["passes"]
    bare = shohin.export(task.model, Data(example=(x,)), path=tmp_path / "c.onnx")
    assert bare.metrics.quality is None and bare.artifact is not None and shohin.verify(bare.artifact)["passes"]


@pytest.mark.usefixtures("untouched")
def test_pruned_distilled_quantized_exported(task: Task, tmp_path: Path) -> None:
    """The verbs one after another: the file has both savings and answers as the last view does."""
    pruned = shohin.prune(task.model, task.data, keep=0.4, recover="distill", epochs=2)
    assert pruned.model is not None
    quantized = shohin.quantize(pruned.model, task.data)
    shipped = shohin.export(quantized, task.data, path=tmp_path / "m.onnx")
    plain = shohin.export(task.model, Data(example=(images(4, 9)[0],)), path=tmp_path / "plain.onnx")
    x = images(64, 7)[0]
    assert quantized.view is not None and shipped.artifact is not None
    assert snr(quantized.view(x), shohin.Target("onnxruntime").runner(shipped.artifact)(x)) > 30
    assert shipped.metrics.values()["quality"] > task.data.quality(task.model) - 0.1
    assert shipped.metrics.values()["size_bytes"] < 0.4 * plain.metrics.values()["size_bytes"]


def test_export_says_what_is_missing(task: Task, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="unknown target 'onyx'"):
        shohin.export(task.model, task.data, "onyx", tmp_path / "m.onnx")
    with pytest.raises(RunError, match=r"has no model; load it with shohin.load\(folder, model="):
        shohin.export(shohin.Candidate("c1", shohin.Plan("f")), task.data, path=tmp_path / "m.onnx")
    with pytest.raises(RunError, match="nothing to verify"):
        shohin.verify(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


# distill, profile, understand, search


@pytest.mark.usefixtures("untouched")
def test_distill_teaches_a_copy(task: Task) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Small(8)
    before = copy.deepcopy(student.state_dict())
    found = shohin.distill(student, task.model, task.data, epochs=10)
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items()) and found.model is not student
    assert found.model is not None and task.data.quality(found.model.eval()) > task.data.quality(student.eval()) + 0.1
    assert found.metrics.values()["quality"] == pytest.approx(task.data.quality(found.model))


def test_distill_follows_features_and_several_teachers(task: Task) -> None:
    found = shohin.distill(Small(8), task.model, task.data, losses=("kd", "features"), epochs=2)
    terms = found.notes["training"]["history"][-1]["terms"]
    assert {"kd", "features"} <= set(terms) and isinstance(found.model, Small)
    found = shohin.distill(Small(8), [task.model, Small(8)], task.data, losses=("dist",), epochs=1)
    assert "dist" in found.notes["training"]["history"][-1]["terms"]


@pytest.mark.parametrize("losses", [("magic",), ("kd", "dkd")])
def test_distill_refuses_losses_that_it_does_not_know(task: Task, losses: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"unknown distillation loss|one loss between answers at a time"):
        shohin.distill(Small(8), task.model, task.data, losses=losses)


@pytest.mark.usefixtures("untouched")
def test_profile_adds_up(task: Task) -> None:
    found = shohin.profile(task.model, task.data)
    total = sum(r["ms_before"] for r in found.rows)
    assert abs(total / found.total_ms - 1) <= max(0.25, 3 * found.error)  # the fit's own error on the whole model
    assert all(r["ms_before"] >= 0 for r in found.rows)
    layers = {r["address"].split("/")[0] for r in found.rows if r["params"]}
    assert layers >= {"stem", "depth", "point", "last", "hidden", "head"}
    assert sum(r["macs"] for r in found.rows) == pytest.approx(found.graph.macs())
    assert {"threads", "batch"} <= found.environment.keys() and 0 <= found.repeatability < 1
    assert "total" in str(found) and all(r["address"] in str(found) for r in found.rows)


def test_profile_needs_only_an_example(task: Task) -> None:
    x = next(iter(task.data.train))[0]  # type: ignore[arg-type]
    found = shohin.profile(task.model, Data(example=(x,)))
    assert found.total_ms > 0 and {r["address"] for r in found.rows} == {r["address"] for r in shohin.profile(task.model, task.data).rows}


def test_understand_cut_and_view_on_attention() -> None:
    torch.manual_seed(0)
    model = models.ViT().eval()
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"has not been understood yet: give example=\(x,\)"):
        shohin.cut(model, shohin.Plan("f"))
    graph = shohin.understand(model, x)
    assert graph.groups and graph.regions and graph.sites and graph.costs
    widths = {g.name: tuple(range(g.size // 2)) for g in graph.groups[:3] if g.size > 1}
    plan = shohin.Plan(graph.program.fingerprint, widths)
    small, seen = shohin.cut(model, plan), shohin.view(model, plan)
    torch.testing.assert_close(small(x), seen(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert shohin.understand(small, x).macs() == pytest.approx(graph.macs(plan))
    assert torch.equal(shohin.cut(model, plan, example=(x,))(x), small(x))
    with pytest.raises(PlanError, match="made for another model"):
        shohin.cut(model, shohin.Plan("another"))
    with pytest.raises(PlanError, match="names a unit group 'nothing'"):
        shohin.view(model, shohin.Plan(graph.program.fingerprint, {"nothing": (0,)}))


def test_data_and_models_are_what_they_should_be(task: Task) -> None:
    loader: Any = [(images(4, 9))]
    student = Small(8)
    for verb in (
        lambda: shohin.prune(task.model, loader),
        lambda: shohin.quantize(task.model, loader),
        lambda: shohin.export(task.model, loader),
        lambda: shohin.profile(task.model, loader),
        lambda: shohin.distill(student, task.model, loader),
    ):
        with pytest.raises(DataError, match=r"must be a shohin\.Data, not list"):
            verb()
    with pytest.raises(ModelError, match=r"a model is a torch\.nn\.Module, not function"):
        shohin.prune(task.model.forward.__func__, task.data)  # type: ignore[attr-defined]


def test_search_takes_a_model(task: Task) -> None:
    with pytest.raises(ModelError, match="spaces of building blocks are not supported yet"):
        shohin.search({"widths": [8, 16]}, task.data)  # type: ignore[arg-type]
