"""What is asked is what is done: epochs are judged by the loss, ensembles average what it compares, labels and samples that do not count
do not, and what the user froze stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

import shohin
from shohin.data import Call, Data, first_output
from shohin.distillation import Ensemble, FeatureTap, Loss, Mix, Teacher, assistants, born_again, distill, losses
from shohin.distillation.named import NAMED
from shohin.errors import DataError, ModelError, RunError
from shohin.training import TrainConfig

torch.set_num_threads(1)
SHORT = TrainConfig(epochs=6, lr=1e-2, seed=0)


def mlp(outputs: int, seed: int, hidden: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Squeezed(nn.Module):
    """Answers ``[N]``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = mlp(1, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)  # type: ignore[no-any-return]


X = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
PLAIN = [x for x in X.split(16)]


def error(student: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return float((student.eval()(X) - teacher.eval()(X)).square().mean())


# epochs are judged by the loss that was asked for


@pytest.mark.parametrize(
    ("loss", "outputs"), [("mse", 1), ("mse", 3), ("regression", 1), ("multi_label", 1), ("embeddings", 4), ("cosine", 4)]
)
def test_answers_without_classes_are_learned(loss: str, outputs: int) -> None:
    teacher, student = mlp(outputs, 0), mlp(outputs, 1)
    before = error(student, teacher)
    found = shohin.distill(student, teacher, Data(PLAIN), losses=(loss,), config=SHORT, inherit=False)
    training = found.notes["training"]
    assert training["best_epoch"] >= 0 and found.model is not None
    assert loss in ("embeddings", "cosine", "multi_label") or error(found.model, teacher) < 0.8 * before


def test_vectors_of_other_widths_are_compared_by_the_loss() -> None:
    found = shohin.distill(mlp(5, 1), mlp(9, 0), Data(PLAIN), losses="embeddings", config=SHORT)
    assert found.notes["training"]["best_epoch"] >= 0


@pytest.mark.parametrize("inherit", [True, False])
def test_models_that_answer_one_number_a_sample(inherit: bool) -> None:
    teacher, student = Squeezed(0), Squeezed(1)
    before = error(student, teacher)
    found = shohin.distill(student, teacher, Data(PLAIN), config=SHORT, inherit=inherit)
    assert found.model is not None and error(found.model, teacher) < 0.8 * before


DEFAULTS: dict[str, tuple[nn.Module, Any, str]] = {
    "classes": (mlp(3, 0), torch.randint(3, (16,)), "kd"),
    "unlabelled classes": (mlp(3, 0), None, "kd"),
    "a number": (mlp(1, 0), torch.randn(16, 1), "mse"),
    "numbers": (mlp(3, 0), torch.randn(16, 3), "mse"),
    "unlabelled number": (mlp(1, 0), None, "mse"),
    "one of the classes": (mlp(3, 0), torch.eye(3)[torch.arange(16) % 3], "kd"),
    "mixed classes": (mlp(3, 0), torch.full((16, 3), 0.5) * torch.tensor([1.0, 0.5, 0.5]), "kd"),
    "labels": (mlp(3, 0), torch.tensor([1.0, 1.0, 0.0]).expand(16, 3), "multi_label"),
}


@pytest.mark.parametrize(("teacher", "target", "loss"), DEFAULTS.values(), ids=DEFAULTS)
def test_the_default_loss_suits_the_answers(teacher: nn.Module, target: Tensor | None, loss: str) -> None:
    batch: Any = X[:16] if target is None else (X[:16], target)
    found = shohin.distill(copy.deepcopy(teacher), teacher, Data([batch]), epochs=1, inherit=False)
    assert loss in found.notes["training"]["history"][-1]["terms"]


@pytest.mark.parametrize("loss", ["kd", "tokens", "dist"])
def test_one_class_has_nothing_to_learn(loss: str) -> None:
    with pytest.raises(DataError, match=r"two classes or more are compared.*'mse' or 'regression'"):
        Loss(mlp(1, 0), loss=loss)(mlp(1, 1)(X), X)


# ensembles


def test_ensembles_average_what_the_loss_compares() -> None:
    members = [mlp(3, i) for i in range(3)]
    raw = torch.stack([m(X) for m in members])
    numbers, labels = (Ensemble(members, answers=kind)(X) for kind in ("numbers", "labels"))  # type: ignore[arg-type]
    torch.testing.assert_close(numbers, raw.mean(0))
    torch.testing.assert_close(labels.sigmoid(), raw.sigmoid().mean(0))
    weighted = Ensemble(members, [1.0, 0.0, 3.0], answers="numbers")(X)
    torch.testing.assert_close(weighted, (raw[0] + 3 * raw[2]) / 4)


@pytest.mark.parametrize("loss", NAMED)
def test_several_teachers_and_a_loss_that_takes_their_answers_for_something_else(loss: str) -> None:
    kind = NAMED[loss].answers
    for answers in ("classes", "labels", "numbers"):
        both = Ensemble([mlp(3, 0), mlp(3, 1)], answers=answers)  # type: ignore[arg-type]
        if answers == kind:
            Loss(both, loss=loss)(mlp(3, 2)(X), X)
            continue
        with pytest.raises(DataError, match=f"compares {kind}.*answers='{kind}'"):
            Loss(both, loss=loss)
        with pytest.raises(DataError, match=f"compares {kind}"):
            distill(mlp(3, 2), both, Data(PLAIN), config=SHORT, loss=loss)


def test_several_teachers_of_numbers() -> None:
    teachers, student = [mlp(1, 0), mlp(1, 3)], mlp(1, 1)
    found = shohin.distill(student, teachers, Data(PLAIN), config=SHORT, inherit=False)
    both = Ensemble(teachers, answers="numbers")
    assert found.model is not None and error(found.model, both) < 0.8 * error(student, both)
    with pytest.raises(DataError, match="entropy of classes"):
        Ensemble(teachers, "confidence", answers="numbers")
    with pytest.raises(DataError, match="answers='words' is not known"):
        Ensemble(teachers, answers="words")  # type: ignore[arg-type]


def test_chains_take_what_the_verb_returns() -> None:
    def step(student: nn.Module, teacher: nn.Module, data: Data) -> shohin.Candidate:
        seen.append(teacher)
        return shohin.distill(student, teacher, data, epochs=1, inherit=False)

    seen: list[nn.Module] = []
    first, _ = assistants([mlp(3, 1), mlp(3, 2)], mlp(3, 0), Data(PLAIN), step)
    assert isinstance(first, shohin.Candidate) and seen[1] is first.model
    made, results = born_again(lambda i: mlp(3, i), mlp(3, 9), Data(PLAIN), step, 2)
    assert [m is r.model for m, r in zip(made, results, strict=True)] == [True, True]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="a TrainResult, or a Candidate"):
        assistants([mlp(3, 1)], mlp(3, 0), Data(PLAIN), lambda *_: None)  # type: ignore[arg-type, return-value]


