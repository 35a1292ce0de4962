"""A transformer of the transformers library with fewer layers and narrower feed-forward parts, made by a plan and taught by the whole one."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from shohin.distillation import FeatureTap, distill
from shohin.graph import Graph
from shohin.training import TrainConfig
from sweep.torchvision_schemas import torchvision_models

if find_spec("torchvision"):
    torchvision_models()  # transformers imports torchvision, which may need help
tf = pytest.importorskip("transformers")

DEPTH, WORDS, HIDDEN = 4, 40, 24
SKIPPED = (1, 2)


class Encoder(nn.Module):
    """A text to one vector: the mean over its words."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = tf.BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=DEPTH,
            num_attention_heads=2,
            intermediate_size=HIDDEN,
            max_position_embeddings=16,
            initializer_range=0.25,  # as lively as a trained one: what is skipped matters
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = tf.BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        mask = torch.ones(16, 8, dtype=torch.long)
        mask[::3, 5:] = 0
        out.append({"input_ids": torch.randint(0, WORDS, (16, 8), generator=g), "attention_mask": mask})
    return out


@cache
def whole(seed: int) -> tuple[Encoder, Graph]:
    teacher = Encoder(seed).eval()
    graph = shohin.understand(teacher, tuple(batches(1, 0)[0].values()))
    assert isinstance(graph, Graph)
    return teacher, graph


def smaller(seed: int, neurons: int = HIDDEN) -> Encoder:
    """Without two layers; of the feed-forward neurons of the others the first ones."""
    teacher, graph = whole(seed)
    widths = {
        f"bert.encoder.layer.{i}.intermediate.dense.weight": tuple(range(neurons))
        for i in range(DEPTH)
        if neurons < HIDDEN and i not in SKIPPED
    }
    plan = shohin.Plan(graph.program.fingerprint, widths, tuple(f"bert.encoder.layer.{i}" for i in SKIPPED))
    made = shohin.cut(teacher, plan)
    assert isinstance(made, Encoder)
    return made


def distance(student: nn.Module, teacher: nn.Module, data: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.stack([(1 - (student(**b) * teacher(**b)).sum(1)).mean() for b in data]).mean())


def teach(student: Encoder, teacher: Encoder, **how: Any) -> None:
    """80 steps."""
    data = shohin.Data(train=batches(20, 5), validation=batches(2, 6))
    distill(
        student,
        teacher,
        data,
        config=TrainConfig(epochs=4, lr=3e-3, seed=1),
        evaluate=lambda m: distance(m, teacher, batches(2, 6)),
        lower_is_better=True,
        **how,
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_the_student_is_the_teacher_without_two_layers_and_some_neurons(seed: int) -> None:
    teacher, _ = whole(seed)
    student = smaller(seed, 18)
    own, state = student.state_dict(), teacher.state_dict()
    assert not any(f".layer.{i}." in name for name in own for i in SKIPPED)
    for name, tensor in own.items():
        kept = tuple(slice(0, n) for n in tensor.shape)
        assert torch.equal(tensor, state[name][kept])
    assert own["bert.encoder.layer.3.intermediate.dense.weight"].shape == (18, 16)
    by_hand = Encoder(seed).eval()
    by_hand.load_state_dict(state)
    for i in (0, 3):
        by_hand.bert.encoder.layer[i].output.dense.weight.data[:, 18:] = 0
    by_hand.bert.encoder.layer = nn.ModuleList([by_hand.bert.encoder.layer[i] for i in (0, 3)])
    for batch in batches(2, 4):
        torch.testing.assert_close(student(**batch), by_hand(**batch))


@pytest.mark.parametrize("neurons", [HIDDEN, 18])
@pytest.mark.parametrize("seed", [1, 2])
def test_taught_it_is_better_than_at_the_start(seed: int, neurons: int) -> None:
    """Features align by name: at a skipped layer the student's is the output of the layer before."""
    teacher, _ = whole(seed)
    student, fresh = smaller(seed, neurons), batches(4, 99)
    start = distance(student, teacher, fresh)
    taps = tuple(FeatureTap(f"bert.encoder.layer.{i}", None, -1) for i in (2, 3))
    teach(student, teacher, loss="cosine", feature_weight=1.0, taps=taps)
    assert start > 0.01
    assert distance(student, teacher, fresh) < 0.6 * start


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_plan_is_a_better_start_than_chance(seed: int) -> None:
    """After the same steps."""
    teacher, _ = whole(seed)
    planned, chance = smaller(seed), smaller(seed)
    for p in chance.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.25, generator=torch.Generator().manual_seed(p.numel()))
    for student in (planned, chance):
        teach(student, teacher, loss="cosine")
    fresh = batches(4, 99)
    ours, theirs = distance(planned, teacher, fresh), distance(chance, teacher, fresh)
    assert ours < 0.9 * theirs, (ours, theirs)
