"""The values on the ground floor: formats, budgets, data and the run folder."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shohin.budget import Budget, Limit
from shohin.candidate import Candidate, Measurement, Metrics, pareto
from shohin.data import Data
from shohin.errors import BudgetError, DataError, PlanError, RunError
from shohin.evidence.ranges import grid
from shohin.formats import FORMATS, Quantizer, named_format
from shohin.plan import Plan
from shohin.run import Run, checksum, read_json, read_tensors, write_atomic, write_tensors

# formats


def quantizer(name: str, low: float, high: float) -> Quantizer:
    scale, zero = grid(low, high, named_format(name))
    return Quantizer(named_format(name), torch.tensor(scale, dtype=torch.float64), torch.tensor(zero))


@given(
    st.sampled_from(["int8", "uint8", "int7"]),
    st.floats(-100, 0.0, width=32),
    st.floats(0.0078125, 100, width=32),
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20),
)
def test_a_quantizer_snaps_to_its_codes(name: str, low: float, high: float, values: list[float]) -> None:
    q, x = quantizer(name, low, high), torch.tensor(values)
    codes, scale = q.codes(x), q.scale.float()
    assert int(codes.min()) >= q.format.low and int(codes.max()) <= q.format.high
    snapped = q.fake(x)
    torch.testing.assert_close(snapped, (codes - q.zero_point).float() * scale, rtol=1e-6, atol=0.0)
    assert torch.equal(q.codes(snapped), codes)  # a second snap changes nothing
    assert float(q.fake(torch.zeros(1))) == 0.0  # zero is on every grid
    inside = (x >= (q.format.low - q.zero_point) * scale) & (x <= (q.format.high - q.zero_point) * scale)
    assert bool(((snapped - x).abs() <= 0.5001 * scale + 1e-6 * x.abs())[inside].all())
    again = Quantizer.from_json(json.loads(json.dumps(q.to_json())))
    assert torch.equal(again.scale, q.scale) and again.to_json() == q.to_json()


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    q = quantizer("int8", -1.0, 1.0)
    x = torch.tensor([-3.0, -0.4, 0.0, 0.77, 1.5], requires_grad=True)
    (q.fake(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_have_their_own_scales(axis: int) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(axis))
    scale = torch.linspace(0.01, 0.1, x.shape[axis], dtype=torch.float64)
    q = Quantizer(FORMATS["int8"], scale, torch.zeros(len(scale), dtype=torch.int64), axis)
    for i, s in enumerate(scale):
        one = Quantizer(FORMATS["int8"], s, torch.tensor(0))
        assert torch.equal(q.codes(x).select(axis, i), one.codes(x.select(axis, i)))
        assert torch.equal(q.fake(x).select(axis, i), one.fake(x.select(axis, i)))


def test_an_unknown_format_says_which_are_known() -> None:
    with pytest.raises(PlanError, match=r"unknown format 'int9'.*int8"):
        named_format("int9")


# budgets


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("latency <= 2 ms", "latency_ms", Limit(2.0)),
        ("latency<=500us", "latency_ms", Limit(0.5)),
        ("Latency < 0.002 s", "latency_ms", Limit(2.0)),
        ("latency =< 50 %", "latency_ms", Limit(0.5, True)),
        ("latency <= 0.5x", "latency_ms", Limit(0.5, True)),
        ("size <= 300 kb", "size_bytes", Limit(300 * 1024.0)),
        ("size <= 1.5 MB", "size_bytes", Limit(1.5 * 1024.0**2)),
        ("memory <= 12 b", "memory_bytes", Limit(12.0)),
        ("energy <= 2 j", "energy_mj", Limit(2000.0)),
        ("drop <= 0.5 %", "drop", Limit(0.005, True)),
        ("drop <= 0", "drop", Limit(0.0)),
        ("drop <= 1.5 points", "drop", Limit(1.5)),
    ],
)
def test_budgets_are_read(text: str, metric: str, limit: Limit) -> None:
    found = Budget.parse(text).limits
    assert found.keys() == {metric} and found[metric].relative == limit.relative
    assert found[metric].value == pytest.approx(limit.value)
    assert Budget.parse(str(Budget.parse(text))).to_json() == Budget.parse(text).to_json()
    assert Budget.from_json(json.loads(json.dumps(Budget.parse(text).to_json()))).limits == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latency <= banana", "'banana' is not a number"),
        ("latency <= 2", "give a unit, one of us, ms, s"),
        ("latency <= 2 kb", "give a unit"),
        ("latency", "cannot read 'latency'"),
        ("latency >= 2 ms", "upper bound"),
        ("latency <= 2 ms, latency <= 3 ms", "bounds latency twice"),
        ("latencey <= 2 ms", "did you mean 'latency'"),
        ("size <= 0 kb", "must be positive"),
        ("size <= -3 kb", "must be positive"),
        ("drop <= -1 %", "must be positive"),
        ("drop <= 3 ms", "bare number"),
        ("latency <= 1e999 ms", "is not a number"),
        ("latency <= 2 ms size <= 3 kb", "is not a number"),
    ],
)
def test_a_budget_that_cannot_be_read_says_why(text: str, said: str) -> None:
    with pytest.raises(BudgetError, match=said.replace("(", r"\(")):
        Budget.parse(text)


def test_budgets_by_name_are_those_by_sentence() -> None:
    named = Budget(latency_ms=2, size_kb="50 %", drop="0.5 %")
    assert named.to_json() == Budget.parse("latency <= 2 ms, size <= 0.5x, drop <= 0.5 %").to_json()
    assert Budget.parse(named) is named and not Budget.parse(None).limits and not Budget.parse(" ").limits
    for wrong in (float("nan"), float("inf"), -1.0, "banana"):
        with pytest.raises(BudgetError):
            Budget(latency_ms=wrong)
    with pytest.raises(BudgetError, match="not int"):
        Budget.parse(2)  # type: ignore[arg-type]


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_what_breaks_a_budget(lower_is_better: bool) -> None:
    budget = Budget.parse("latency <= 50 %, size <= 10 b, drop <= 10 %")
    base = {"latency_ms": 4.0, "size_bytes": 20.0, "quality": 0.8}
    worse = 0.08 * (1 if lower_is_better else -1)

    def broken(**changed: float) -> set[str]:
        return set(
            budget.violations({"latency_ms": 2.0, "size_bytes": 10.0, "quality": 0.8, **changed}, base, lower_is_better=lower_is_better)
        )

    assert broken() == set() and broken(quality=0.8 + worse) == set() and broken(quality=0.8 - 5 * worse) == set()
    assert broken(latency_ms=2.01) == {"latency_ms"} and broken(size_bytes=11.0) == {"size_bytes"}
    assert broken(quality=0.8 + 1.01 * worse) == {"drop"}
    assert set(budget.violations({"quality": 0.8}, base)) == {"latency_ms", "size_bytes"}  # what was not measured does not hold


def test_metrics_and_front() -> None:
    metrics = Metrics(quality=Measurement(0.1 + 0.2, "measured: x", {"threads": 1}, 0.01), size_bytes=Measurement(3.0, "measured: y"))
    assert Metrics.from_json(json.loads(json.dumps(metrics.to_json()))) == metrics and set(metrics.values()) == {"quality", "size_bytes"}
    points = {"a": (1.0, 0.5), "b": (2.0, 0.5), "c": (3.0, 0.9), "d": (3.0, 0.8), "e": (4.0, 0.9)}
    found = pareto([Candidate(n, Plan("")) for n in points], lambda c: points[c.name][0], lambda c: points[c.name][1])
    assert [c.name for c in found] == ["a", "c"]


# data

X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("batch", "args", "kwargs", "labelled"),
    [
        (X, 1, set(), False),
        ((X,), 1, set(), False),
        ((X, Y), 1, set(), True),
        ([X, Y], 1, set(), True),
        (((X, X), Y), 2, set(), True),
        ({"x": X}, 0, {"x"}, False),
        ({"x": X, "mask": X, "labels": Y}, 0, {"x", "mask"}, True),
    ],
)
def test_forms_of_batches(batch: Any, args: int, kwargs: set[str], labelled: bool) -> None:
    data = Data([batch])
    call = next(data.calls("train"))
    assert (len(call.args), set(call.kwargs), call.size) == (args, kwargs, 6)
    assert (call.target is not None) == labelled == data.has_labels
    assert data.example().size == 6


@pytest.mark.parametrize("batch", [(X, Y, X), "text", 3, [X, Y, X, Y], None])
def test_a_batch_of_another_form_is_refused(batch: Any) -> None:
    with pytest.raises(DataError, match=r"a batch must be x, \(x, y\) or a dict"):
        next(Data([batch]).calls("train"))


def test_empty_and_used_up_loaders() -> None:
    with pytest.raises(DataError, match="train loader is empty"):
        Data([]).example()
    for split in ("train", "validation", "test"):
        for once in (iter([(X, Y)]), ((X, Y) for _ in range(2)), map(tuple, [(X, Y)])):
            with pytest.raises(DataError, match=f"the {split} batches are a .*used up after one pass; give a list or a DataLoader"):
                Data(**{"train": [X], split: once})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs batches or an example"):
        Data()
    with pytest.raises(DataError, match="no test batches"):
        list(Data([X]).calls("test"))
    assert len(list(Data([X] * 5).calls("train", limit=13))) == 3  # whole batches
    assert Data([X[:0], X]).example().size == len(X)  # batches without samples are passed over


def logits(x: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(Y, 3).float()


def raises(run: Any) -> float:
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("data", "run", "said"),
    [
        (Data([(X, Y)], metric=lambda run: float("nan")), logits, "metric returned nan"),
        (Data([(X, Y)], metric=lambda run: -math.inf), logits, "metric returned -inf"),
        (Data([(X, Y)], metric=raises), logits, r"the metric raised KeyError: 'gone' \(.*test_values.py:\d+\)"),
        (Data([(X, Y)], metric=lambda run: None), logits, "the metric raised TypeError"),  # type: ignore[arg-type,return-value]
        (Data([(X, X)]), logits, "accuracy and needs integer targets"),
        (Data([X]), logits, "accuracy and needs integer targets"),
        (Data([(X, Y)]), lambda x: logits(x) * float("nan"), "outputs on the validation batches hold NaN"),
        (Data([(X, Y.reshape(6, 1))]), logits, "do not fit targets"),
    ],
)
def test_a_quality_that_is_no_number_says_why(data: Data, run: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        data.quality(run)


def test_quality_is_accuracy_or_the_metric() -> None:
    assert Data([(X, Y)]).quality(logits) == 1.0
    assert Data([(X, Y)], [(X, (Y + 1) % 3)]).quality(logits) == 0.0
    assert Data([(X, Y)], metric=lambda run: float(run(X).sum())).quality(logits) == 6.0
    assert Data([(X, Y)], test=[(X, Y)], metric=lambda run: 0.25).quality(logits, "test") == 1.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_integer_type_and_both_places_of_the_classes(dtype: torch.dtype) -> None:
    loss = torch.nn.functional.cross_entropy
    g = torch.Generator().manual_seed(0)
    for shape in ((), (5,), (2, 4)):
        out, y = torch.randn(6, *shape, 3, generator=g), torch.randint(3, (6, *shape), generator=g)
        want = loss(out.reshape(-1, 3), y.reshape(-1))
        for form in (out, out.movedim(-1, 1)):  # (B, ..., C) and (B, C, ...)
            torch.testing.assert_close(Data([X]).batch_loss(form, Data([X]).call((X, y.to(dtype)))), want)
    hidden = torch.tensor([0, -100, 2, 0, -100, 2])
    kept = hidden >= 0
    torch.testing.assert_close(Data([X]).batch_loss(X, Data([X]).call((X, hidden))), loss(X[kept], hidden[kept]))


@pytest.mark.parametrize(
    ("out", "labels", "said"),
    [
        (X, Y + 1, r"labels from 1 to 3 do not fit 3 classes \(outputs of shape \(6, 3\), labels of shape \(6,\)\): labels are 0 to 2"),
        (X, Y - 1, r"labels from -1 to 1 do not fit 3 classes"),
        (X, Y[:4], r"outputs of shape \(6, 3\) do not fit labels of shape \(4,\)"),
        (X, torch.eye(3, dtype=torch.int64)[Y], r"outputs of shape \(6, 3\) do not fit labels of shape \(6, 3\)"),
        (X.reshape(-1), Y, r"outputs of shape \(18,\) do not fit labels of shape \(6,\)"),
        (X.reshape(2, 3, 3), torch.zeros(2, 2, dtype=torch.int32), r"outputs of shape \(2, 3, 3\) do not fit labels of shape \(2, 2\)"),
    ],
)
def test_labels_that_do_not_fit_are_named(out: Tensor, labels: Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Data([X]).batch_loss(out, Data([X]).call((X, labels)))


def test_the_size_of_a_call_is_that_of_the_first_tensor_that_has_one() -> None:
    scale = torch.tensor(2.0)
    assert Data([((scale, X), Y)]).example().size == 6 and Data([{"scale": scale, "x": X}]).example().size == 6
    with pytest.raises(DataError, match="with a batch dimension"):
        Data([scale]).example().size  # noqa: B018


def test_losses() -> None:
    call = next(Data([(X, Y)]).calls("train"))
    torch.testing.assert_close(Data([(X, Y)]).batch_loss(logits(X), call), torch.nn.functional.cross_entropy(logits(X), Y))
    assert float(Data([(X, Y)], loss=lambda out, batch: (out.sum() + batch[1].sum()).float()).batch_loss(logits(X), call)) == 12.0
    with pytest.raises(DataError, match="no loss"):
        Data([X]).batch_loss(logits(X), next(Data([X]).calls("train")))
    with pytest.raises(DataError, match="must be a scalar tensor"):
        Data([X], loss=lambda out, batch: out).batch_loss(logits(X), call)
    with pytest.raises(DataError, match="the loss raised ZeroDivisionError"):
        Data([X], loss=lambda out, batch: 1 / 0).batch_loss(logits(X), call)  # type: ignore[arg-type,return-value]


# the run folder

CONFIG = {"version": 1, "fingerprint": "f" * 8, "weights": "w", "seed": 0}


def test_journal_survives_a_cut_at_every_byte(tmp_path: Path) -> None:
    with Run(tmp_path / "r", CONFIG) as run:
        for i in range(3):
            run.append("stage", str(i), {"value": i})
    whole = (tmp_path / "r" / "journal.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        (tmp_path / "r" / "journal.jsonl").write_bytes(whole[:cut])
        finished = sum(end <= cut for end in ends)
        assert len(Run(tmp_path / "r").entries) == finished  # a reader
        if cut % 7 and cut not in ends:
            continue
        with Run(tmp_path / "r", CONFIG) as again:  # and the job that goes on
            assert again.once("stage", "2", lambda: {"value": 2}) == {"value": 2}
        assert [e["key"] for e in Run(tmp_path / "r").entries] == [str(i) for i in range(min(finished, 2))] + ["2"]


def test_reading_a_folder_changes_nothing(tmp_path: Path) -> None:
    Run(tmp_path / "r", CONFIG).append("a", "", 1)
    path = tmp_path / "r" / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b'{"stage": "b"')  # another process is writing
    before = path.read_bytes()
    assert [e["stage"] for e in Run(tmp_path / "r").entries] == ["a"] and path.read_bytes() == before


@pytest.mark.parametrize("line", ["{", "3", "[]", '{"stage": "x"}', "\x00\x00"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    Run(tmp_path / "r", CONFIG).append("a", "", 1)
    path = tmp_path / "r" / "journal.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(RunError, match=r"journal\.jsonl is damaged in line 1"):
        Run(tmp_path / "r")


@pytest.mark.parametrize(
    ("changed", "said"), [("fingerprint", "another model"), ("weights", "another model"), ("seed", "use another folder")]
)
def test_a_folder_of_another_job_is_refused(tmp_path: Path, changed: str, said: str) -> None:
    Run(tmp_path / "r", CONFIG)
    with pytest.raises(RunError, match=f"another {changed}: .*{said}"):
        Run(tmp_path / "r", {**CONFIG, changed: "other"})


def test_folders_that_are_not_runs(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(RunError, match="not a run folder"):
            Run(tmp_path / name, CONFIG)
        with pytest.raises(RunError, match="not a run folder"):
            Run(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    for text in ("{", "[]", "\x00"):
        (tmp_path / "file2").mkdir(exist_ok=True)
        (tmp_path / "file2" / "config.json").write_text(text)
        with pytest.raises(RunError, match="damaged"):
            Run(tmp_path / "file2", CONFIG)


def test_a_job_killed_before_its_first_file_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / "r" / "work").mkdir(parents=True)
    (tmp_path / "r" / ".config.json.123.tmp").write_text('{"versi')
    (tmp_path / "r" / ".lock").touch()
    assert Run(tmp_path / "r", CONFIG).config == CONFIG


needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks here")


@needs_locks
def test_one_job_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    run = Run(folder, CONFIG)
    run.append("a", "", 1)
    half = folder / ".half.1.tmp"
    half.touch()
    for _ in range(2):
        with pytest.raises(RunError, match=f"another job is at work in {folder}"):
            Run(folder, CONFIG)
    assert half.exists() and len(Run(folder).entries) == 1  # nothing was touched, and reading is free
    run.close()
    run.close()
    again = Run(folder, CONFIG)
    assert not half.exists() and run.find("a") == again.find("a")
    del again
    with pytest.raises(KeyError), Run(folder, CONFIG):  # the last object's end was enough
        raise KeyError
    with pytest.raises(RunError, match="another seed") as kept:
        Run(folder, {**CONFIG, "seed": 1})
    (folder / "journal.jsonl").write_text("{\n")
    with pytest.raises(RunError, match="damaged") as damaged:
        Run(folder, CONFIG)
    (folder / "journal.jsonl").unlink()
    with Run(folder, CONFIG) as last:  # errors that are still at hand hold nothing
        assert not last.entries and kept.tb is not None and damaged.tb is not None


def test_a_folder_that_is_not_a_run_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Bert"]}')
    with pytest.raises(RunError, match="holds a run with another"):
        Run(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


JOB = """
import json, os, sys, time
from shohin.run import Run
run = Run(sys.argv[1], json.loads(sys.argv[2]))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