# words


class Causal(nn.Module):
    """Logits ``[N, L, V]`` from a word and the one before."""

    def __init__(self, seed: int, words: int = 11) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.out = nn.Embedding(words, 24), nn.Linear(24, words)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.out(torch.tanh(self.words(input_ids))))


def counted(rows: int, seed: int) -> Tensor:
    """Each word is the one before plus one."""
    start = torch.randint(11, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(8)) % 11


def test_labels_that_repeat_the_words_are_of_the_next_word() -> None:
    words = counted(4, 0)
    call = Data([{"input_ids": words, "labels": words.clone()}]).call({"input_ids": words, "labels": words.clone()})
    assert torch.equal(call.target[:, :-1], words[:, 1:]) and bool((call.target[:, -1] == -100).all())
    prompt = words.clone()
    prompt[:, :3] = -100  # as a collator leaves prompts and padding out
    call = Data([words]).call({"input_ids": words, "labels": prompt})
    assert torch.equal(call.target != -100, torch.arange(8).expand(4, 8).ge(2) & torch.arange(8).lt(7))
    beside = torch.cat([words[:, 1:], words[:, :1]], 1)
    for own in (beside, words.float(), words[:, 0], torch.full_like(words, -100)):
        assert torch.equal(Data([words]).call({"input_ids": words, "labels": own}).target, own)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_language_model_learns_the_next_word(labelled: bool) -> None:
    batches = [{"input_ids": counted(16, i), **({"labels": counted(16, i)} if labelled else {})} for i in range(8)]
    held = Data([{"input_ids": counted(16, 99), "labels": counted(16, 99)}])

    def own(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return held.batch_loss(model(*call.args, **call.kwargs), call), {}

    teacher = Causal(0)
    shohin.training.train(
        teacher, Data([{"input_ids": counted(16, i), "labels": counted(16, i)} for i in range(8)]), own, replace(SHORT, epochs=20)
    )
    assert held.quality(teacher.eval()) == 1.0
    found = shohin.distill(Causal(5), teacher, Data(batches), losses="tokens", config=replace(SHORT, epochs=15), inherit=False)
    assert found.model is not None and held.quality(found.model.eval()) > 0.9


@pytest.mark.parametrize("loss", ["kd", "tokens"])
def test_words_that_do_not_count_teach_nothing(loss: str) -> None:
    words, mask = counted(4, 0), torch.ones(4, 8, dtype=torch.long)
    mask[:, 5:] = 0
    teacher, student = Causal(0), Causal(1)
    whole = Loss(Teacher(teacher, cache_bytes=0), loss=loss)
    some = whole(student(words), input_ids=words, attention_mask=mask)
    torch.testing.assert_close(some, whole(student(words[:, :5]).logits, input_ids=words[:, :5]))
    none = whole(student(words), input_ids=words, attention_mask=torch.zeros_like(mask))
    assert none.item() == 0
    none.backward()  # type: ignore[no-untyped-call]
    assert float(student.out.weight.grad.abs().max()) == 0  # type: ignore[union-attr]


def test_labels_that_do_not_count_are_no_classes() -> None:
    target = torch.randint(3, (96,))
    target[::3] = -100
    student, teacher = mlp(3, 1)(X), mlp(3, 0)
    known = torch.where(target == -100, teacher(X).argmax(1), target)
    found = Loss(teacher, loss="dkd")(student, X, target=target)
    torch.testing.assert_close(found, losses.dkd(student, teacher(X), known, 2.0))
    data = Data([(X[:8], torch.full((8,), -100))])
    assert data.batch_loss(mlp(3, 1)(X[:8]), next(data.calls("train"))).item() == 0


# batches and resuming


def test_a_last_batch_that_is_too_small_teaches_nothing() -> None:
    data = Data([X[:8], X[8:16], X[16:17]])
    with pytest.warns(UserWarning, match="teaches nothing.*needs 3 or more, got 1; use drop_last=True"):
        found = shohin.distill(mlp(4, 1), mlp(4, 0), data, losses="embeddings", epochs=1, inherit=False)
    assert found.notes["training"]["best_epoch"] == 0
    with pytest.raises(DataError, match=r"no batch of the validation data can be compared: .*use larger batches, or Data\(metric"):
        shohin.distill(mlp(4, 1), mlp(4, 0), Data([X[:2], X[2:4]]), losses="embeddings", epochs=1, inherit=False)
    taps = [FeatureTap("0", loss=losses.rkd, aligned=False)]
    with pytest.warns(UserWarning, match="teaches nothing"):
        distill(mlp(4, 1), mlp(4, 0), data, config=replace(SHORT, epochs=1), taps=taps, feature_weight=1.0)


CHANGES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "loss": (lambda: mlp(3, 0), {"loss": "mse"}, "the distillation loss is 'kd' there, 'mse' here"),
    "temperature": (lambda: mlp(3, 0), {"temperature": 7.0}, "the temperature is 2.0 there, 7.0 here"),
    "teacher": (lambda: mlp(3, 7), {}, "the norm of the teacher's weights"),
    "taps": (lambda: mlp(3, 0), {"taps": [FeatureTap("0")], "feature_weight": 0.5}, "the tapped modules|the weight of features"),
}


