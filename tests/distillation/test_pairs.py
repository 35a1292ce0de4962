"""Any teacher with any student: adapters, matching, several teachers, chains, and distillation in the user's own loop."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.data import Call, Data
from shohin.distillation import (
    Ensemble,
    FeatureTap,
    Loss,
    Mix,
    Teacher,
    assistants,
    born_again,
    cka,
    distill,
    distillation_objective,
    losses,
    match,
)
from shohin.errors import DataError, ModelError
from shohin.training import TrainConfig

torch.set_num_threads(1)


class Net(nn.Module):
    """Three stages of convolutions and a linear head."""

    def __init__(self, width: int, stages: int = 3, classes: int = 4) -> None:
        super().__init__()
        sizes = [1, *(width * (i + 1) for i in range(stages))]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2) if i < 2 else nn.Identity())
            for i, (a, b) in enumerate(pairwise(sizes))
        )
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bars in one of four directions, with noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=g)
    x = 0.7 * torch.randn(count, 1, 8, 8, generator=g)
    for i, label in enumerate(y.tolist()):
        k = int(torch.randint(0, 8, (1,), generator=g))
        line = torch.arange(8)
        rows, columns = ((torch.full((8,), k), line), (line, torch.full((8,), k)), (line, (line + k) % 8), (line, (k - line) % 8))[label]
        x[i, 0, rows, columns] += 2
    return x, y


def batches(count: int, seed: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(t.split(size) for t in images(count, seed)), strict=True))


def accuracy(model: nn.Module, seed: int = 99) -> float:
    x, y = images(800, seed)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    net = Net(12)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    for epoch in range(6):
        for x, y in batches(640, epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert accuracy(net) > 0.9
    return net.eval()


def small(seed: int = 1, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(3, **options)


DATA = Data(batches(256, 50), batches(64, 51))
SHORT = TrainConfig(epochs=2, lr=5e-3, seed=3)


def test_adapters_train_along_and_are_gone_afterwards(teacher: nn.Module) -> None:
    student = small()
    names = set(student.state_dict())
    taps = [FeatureTap("stages.0"), FeatureTap("stages.1", teacher="stages.2")]
    result = distill(student, teacher, DATA, config=SHORT, feature_weight=0.5, taps=taps)
    assert set(student.state_dict()) == names and set(result.state) == {*dict(student.named_parameters()), *dict(student.named_buffers())}
    assert result.history[-1].terms["features"] < result.history[1].terms["features"]
    assert all(torch.equal(result.state[n], p) for n, p in student.named_parameters())


def test_features_of_any_width_without_adapters(teacher: nn.Module) -> None:
    taps = [FeatureTap("stages.2", loss=losses.rkd, aligned=False), FeatureTap("stages.1", loss=losses.attention_transfer, aligned=False)]
    result = distill(small(), teacher, DATA, config=SHORT, feature_weight=0.5, taps=taps)
    assert result.history[-1].terms["features"] < result.history[1].terms["features"]


def test_what_no_adapter_can_bridge_is_said(teacher: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"no linear layer leads from .* to "):
        distill(small(), teacher, DATA, config=SHORT, feature_weight=1.0, taps=[FeatureTap("stages.1", teacher="head")])
    with pytest.raises(ModelError, match=r"teacher has no module 'stage.1'.*stages.1"):
        distill(small(), teacher, DATA, config=SHORT, feature_weight=1.0, taps=[FeatureTap("stages.1", teacher="stage.1")])
    with pytest.raises(ModelError, match=r"does not watch 'stages.1'"):
        distill(small(), Teacher(teacher), DATA, config=SHORT, feature_weight=1.0, taps=[FeatureTap("stages.1")])
    with pytest.raises(DataError, match=r"5 classes .* in the student and 4 in the teacher"):
        distill(small(classes=5), teacher, Data([images(16, 0)[0]]), config=SHORT)


@pytest.mark.parametrize("by", ["predict", "cka"])
def test_matching_finds_the_stage_that_a_feature_came_from(teacher: nn.Module, by: Any) -> None:
    """A student that is the teacher with its channels turned: each stage tells everything of the teacher's same stage."""
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        order_of = torch.randperm(36, generator=torch.Generator().manual_seed(0))
        conv, norm = student.stages[2][0], student.stages[2][1]  # type: ignore[index]
        for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(tensor[order_of])
        student.head.weight.copy_(student.head.weight[:, order_of])  # type: ignore[operator, index]
    calls = list(DATA.calls("train"))
    taps = match(student, teacher, calls, count=3, by=by)
    order = [n for n, _ in teacher.named_modules()]
    assert len(taps) == 3 and taps[-1].module.startswith("head")
    assert [order.index(t.teacher_module) for t in taps] == sorted(order.index(t.teacher_module) for t in taps)
    first = match(student, teacher, calls, count=12, by=by)
    stages = [
        (t.module.split(".")[1], t.teacher_module.split(".")[1]) for t in first if "stages" in t.module and "stages" in t.teacher_module
    ]
    assert sum(a == b for a, b in stages) >= 0.9 * len(stages) > 0


