"""Depth: a block that does nothing scores zero, and what cannot be skipped says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import small_models as models
from shohin.data import Data
from shohin.errors import DataError
from shohin.pruning.criteria import Inputs
from shohin.pruning.criteria.blocks import BLOCK_CRITERIA, cosine_change, skip_divergence
from shohin.surgery import understand

D = torch.float64


def inputs_of(model: nn.Module, x: Tensor) -> Inputs:
    data = Data(train=[x[: len(x) // 2], x[len(x) // 2 :]])
    return Inputs(understand(model, (x[:2],)), data, list(data.calls("train")))


def transformer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = models.lively(models.ViT("sdpa", layers=3))
    with torch.no_grad():
        for layer in (model.layers[1].attn.proj, model.layers[1].fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    return model, torch.randn(8, 3, 8, 8, dtype=D)


@pytest.mark.parametrize("name", BLOCK_CRITERIA)
def test_blocks_that_add_nothing_score_zero_and_others_do_not(name: str) -> None:
    inputs = inputs_of(*transformer())
    found = BLOCK_CRITERIA[name](inputs)
    assert not found.left_out and set(found.scores) == set(inputs.graph.skippable)
    assert any(r.name == "layers.1" for r in inputs.graph.layers)
    for region, score in found.scores.items():
        idle = region.startswith("layers.1")
        assert (abs(score) < 1e-12) if idle else score > 1e-6, (region, score)


def test_the_change_is_one_minus_the_cosine_along_the_width() -> None:
    model, x = transformer()
    seen: dict[str, Tensor] = {}
    model.layers[0].register_forward_pre_hook(lambda m, args: seen.update(before=args[0]))
    model.layers[0].register_forward_hook(lambda m, args, out: seen.update(after=out))
    with torch.no_grad():
        model(x)
    model.layers[0]._forward_pre_hooks.clear()
    model.layers[0]._forward_hooks.clear()
    expected = float((1 - F.cosine_similarity(seen["before"], seen["after"], dim=-1)).mean())
    assert cosine_change(inputs_of(model, x)).scores["layers.0"] == pytest.approx(expected, rel=1e-9)


def test_the_divergence_is_that_of_the_answers_without_the_region() -> None:
    torch.manual_seed(1)
    model = models.lively(models.ResNet())
    x = torch.randn(8, 3, 32, 32, dtype=D)
    found = skip_divergence(inputs_of(model, x)).scores
    with torch.no_grad():
        p = model(x).log_softmax(-1)
        model.layers[1].forward = F.relu
        q = model(x).log_softmax(-1)
    region = next(n for n in found if n.startswith("layers.1"))
    assert found[region] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)


class Positive(nn.Module):
    """A block that makes everything positive, and a logarithm that needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.constant_(self.inner.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.log(self.inner(torch.tanh(x))))


def test_a_region_that_cannot_be_skipped_is_left_out_with_the_reason() -> None:
    torch.manual_seed(2)
    inputs = inputs_of(Positive().double().eval(), torch.randn(8, 4, dtype=D))
    assert "inner" in inputs.graph.skippable
    found = skip_divergence(inputs)
    assert "inner" not in found.scores and "NaN" in found.left_out["inner"]
    assert set(found.scores) | set(found.left_out) == set(inputs.graph.skippable)


@pytest.mark.parametrize("name", BLOCK_CRITERIA)
def test_without_batches_blocks_say_what_to_give(name: str) -> None:
    graph = inputs_of(*transformer()).graph
    with pytest.raises(DataError, match=r"needs batches: give Data\(train=loader\)"):
        BLOCK_CRITERIA[name](Inputs(graph))
