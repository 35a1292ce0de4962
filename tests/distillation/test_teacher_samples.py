"""A teacher remembers by sample: only unknown samples run, in order, and only where samples do not see one another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shohin.data import Call, Data
from shohin.distillation import Teacher, distill
from shohin.training import TrainConfig, copy_state

torch.set_num_threads(1)

FEATURES = 6


class Counted(nn.Module):
    """Counts the samples of each run, in an attribute that is no setting."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self._runs: list[int] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._runs.append(len(next(iter([*args, *kwargs.values()]))))
        return self.body(*args, **kwargs)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)).eval()


def samples(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed))


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs, None, None)


def shuffled(x: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    for index in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(batch):
        yield x[index]


@pytest.mark.parametrize("memory,disk", [(1 << 20, False), (1 << 20, True), (0, True), (900, False), (900, True)])
def test_a_shuffled_loader_is_computed_once(tmp_path: Path, memory: int, disk: bool) -> None:
    model, x = Counted(network()), samples(60)
    folder = tmp_path if disk else None

    def passes(expert: Teacher, seeds: range) -> None:
        for seed in seeds:
            for part in shuffled(x, 16, seed):
                logits, features = expert(call(part))
                torch.testing.assert_close(logits, model.body(part).detach())
                torch.testing.assert_close(features["body.0"][0], model.body[0](part).detach())

    expert = Teacher(model, ["body.0"], memory, folder)
    passes(expert, range(4))
    assert expert.hits + expert.misses == 4 * 60 and expert.by_sample
    fit = 60 if memory > 10_000 else memory // 48  # a row is 12 numbers
    assert expert.misses == (60 if disk else 60 + 3 * (60 - fit))
    assert expert.reads == (3 * (60 - fit) if disk else 0)
    if disk:
        again, before = Teacher(model, ["body.0"], memory, folder), len(model._runs)
        passes(again, range(7, 9))
        assert len(model._runs) == before and again.by_sample and (again.hits, again.misses) == (120, 0)
        assert (again.reads == 120) if memory == 0 else (0 < again.reads < 120)


def test_the_last_batch_may_be_one_sample() -> None:
    model, x = network(), samples(9)
    expert = Teacher(model)
    for epoch in range(4):
        for part in shuffled(x, 2, epoch):
            torch.testing.assert_close(expert(call(part))[0], model(part).detach())
    assert expert.misses <= 9 + 4 and expert.hits == 36 - expert.misses


def test_of_a_batch_only_unknown_samples_run_and_never_one_alone() -> None:
    model, x = Counted(network()), samples(40)
    expert = Teacher(model)
    expert(call(x[:8]))
    model._runs.clear()
    for rows, ran in [
        ([3, 20, 1, 21, 22, 0], [3]),  # between known ones
        ([30, 2, 4], [2]),  # one unknown, with another beside it
        ([7, 6, 5], []),
        ([31, 32, 31, 0, 0], [3]),  # equal samples in one batch
        ([31, 31, 32], []),
        ([33, 34, 35], [3]),
    ]:
        logits, _ = expert(call(x[rows]))
        torch.testing.assert_close(logits, model.body(x[rows]).detach())
        assert model._runs == ran
        model._runs.clear()


def test_a_sample_is_its_rows_everything_else_and_the_precision() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: Any = 1.0, more: Any = ()) -> Tensor:
            x = x if mask is None else x * mask
            for item in more:
                x = x + item["shift"]
            y: Tensor = self.body(x) * scale
            return y

    model, x, mask = Scaled(), samples(8), torch.ones(8, 1)
    expert = Teacher(model)
    changed = mask.clone()
    changed[3] = 0.5
    other = x.clone()
    other[2, 5] += 1e-3
    shift = {"shift": torch.full((8, 1), 0.1)}
    for arguments, misses in [
        (dict(x=x, mask=mask), 8),
        (dict(x=x, mask=changed), 1),
        (dict(x=other, mask=mask), 1),
        (dict(x=x, mask=mask, scale=2.0), 8),
        (dict(x=x, mask=mask, scale=torch.tensor([2.0])), 8),
        (dict(x=x, mask=mask, scale=torch.tensor([3.0])), 8),
        (dict(x=x.flip(0), mask=mask.flip(0), scale=torch.tensor([3.0])), 0),
        (dict(x=x), 8),
        (dict(x=x, more=[shift]), 8),
        (dict(x=x[3:5], more=[{"shift": shift["shift"][3:5]}]), 0),
        (dict(x=x.double().float(), mask=mask), 0),
    ]:
        before = expert.misses
        logits, _ = expert(call(**arguments))
        torch.testing.assert_close(logits, model(**arguments).detach())
        assert expert.misses - before == misses, arguments
    before = expert.misses
    with torch.autocast("cpu", torch.bfloat16):
        assert expert(call(x=x, mask=mask))[0].dtype == torch.bfloat16
    assert expert.misses - before == 8 and expert.by_sample
    assert expert(call(x=x, mask=mask))[0].dtype == torch.float32 and expert.misses - before == 8