@pytest.mark.parametrize(("teacher", "settings", "said"), CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_knows_what_was_distilled(
    teacher: Callable[[], nn.Module], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    first = distill(mlp(3, 1), mlp(3, 0), Data(PLAIN), config=SHORT, checkpoint=path)
    again = distill(mlp(3, 1), mlp(3, 0), Data(PLAIN), config=SHORT, checkpoint=path)
    assert all(torch.equal(t, again.state[n]) for n, t in first.state.items())
    with pytest.raises(RunError, match=said):
        distill(mlp(3, 1), teacher(), Data(PLAIN), config=SHORT, checkpoint=path, **settings)


def test_random_states_are_given_back() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.utils.data.TensorDataset(X, torch.randint(3, (96,)))
    loader = torch.utils.data.DataLoader(rows, 16, shuffle=True, generator=generator)
    student, teacher = mlp(3, 1), mlp(3, 0)
    before = torch.get_rng_state(), generator.get_state()
    distill(student, teacher, Data(loader), config=replace(SHORT, epochs=1), taps=[FeatureTap("0")], feature_weight=0.1, alpha=0.1)
    assert torch.equal(before[0], torch.get_rng_state()) and torch.equal(before[1], generator.get_state())


# what is frozen


def test_frozen_weights_and_normalization_stay() -> None:
    def net(seed: int, width: int = 16) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))

    student = net(1, 8)
    student.train()
    student[1].eval()
    student[0].requires_grad_(False)
    found = shohin.distill(student, net(0), Data(PLAIN), config=SHORT)
    assert found.model is not None and "inherited" not in found.notes
    state, start = found.model.state_dict(), student.state_dict()
    assert all(torch.equal(state[n], start[n]) for n in start if n.startswith("0.") or "running" in n)
    assert not torch.equal(state["3.weight"], start["3.weight"])
    for whole in (student.eval(), student.train()):  # a model in one mode is trained as usual
        moved = shohin.distill(whole, net(0), Data(PLAIN), config=SHORT, inherit=False).model
        assert moved is not None and not torch.equal(moved.state_dict()["1.running_mean"], start["1.running_mean"])