def test_matching_by_name_by_shape_and_what_it_refuses(teacher: nn.Module) -> None:
    calls = list(DATA.calls("train"))[:1]
    assert {(t.module, t.teacher_module) for t in match(small(), teacher, calls, 20, "name")} >= {
        ("stages.0", "stages.0"),
        ("head", "head"),
    }
    shaped = match(small(), teacher, calls, 20, "shape")
    assert [(t.module, t.teacher_module) for t in shaped] == [("head", "head")]
    assert shaped[0].dim == -1
    with pytest.raises(DataError, match="16 samples"):
        match(small(), teacher, [DATA.call((calls[0].args[0][:4], None))])
    with pytest.raises(DataError, match="by='best'"):
        match(small(), teacher, calls, by="best")  # type: ignore[arg-type]
    student = small()
    student.train()
    match(student, teacher, calls)
    assert student.training and not student._forward_hooks and not student.head._forward_hooks


def test_a_given_teacher_that_follows_features_keeps_its_folder(teacher: nn.Module, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        expert = Teacher(teacher, folder=tmp_path)
        shohin.distill(small(), expert, DATA, losses=("kd", "features"), config=replace(SHORT, epochs=1), inherit=False)
        found.append(sorted(tmp_path.rglob("*.safetensors")))
    assert found[0] and found[0] == found[1]  # the second run finds what the first wrote
    again = expert.watching(["stages.1"])
    assert again.model is teacher and again.names == ("stages.1",)


def test_alignment_does_not_see_rotations_and_scales() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=g).double()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g).double())[0]
    assert cka(x, 3 * x @ turn + 5) == pytest.approx(1.0) and cka(x, torch.randn(40, 6, generator=g).double()) < 0.4
    assert cka(x, torch.ones(40, 2).double()) == 0


def test_the_users_own_loop_takes_the_same_steps(teacher: nn.Module) -> None:
    """`Loss` in a plain loop gives the values and the gradients of the objective of the one loop."""
    calls = list(DATA.calls("train"))
    taps = (FeatureTap("stages.2"),)
    for fields in ({}, {"loss": "dkd", "alpha": 0.3, "task_loss": DATA.batch_loss}, {"feature_weight": 0.4, "taps": taps}):
        ours, theirs = small(), small()
        settings: dict[str, Any] = fields
        plain = Loss(teacher, ours, example=calls[0], **settings)
        objective = distillation_objective(teacher, **{**settings, "feature_weight": 0.0, "taps": ()})
        for call in calls[:2]:
            value = plain(ours(call.args[0]), call.args[0], target=call.target)
            wanted, terms = objective(theirs, call, torch.Generator())
            if "taps" in settings:
                assert set(plain.terms) == {*terms, "features"} and list(plain.parameters())
                wanted = wanted + 0.4 * plain.terms["features"]
            assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
            value.backward()
        assert all(p.grad is not None for p in (*ours.parameters(), *plain.parameters()))
        assert not set(dict(plain.named_parameters())) & set(dict(teacher.named_parameters()))
        plain.close()
        assert not ours.stages[2]._forward_hooks


