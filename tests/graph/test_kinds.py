"""What units are, read from labels and operations: the same answers for every way in which a network can be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import small_models as models
from shohin.graph.kinds import kind, uses
from shohin.surgery import understand

D = torch.float64


def kinds(model: nn.Module, example: Any) -> dict[str, str]:
    graph = understand(model, example)
    return {g.name: kind(graph, g) for g in graph.groups}


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...], Mapping[str, str]]] = [
    (
        lambda: models.ViT("sdpa"),
        (2, 3, 8, 8),
        {
            "patch.weight": "width",
            "layers.0.attn.q.weight": "head",
            "layers.0.attn.q.weight#2": "head dim",
            "layers.0.attn.v.weight": "head dim",
            "layers.0.fc1.weight": "neuron",
        },
    ),
    (
        lambda: models.ViT("fused"),
        (2, 3, 8, 8),
        {
            "patch.weight": "width",
            "layers.0.attn.qkv.weight": "head",
            "layers.0.attn.qkv.weight#2": "head dim",
            "layers.0.fc1.weight": "neuron",
        },
    ),
    (models.GroupedQuery, (2, 5, 6), {"q.weight": "head", "q.weight#2": "head", "q.weight#3": "head dim", "v.weight": "head dim"}),
    (models.ConvNeXt, (2, 3, 8, 8), {"stem.weight": "width", "pw1.weight": "neuron"}),
    (models.Grouped, (2, 3, 8, 8), {"a.weight": "channel", "a.weight#2": "channel", "g.weight": "channel"}),
    (models.Recurrent, (2, 2, 8), {"a.weight": "channel", "lstm.weight_ih_l0": "neuron", "b.weight": "channel"}),
    (models.Gated, (2, 6), {"a.weight": "neuron", "b.weight": "neuron", "gate.weight": "neuron"}),
    (models.Matrix, (2, 4), {"w1": "neuron", "w2": "neuron"}),
    (models.NormGroups, (2, 3, 4, 4), {"a.weight": "channel", "a.weight#2": "channel"}),
    (models.Flatten, (2, 3, 8, 8), {"conv.weight": "channel", "fc1.weight": "neuron"}),
]


@pytest.mark.parametrize(("build", "shape", "expected"), CASES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_units_are_what_operations_make_of_them(
    build: Callable[[], nn.Module], shape: tuple[int, ...], expected: Mapping[str, str]
) -> None:
    torch.manual_seed(0)
    assert kinds(models.lively(build()), (torch.randn(*shape, dtype=D),)) == dict(expected)


def test_all_groups_of_convolutional_networks_are_channels() -> None:
    for build, size in ((models.ResNet, 32), (models.MobileNet, 16), (models.DenseNet, 8), (models.UNet, 8)):
        found = kinds(models.lively(build()), (torch.randn(2, 3, size, size, dtype=D),))
        assert set(found.values()) == {"channel"}, (build, found)


class HandMade(nn.Module):
    """A normalization written out, and parameters whose names say the wrong thing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.heads, self.attention = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.gain, self.out = nn.Parameter(torch.rand(8)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return self.out(x + self.attention(torch.relu(self.heads(y))))


def test_names_do_not_matter_and_normalizations_may_be_written_out() -> None:
    assert kinds(HandMade(), (torch.randn(2, 4, 5),)) == {"conv.weight": "width", "heads.weight": "neuron"}


class Embedded(nn.Module):
    """A normalized sum of embeddings that no residual branch returns to: features like any others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n, self.out = nn.Embedding(9, 6), nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.n(self.a(tokens) + self.b(tokens)))


def test_a_normalized_sum_without_a_residual_branch_is_no_stream() -> None:
    assert set(kinds(Embedded(), (torch.randint(0, 9, (2, 4)),)).values()) == {"neuron"}


def test_owners_name_the_unit_at_each_index() -> None:
    graph = understand(models.lively(models.ViT("separate")), (torch.randn(2, 3, 8, 8, dtype=D),))
    found = {(u.role, u.tensor): u.owner for u in uses(graph)["layers.0.attn.v.weight"]}
    assert np.array_equal(found["makes", "p_layers_0_attn_v_weight"], np.tile(np.arange(4), 3))
    heads = [u for u in uses(graph)["layers.0.attn.q.weight"] if u.role == "reads"]
    assert [u.owner.tolist() for u in heads] == [np.repeat(np.arange(3), 4).tolist()]


def test_depthwise_layers_carry_units_and_read_none() -> None:
    graph = understand(models.lively(models.MobileNet()), (torch.randn(2, 3, 16, 16, dtype=D),))
    found = [(u.role, u.node) for u in uses(graph)["blocks.0.pw.weight"] if u.family == "conv2d"]
    assert [role for role, _ in found] == ["makes", "carries", "reads", "makes", "reads"]


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_units_of_a_language_model_of_the_transformers_library() -> None:
    if find_spec("torchvision"):
        from sweep.torchvision_schemas import torchvision_models

        torchvision_models()  # transformers imports torchvision, which may need help
    import transformers as tf

    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 12}
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=16, use_cache=False)).eval()
    layer = "model.layers.0"
    assert kinds(llama, (torch.randint(0, 20, (2, 5)),)) == {
        "model.embed_tokens.weight": "width",
        f"{layer}.self_attn.q_proj.weight": "head",
        f"{layer}.self_attn.q_proj.weight#2": "head",
        f"{layer}.self_attn.q_proj.weight#3": "head dim",
        f"{layer}.self_attn.v_proj.weight": "head dim",
        f"{layer}.mlp.gate_proj.weight": "neuron",
    }