def test_padding_makes_another_sample_and_answers_of_other_lengths_stay_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 5), nn.Linear(5, 3)).eval()
    ids = torch.randint(1, 10, (6, 7))
    expert = Teacher(model)
    for length in (4, 7, 5, 4, 7):
        part = torch.cat([ids[:, :4], torch.zeros(6, length - 4, dtype=torch.long)], 1)
        assert torch.equal(expert(call(part))[0], model(part))
    assert (expert.hits, expert.misses, expert.by_sample) == (12, 18, True)


class Body(nn.Module):
    """A layer with another function behind it."""

    def __init__(self, finish: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.tap, self.finish = nn.Linear(FEATURES, 4), nn.Identity(), finish

    def forward(self, x: Tensor, **other: Any) -> Any:
        return self.finish(self.tap(self.layer(x)), **other)


def unlucky(y: Tensor) -> Tensor:
    return y - y.mean(0)


DEPENDENT: dict[str, Callable[..., Any]] = {
    "statistics of the batch": unlucky,
    "a little of them": lambda y: y + 1e-3 * y.mean(0),
    "neighbours": lambda y: y + y.roll(1, 0),
    "attention": lambda y: (y @ y.T).softmax(1) @ y,
    "batch last": lambda y: y.T,
    "batch second": lambda y: y[None],
    "one number": lambda y: y.sum(),
    "flat": lambda y: y.flatten(),
    "pairs": lambda y: y.reshape(-1, 2, 4).sum(1),
    "noise": lambda y: y + torch.randn_like(y),
}


@pytest.mark.parametrize("case", DEPENDENT)
@pytest.mark.parametrize("size", [2, 6])
def test_samples_that_see_one_another_are_remembered_as_batches(tmp_path: Path, case: str, size: int) -> None:
    model, x = Body(DEPENDENT[case]).eval(), samples(12)
    expert = Teacher(model, folder=tmp_path)
    parts = [x[:size], x[size : 2 * size], x[:size].flip(0), x[:size]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = [expert(call(part))[0] for part in parts]
    assert (expert.hits, expert.misses, expert.by_sample) == (size, 3 * size, False)
    assert torch.equal(answers[3], answers[0])
    if case != "noise":
        for part, answer in zip(parts, answers, strict=True):
            assert torch.equal(answer, model(part))
    again = Teacher(model, folder=tmp_path)
    assert torch.equal(again(call(parts[1]))[0], answers[1]) and again.misses == 0 and again.by_sample is False


def test_features_that_are_no_rows_and_arguments_that_only_look_like_rows() -> None:
    model, x = Body(lambda y: y).eval(), samples(8)
    model.tap.register_forward_hook(lambda module, args, output: output.reshape(-1))
    expert = Teacher(model, ["tap"])
    model.finish = lambda y: y.reshape(-1, 4)
    torch.testing.assert_close(expert(call(x))[0], model(x).detach())
    assert expert.by_sample is False

    positions = torch.randn(4, 4)
    model = Body(lambda y, at: y + at.sum(0)).eval()
    expert = Teacher(model)
    for part in (x[:4], x[2:8], x[3:6], x[4:8], x[2:6]):  # four rows of the batch beside four positions
        torch.testing.assert_close(expert(call(part, at=positions))[0], model(part, at=positions).detach())
    assert expert.by_sample is False and expert.hits == 3  # of the two batches that are not of four samples: the layout tells them apart


def test_one_sample_is_a_batch() -> None:
    model, x = Counted(Body(lambda y: y.squeeze()).eval()), samples(6)  # gives [4] for one sample
    expert = Teacher(model)
    for _ in range(2):
        assert expert(call(x[:1]))[0].shape == (4,)
    assert (expert.by_sample, expert.hits, expert.misses) == (None, 1, 1)
    expert(call(x))
    assert expert.by_sample and expert(call(x[:1]))[0].shape == (4,) and model._runs == [1, 6, 3]
    logits, _ = expert(call(torch.cat([x[:2], samples(1, 9)])))
    assert logits.shape == (3, 4) and model._runs[-1] == 2


def test_a_form_with_a_fixed_batch_remembers_batches_in_silence() -> None:
    model = network()

    def fixed(x: Tensor) -> Tensor:
        if len(x) != 16:
            raise ValueError("the session has a fixed batch")
        return model(x).detach()

    expert = Teacher(model, lowered=fixed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (0, 1, 0):
            torch.testing.assert_close(expert(call(samples(16, seed)))[0], model(samples(16, seed)).detach())
    assert (expert.by_sample, expert.hits, expert.misses) == (False, 16, 32) and expert.lowered is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_and_answers_that_are_ruled_out(dtype: torch.dtype) -> None:
    ruled_out = torch.tensor([0.0, -torch.inf, 0.0, 0.0], dtype=dtype)
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, 4), Body(lambda y: y)).eval().to(dtype)
    model[3].layer, model[3].finish = nn.Identity(), lambda y: y + ruled_out
    x = samples(32).to(dtype)
    expert = Teacher(model)
    for seed in range(2):
        for part in shuffled(x, 8, seed):
            torch.testing.assert_close(expert(call(part))[0], model(part).detach())
    assert (expert.by_sample, expert.hits, expert.misses) == (True, 32, 32)


def test_answers_from_an_evaluation_in_inference_mode_serve_training() -> None:
    model, student, x = network(), network(1), samples(16)
    expert = Teacher(model)
    with torch.inference_mode():
        expert(call(x[:8]))
    logits, _ = expert(call(x[4:12]))
    (student(x[4:12]) * logits).sum().backward()
    logits.zero_()  # a copy
    torch.testing.assert_close(expert(call(x[8:12]))[0], model(x[8:12]).detach())
    assert not logits.is_inference() and expert.misses == 12


def test_distillation_over_a_shuffled_loader_asks_the_teacher_once_for_each_sample() -> None:
    model, x = Counted(network()), samples(64)
    states = []
    for memory in (0, 1 << 20):
        loader = torch.utils.data.DataLoader(x, batch_size=16, shuffle=True, generator=torch.Generator())
        expert, student = Teacher(model, cache_bytes=memory), network(1)
        model._runs.clear()
        distill(student, expert, Data([x[:32]], example=(x,)) if loader is None else Data(loader), config=TrainConfig(epochs=3))
        states.append(copy_state(student))
        assert expert.misses == (64 if memory else 3 * 64)
    assert all(torch.allclose(t, states[1][name], atol=1e-5) for name, t in states[0].items())


def test_a_module_that_is_named_twice_is_one_feature() -> None:
    expert = Teacher(network(), ["0", "2", "0"])
    x = samples(12)
    once, again = expert(call(x)), expert(call(x[[3, 1, 2]]))
    assert expert.hits == 3 and set(once[1]) == {"0", "2"}
    for name in ("0", "2"):
        torch.testing.assert_close(again[1][name][0], once[1][name][0][[3, 1, 2]])