def test_features_of_modules_that_are_recomputed() -> None:
    class Saving(nn.Module):
        """Runs its first layer again in the backward pass."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(*list(mlp(16, seed))[:2]), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(recompute(self.body, x, use_reentrant=False))  # type: ignore[no-any-return]

    student, teacher = Saving(1), Saving(0)
    loss = Loss(teacher, student, taps=[FeatureTap("body.0")], feature_weight=1.0)
    student.train()
    for _ in range(3):
        loss(student(X), X).backward()
        assert loss.terms["features"] > 0


def test_vectors_behind_whole_numbers_are_found() -> None:
    """As text encoders give them: words first, then what they mean."""
    assert torch.equal(first_output({"input_ids": torch.ones(2, 3).long(), "sentence_embedding": X}), X)
    assert torch.equal(first_output((torch.ones(2).long(), torch.zeros(3).long())), torch.ones(2).long())


def test_two_adapters_of_one_module_are_refused() -> None:
    taps = [FeatureTap("0", teacher="0"), FeatureTap("0", teacher="2")]
    with pytest.raises(ModelError, match="two feature taps of '0' need an adapter each"):
        distill(mlp(3, 1, 8), mlp(3, 0), Data(PLAIN), config=SHORT, taps=taps, feature_weight=1.0)


def test_a_mix_names_its_loss_between_answers() -> None:
    assert Mix(loss=losses.logits_mse).name == "logits_mse"
    assert float(Mix(loss=F.l1_loss).between(X, X + 1, Call((), {}, None, None))) == pytest.approx(1.0)