@needs_locks
def test_the_lock_of_a_killed_job_goes_with_it_though_its_workers_live_on(tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path / "r"), json.dumps(CONFIG)], stdout=subprocess.PIPE)
    assert job.stdout is not None
    child = int(job.stdout.readline())
    try:
        with pytest.raises(RunError, match="another job is at work"):
            Run(tmp_path / "r", CONFIG)
        job.kill()
        job.wait()
        os.kill(child, 0)  # it lives
        for _ in range(100):  # until the child has begun
            try:
                Run(tmp_path / "r", CONFIG).close()
                break
            except RunError:
                time.sleep(0.02)
        else:
            pytest.fail("the child holds the lock")
    finally:
        job.kill()
        os.kill(child, signal.SIGKILL)
        job.stdout.close()


def test_files_are_durable_before_they_are_named_and_their_names_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def replaced(source: Any, target: Any) -> None:
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    folder = ["folder"] * (sys.platform != "win32")
    write_atomic(tmp_path / "a", b"x")
    assert done == ["file", "name", *folder]
    write_tensors(tmp_path / "t", {"a": X})
    assert done[len(folder) + 2 :] == ["file", "name", *folder] and torch.equal(read_tensors(tmp_path / "t")["a"], X)
    run = Run(tmp_path / "r", CONFIG)
    done.clear()
    run.append("a", "", 1)
    run.append("b", "", 1)
    assert done == ["file", *folder, "file"]


def test_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.bin"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    tied = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "t.safetensors", {"a": tied, "b": tied.T, "c": tied})
    found = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(found["b"], tied.T) and torch.equal(found["c"], tied)
    before = checksum(tmp_path / "t.safetensors")
    damaged = bytearray((tmp_path / "t.safetensors").read_bytes())
    damaged[3] ^= 255
    (tmp_path / "t.safetensors").write_bytes(damaged)
    assert checksum(tmp_path / "t.safetensors") != before
    with pytest.raises(RunError, match="damaged"):
        read_tensors(tmp_path / "t.safetensors")
    with pytest.raises(RunError, match="missing"):
        read_json(tmp_path / "gone.json")
