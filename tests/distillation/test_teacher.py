"""A teacher's answers: kept on disk exactly, never another teacher's, usable in a student's graph, from a faster form that agrees."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shohin.data import Call, Data
from shohin.distillation import Teacher, distill
from shohin.errors import DataError
from shohin.training import TrainConfig, copy_state

torch.set_num_threads(1)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)).eval()


def call(seed: int = 0, n: int = 16) -> Call:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return Call((x,), {}, None, x)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def same(a: tuple[Tensor, dict[str, list[Tensor]]], b: tuple[Tensor, dict[str, list[Tensor]]]) -> bool:
    flat = [[x[0], *(t for tensors in x[1].values() for t in tensors)] for x in (a, b)]
    return a[1].keys() == b[1].keys() and all(s.dtype == t.dtype and torch.equal(s, t) for s, t in zip(*flat, strict=True))


class Twice(nn.Module):
    """Nested outputs, a module that runs twice, unusual types and a scalar feature."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.total, self.dtype = network(), nn.Identity(), dtype

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.body(x)
        self.total(y.sum())
        return {"nested": ({"logits": self.body(x + 1).to(self.dtype)}, y)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_answers_come_back_from_disk_as_they_were(tmp_path: Path, dtype: torch.dtype, memory: int) -> None:
    model, names = Twice(dtype), ("body.0", "total")
    first = Teacher(model, names, memory, tmp_path)
    answers = [first(call(seed)) for seed in (0, 1)]
    assert answers[0][0].dtype == dtype and len(answers[0][1]["body.0"]) == 2 and answers[0][1]["total"][0].shape == ()
    assert (first.hits, first.misses, len(files(tmp_path))) == (0, 32, 2)
    assert first.by_sample is False  # a scalar feature is of the whole batch
    second = Teacher(model, names, memory, tmp_path)
    for seed in (1, 0, 1):
        assert same(second(call(seed)), answers[seed])
    assert (second.hits, second.misses, second.reads) == (48, 0, 32 if memory else 48)
    assert {p.suffix for p in tmp_path.glob("*/*")} == {".safetensors"}


def test_another_teacher_never_answers(tmp_path: Path) -> None:
    Teacher(network(), ["0"], folder=tmp_path)(call())
    nudged, buffered, other_activation = network(), network(), network()
    with torch.no_grad():
        nudged[4].bias[2] += 1e-6
        buffered[1].running_mean[0] += 1e-6
    other_activation[2] = nn.GELU()
    other_setting = network()
    other_setting[1].eps = 1e-3
    for model, names in [(nudged, ["0"]), (buffered, ["0"]), (other_activation, ["0"]), (other_setting, ["0"]), (network(), ["4"])]:
        expert = Teacher(model, names, folder=tmp_path)
        logits, features = expert(call())
        assert (expert.hits, expert.misses) == (0, 16)
        assert torch.equal(logits, model(*call().args).detach()) and list(features) == names
    assert len(list(tmp_path.iterdir())) == 6
    again = Teacher(network().train(), ["0"], folder=tmp_path)  # a mode is no other teacher
    again(call())
    assert again.hits == 16
    with torch.autocast("cpu", torch.bfloat16):
        assert again(call())[0].dtype == torch.bfloat16
    assert again.misses == 16


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign", "text"])
def test_a_damaged_file_is_computed_anew(tmp_path: Path, harm: str) -> None:
    model = network()
    expected = Teacher(model, ["0"], folder=tmp_path)(call())
    (path,) = files(tmp_path)
    Teacher(model, ["0"], folder=tmp_path)(call(1))
    data = path.read_bytes()
    other = next(p for p in files(tmp_path) if p != path).read_bytes()
    flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    path.write_bytes({"cut": data[:-7], "flip": flipped, "empty": b"", "foreign": other, "text": b"not an answer"}[harm])
    expert = Teacher(model, ["0"], folder=tmp_path)
    with pytest.warns(UserWarning, match=r"damaged and computed anew"):
        assert same(expert(call()), expected)
    assert (expert.hits, expert.misses) == (0, 16)
    again = Teacher(model, ["0"], folder=tmp_path)
    assert same(again(call()), expected) and again.reads == 16  # written again


def test_the_disk_is_bounded(tmp_path: Path) -> None:
    model = network()
    Teacher(model, folder=tmp_path)(call())
    size = files(tmp_path)[0].stat().st_size
    expert = Teacher(model, cache_bytes=0, folder=tmp_path, disk_bytes=2 * size + 10)
    expert(call(1))
    with pytest.warns(UserWarning, match="disk_bytes is reached"):
        expert(call(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, _ = expert(call(3))  # said once
    assert torch.equal(logits, model(*call(3).args).detach())
    assert len(files(tmp_path)) == 2 and sum(p.stat().st_size for p in files(tmp_path)) <= 2 * size + 10
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_folder_that_cannot_be_made_is_an_error_and_odd_batches_are_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        Teacher(network(), folder=tmp_path / "file" / "below")

    class Odd(nn.Linear):
        def forward(self, x: Tensor, how: object = None) -> Tensor:
            return super().forward(x)

    expert = Teacher(Odd(6, 4), folder=tmp_path)
    for _ in range(2):
        expert(Call(call().args, {"how": object()}, None, None))
    assert (expert.hits, expert.misses, files(tmp_path)) == (0, 32, [])


def test_answers_can_stand_in_a_graph_and_the_model_can_be_trained_afterwards() -> None:
    class Table(nn.Module):
        """Makes a table in its first forward, as models with positions do."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.table = network(), None
            self.register_buffer("scale", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table, self.scale = torch.linspace(1, 2, x.shape[1]), torch.full((4,), 2.0)
            return self.body(x * self.table) * self.scale

    model, student = Table().train(), network(1)
    logits, features = Teacher(model, ["body.0"])(call())
    assert not logits.is_inference() and not logits.requires_grad and model.training and model.body[3].training
    (student(*call().args) * logits).sum().backward()  # saved for backward
    (student[0](*call().args) * features["body.0"][0]).square().sum().backward()
    assert float(student[0].weight.grad.abs().sum()) > 0
    logits.add_(1)
    model(*call().args).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_inference_mode_does_not_allow_runs_without() -> None:
    class Versioned(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + 0 * y._version  # inference tensors have none

    model = Versioned(6, 4)
    torch.testing.assert_close(Teacher(model)(call())[0], model(*call().args).detach())


class Quick:
    """A faster form with an error, in arrays of another type."""

    def __init__(self, model: nn.Module, error: float = 0.0, limit: int = 10**9) -> None:
        self.model, self.error, self.limit, self.calls = model, error, limit, 0

    def __call__(self, x: Tensor) -> list[Any]:
        self.calls += 1
        if len(x) > self.limit:
            raise ValueError("the session has a fixed batch")
        with torch.no_grad():
            return [(self.model(x) * (1 + self.error)).double().numpy()]


def test_a_faster_form_that_agrees_answers(tmp_path: Path) -> None:
    model, quick = network(), Quick(network(), 1e-4)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    expert = Teacher(model, lowered=quick, folder=tmp_path)
    for seed in (0, 1, 0, 2):
        logits, features = expert(call(seed))
        assert logits.dtype == torch.float32 and features == {}
        torch.testing.assert_close(logits, quick.model(*call(seed).args).detach() * (1 + 1e-4))
    assert len(runs) == 1 and quick.calls == 4 and expert.by_sample  # one call tries a part of the first batch
    plain = Teacher(model, folder=tmp_path)
    plain(call())
    assert plain.misses == 16  # answers of a faster form are another teacher's
    watched = Teacher(model, ["0"], lowered=quick)
    assert torch.equal(watched(call())[1]["0"][0], model[0](*call().args)) and quick.calls == 4


@pytest.mark.parametrize("error,said", [(2e-3, "differs from it by 0.002"), (float("nan"), "differs from it by nan")])
def test_a_faster_form_that_differs_is_refused(error: float, said: str) -> None:
    model, quick = network(), Quick(network(), error)
    expert = Teacher(model, lowered=quick)
    with pytest.warns(UserWarning, match=said):
        assert torch.equal(expert(call())[0], model(*call().args).detach())
    assert torch.equal(expert(call(1))[0], model(*call(1).args).detach()) and quick.calls == 1


def test_a_faster_form_of_another_shape_or_that_fails() -> None:
    model = network()
    with pytest.warns(UserWarning, match=r"gives shape \(16, 8\)"):
        Teacher(model, lowered=lambda x: model[0](x))(call())
    expert = Teacher(model, lowered=Quick(model, 0.0, 16))
    expert(call())
    with pytest.warns(UserWarning, match="fixed batch"):
        assert torch.equal(expert(call(1, 20))[0], model(*call(1, 20).args).detach())
    assert expert.lowered is not None
    with pytest.warns(UserWarning, match="fixed batch"):
        assert len(Teacher(model, lowered=Quick(model, 0.0, 4))(call())[0]) == 16


def test_a_session_of_onnx_runtime_teaches(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = network(), tmp_path / "teacher.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, call().args, str(path), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, runs = session.get_inputs()[0].name, []

    def lowered(x: Tensor) -> list[Any]:
        runs.append(len(x))
        out: list[Any] = session.run(None, {name: x.numpy()})
        return out

    expert = Teacher(model, lowered=lowered)
    for seed, n in ((0, 16), (1, 5)):
        torch.testing.assert_close(expert(call(seed, n))[0], model(*call(seed, n).args).detach())
    assert runs == [16, 8, 5] and expert.lowered is not None and expert.by_sample


def test_a_student_trained_from_the_disk_is_the_same_to_the_bit(tmp_path: Path) -> None:
    data, config = Data([call(seed).args[0] for seed in range(4)]), TrainConfig(epochs=2)
    states = []
    for folder in (None, tmp_path, tmp_path):
        student, expert = network(1), Teacher(network(), cache_bytes=0, folder=folder)
        distill(student, expert, data, config=config)
        states.append((copy_state(student), expert.misses))
    assert [misses for _, misses in states][1:] == [64, 0] and states[0][1] > 64
    assert all(torch.equal(t, s[n]) for s, _ in states[1:] for n, t in states[0][0].items())