def test_features_in_the_users_loop_are_those_of_the_last_step(teacher: nn.Module) -> None:
    student = small()
    loss = Loss(teacher, student, example=next(DATA.calls("train")), feature_weight=1.0, taps=[FeatureTap("stages.1")])
    x = images(8, 0)[0]
    student.eval()
    student(x)  # an evaluation between steps leaves nothing behind
    student.train()
    first = loss(student(x), x)
    with pytest.raises(ModelError, match="ran 0 times"):
        loss(torch.zeros(8, 4), x)
    assert bool(torch.isfinite(first))
    with pytest.raises(ModelError, match="give the student"):
        Loss(teacher, feature_weight=1.0, taps=[FeatureTap("stages.1")])
    with pytest.raises(DataError, match=r"no setting 'temprature'.*temperature"):
        Loss(teacher, temprature=2)
    with pytest.raises(DataError, match="not both"):
        Loss(teacher, mix=Mix(), alpha=0.0)


def test_an_ensemble_averages_probabilities(teacher: nn.Module) -> None:
    torch.manual_seed(5)
    x = images(6, 3)[0]
    others = [teacher, small().eval(), small(2).eval()]
    p = torch.stack([m(x).softmax(-1) for m in others])
    assert torch.allclose(Ensemble(others)(x).exp(), p.mean(0), atol=1e-6)
    assert torch.allclose(Ensemble(others, [2, 1, 1])(x).exp(), (2 * p[0] + p[1] + p[2]) / 4, atol=1e-6)
    sure = 1 + (p * p.log()).sum(-1, keepdim=True) / torch.tensor(4.0).log()
    wanted = (p * sure / sure.sum(0)).sum(0)
    assert torch.allclose(Ensemble(others, "confidence")(x).exp(), wanted, atol=1e-5)
    result = distill(small(), Ensemble(others), DATA, config=SHORT)
    assert result.history[-1].terms["kd"] < result.history[1].terms["kd"]
    with pytest.raises(DataError, match="3 numbers"):
        Ensemble(others, [1, 2])
    with pytest.raises(ModelError, match="other shapes"):
        Ensemble([teacher, small(classes=5)])(x)


def test_chains_hand_the_teacher_on(teacher: nn.Module) -> None:
    seen: list[tuple[nn.Module, nn.Module]] = []

    def step(student: nn.Module, whose: nn.Module, data: Data) -> Any:
        seen.append((student, whose))
        return distill(student, whose, data, config=TrainConfig(epochs=1, lr=5e-3))

    middle, last = Net(6), small()
    results = assistants([middle, last], teacher, DATA, step)
    assert [(a is s, b is t) for (a, b), (s, t) in zip(seen, [(middle, teacher), (last, middle)], strict=True)] == [(True, True)] * 2
    assert len(results) == 2
    seen.clear()
    students, results = born_again(lambda i: small(i), teacher, DATA, step, generations=2)
    assert seen[1][1] is students[0] and len(results) == 2
    with pytest.raises(DataError, match="generations"):
        born_again(lambda i: small(i), teacher, DATA, step, generations=0)


def test_words_that_count_are_taken_from_labels_or_masks() -> None:
    torch.manual_seed(0)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(7, 5), nn.Linear(5, 7)

        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.out(self.table(ids))

    student, whose = Words(), Words()
    ids = torch.randint(0, 7, (2, 4))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    wanted = losses.tokens(student(ids), whose(ids), mask.bool())
    loss = Loss(whose, loss="tokens", temperature=1.0)
    assert torch.allclose(loss(student(ids), ids, attention_mask=mask), wanted)
    labels = torch.where(mask.bool(), ids, -100)
    assert torch.allclose(loss(student(ids), ids, target=labels), wanted)
    assert isinstance(Call((ids,), {}, None, None), Call)
