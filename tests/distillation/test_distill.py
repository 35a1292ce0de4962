"""A cut student learns its teacher back: index-aligned features, unlabelled data, remembered answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import Call, Data
from shohin.distillation import (
    FeatureTap,
    Mix,
    Teacher,
    disagreement,
    distill,
    distillation_objective,
    divergence,
    feature_loss,
    recorded,
)
from shohin.errors import DataError, ModelError
from shohin.training import TrainConfig, copy_state, train

torch.set_num_threads(1)
KEPT = (0, 2, 3, 6, 9, 10)


def network(width: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(3, width, 3, padding=1),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Conv1d(width, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def signals(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes: the frequency and the channel of a sine in noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    time = torch.arange(24) / 24 * 6.283
    x = 0.7 * torch.randn(n, 3, 24, generator=g)
    x[torch.arange(n), y % 2] += torch.sin(time * (2 + 4 * (y // 2)).unsqueeze(1) + torch.rand(n, 1, generator=g) * 6)
    return x, y


def batches(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    x, y = signals(n, seed)
    return list(zip(x.split(32), y.split(32), strict=True))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    net = network()
    data = Data(batches(512, 1), batches(256, 2))

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return F.cross_entropy(model(*call.args), call.target), {}

    result = train(net, data, objective, TrainConfig(epochs=12, lr=0.01), evaluate=data.quality)
    assert result.best_quality is not None and result.best_quality > 0.9
    return net.eval()


def cut(teacher: nn.Module) -> nn.Sequential:
    """The teacher with the hidden channels KEPT, by slicing alone."""
    student, keep = network(len(KEPT)), list(KEPT)
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        state[name] = state[name][keep]
    state["3.weight"] = state["3.weight"][:, keep]
    student.load_state_dict(state)
    return student.eval()


@pytest.mark.parametrize("loss", ["kd", "dkd", "dist", "mse"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_cut_student_recovers(teacher: nn.Module, loss: str, labels: bool) -> None:
    """From labels or without any, the student comes much nearer to its teacher and wins accuracy back."""
    train_batches, held_out = batches(512, 1), Data(batches(256, 2))
    data = Data(train_batches, held_out.train) if labels else Data([x for x, _ in train_batches], [x for x, _ in batches(256, 2)])
    student = cut(teacher)
    before, apart = held_out.quality(student), divergence(student, teacher, held_out, "train")
    frozen = copy_state(teacher)
    result = distill(student, teacher, data, loss=loss, alpha=0.2 if labels else 0.0, config=TrainConfig(epochs=8, lr=0.01))  # type: ignore[arg-type]
    after = held_out.quality(student.eval())
    assert divergence(student, teacher, held_out, "train") < 0.3 * apart
    assert after > before + 0.25
    assert all(torch.equal(t, frozen[n]) for n, t in copy_state(teacher).items()) and not teacher.training
    assert set(result.history[1].terms) == ({loss, "task"} if labels else {loss})
    if not labels:
        assert result.best_quality == pytest.approx(disagreement(student, teacher, data, Mix(loss)))


def test_aligned_features_of_a_cut_student_are_equal_before_any_training(teacher: nn.Module) -> None:
    """The first layer of a sliced student gives exactly the kept channels; any other alignment does not."""
    student, x = cut(teacher), signals(16, 3)[0]
    with recorded(student, ["0", "1"]) as ours, recorded(teacher, ["0", "1"]) as theirs, torch.no_grad():
        student(x), teacher(x)
    aligned = [FeatureTap("0", KEPT), FeatureTap("1", KEPT, weight=2.0)]
    assert float(feature_loss(ours, theirs, aligned)) < 1e-10
    shuffled = [FeatureTap("0", KEPT[::-1])]
    assert float(feature_loss(ours, theirs, shuffled)) > 0.1
    assert not student[0]._forward_hooks and not teacher[0]._forward_hooks


def test_features_train_the_student(teacher: nn.Module) -> None:
    data = Data([x for x, _ in batches(512, 1)])
    student = cut(teacher)
    taps = [FeatureTap("1", KEPT), FeatureTap("3"), FeatureTap("5", dim=1)]
    result = distill(student, teacher, data, feature_weight=1.0, taps=taps, config=TrainConfig(epochs=6, lr=3e-3))
    features = [r.terms["features"] for r in result.history[1:]]
    assert features[-1] < 0.6 * features[0]


def test_weighted_mean_over_taps_by_hand() -> None:
    student = {"a": [torch.tensor([[1.0, 2.0]])], "b": [torch.tensor([[0.0, 4.0]])]}
    expert = {"a": [torch.tensor([[9.0, 1.0, 3.0]])], "c": [torch.tensor([[1.0, 3.0]])]}
    taps = [FeatureTap("a", (1, 2), weight=3.0), FeatureTap("b", teacher="c")]
    # a: mean(0, 1) / var(1, 3) = 0.5 / 1; b: mean(1, 1) / 1 = 1
    assert float(feature_loss(student, expert, taps)) == pytest.approx((3 * 0.5 + 1.0) / 4)


def test_objective_is_the_weighted_sum_of_its_terms(teacher: nn.Module) -> None:
    student, data = cut(teacher), Data(batches(64, 4))
    objective = distillation_objective(
        teacher, alpha=0.3, temperature=2.0, task_loss=data.batch_loss, feature_weight=0.5, taps=[FeatureTap("0", KEPT), FeatureTap("3")]
    )
    total, terms = objective(student, next(data.calls("train")), torch.Generator())
    assert total.item() == pytest.approx(0.3 * terms["task"] + 0.7 * terms["kd"] + 0.5 * terms["features"], rel=1e-6)


def test_remembered_answers_change_nothing(teacher: nn.Module) -> None:
    data, config = Data(batches(128, 5)), TrainConfig(epochs=3)
    states = []
    for memory in (0, 256 << 20):
        expert = Teacher(teacher, ["1"], memory)
        student = cut(teacher)
        objective = distillation_objective(expert, feature_weight=0.1, taps=[FeatureTap("1", KEPT)])
        train(student, data, objective, config)
        states.append(copy_state(student))
        assert (expert.hits, expert.misses) == ((0, 384) if memory == 0 else (256, 128))
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_memory_is_bounded_and_batches_are_told_apart(teacher: nn.Module) -> None:
    x = signals(64, 6)[0]
    expert = Teacher(teacher, (), cache_bytes=32 * 4 * 4 + 10)
    data = Data(example=(x,))
    for part in (x[:32], x[32:], x[:32], x[32:], x[1:33]):
        logits, _ = expert(data.call(part))
        torch.testing.assert_close(logits, teacher(part).detach())
    assert expert.hits == 63 and expert.misses == 97


def test_teacher_in_train_mode_is_run_in_eval_mode(teacher: nn.Module) -> None:
    x = signals(32, 7)[0]
    expected = teacher(x).detach()
    teacher.train()
    try:
        before = copy_state(teacher)
        logits, _ = Teacher(teacher)(Data(example=(x,)).call(x))
        torch.testing.assert_close(logits, expected)
        assert teacher.training and all(torch.equal(t, before[n]) for n, t in copy_state(teacher).items())
    finally:
        teacher.eval()


def test_resumes_from_a_checkpoint_to_the_same_bits(teacher: nn.Module, tmp_path: Path) -> None:
    data = Data(batches(128, 5))
    config = TrainConfig(epochs=4, lr=3e-3)
    whole = cut(teacher)
    distill(whole, teacher, data, config=config)
    calls = 0

    def interrupted(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return data.quality(model)

    half = cut(teacher)
    with pytest.raises(KeyboardInterrupt):
        distill(half, teacher, data, config=config, checkpoint=tmp_path / "d", evaluate=interrupted)
    again = cut(teacher)
    distill(again, teacher, data, config=config, checkpoint=tmp_path / "d")
    assert all(torch.equal(t, copy_state(again)[n]) for n, t in copy_state(whole).items())


def test_refusals(teacher: nn.Module) -> None:
    student, unlabelled = cut(teacher), Data([signals(8, 0)[0]])
    with pytest.raises(DataError, match="asks for labels"):
        distill(student, teacher, unlabelled, alpha=0.5)
    with pytest.raises(DataError, match="needs taps"):
        distillation_objective(teacher, feature_weight=1.0)
    with pytest.raises(DataError, match="task_loss"):
        distillation_objective(teacher, alpha=0.5)
    with pytest.raises(DataError, match="unknown distillation loss 'kld'"):
        distillation_objective(teacher, loss="kld")
    with pytest.raises(ModelError, match="student has no module 'body'"):
        distill(student, teacher, unlabelled, feature_weight=1.0, taps=[FeatureTap("body")])
    with pytest.raises(ModelError, match=r"must lie in \[0, 12\)"):
        distill(student, teacher, unlabelled, feature_weight=1.0, taps=[FeatureTap("0", (0, 1, 2, 3, 4, 12))])
