"""Hugging Face models: uniform cuts survive ``save_pretrained`` and ``from_pretrained``; others say what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shohin
from shohin.data import Call
from shohin.errors import PlanError
from shohin.graph import Graph
from shohin.integrations.transformers import uniform, write_config
from shohin.plan import Plan
from shohin.surgery import cut, understand

tf = pytest.importorskip("transformers")
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZES, "max_position_embeddings": 20}
DECODER = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 16, "patch_size": 8}
OPT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "word_embed_proj_dim": 16}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "use_cache": False}


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length))


def text(batch: int) -> dict[str, torch.Tensor]:
    tokens = ids(batch, 7)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def both(batch: int) -> dict[str, torch.Tensor]:
    return {**text(batch), "decoder_input_ids": ids(batch, 5)}


def image(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


MODELS: dict[str, tuple[Callable[[], Any], str, Callable[[int], dict[str, torch.Tensor]]]] = {
    "bert": (lambda: tf.BertConfig(**TEXT), "BertForSequenceClassification", text),
    "llama": (lambda: tf.LlamaConfig(**TEXT, num_key_value_heads=2, **DECODER), "LlamaForCausalLM", text),
    "qwen2": (lambda: tf.Qwen2Config(**TEXT, num_key_value_heads=2, **DECODER), "Qwen2ForCausalLM", text),
    "gpt2": (lambda: tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=20, **DECODER), "GPT2LMHeadModel", text),
    "opt": (lambda: tf.OPTConfig(**OPT, max_position_embeddings=20, **DECODER), "OPTForCausalLM", text),
    "t5": (lambda: tf.T5Config(**T5), "T5ForConditionalGeneration", both),
    "vit": (lambda: tf.ViTConfig(**IMAGE), "ViTForImageClassification", image),
}
_known: dict[str, tuple[Any, Graph]] = {}


def understood(name: str) -> tuple[Any, Graph]:
    """A random model, biases and norms included, and its graph."""
    torch.set_num_threads(1)
    if name not in _known:
        torch.manual_seed(0)
        config, kind, inputs = MODELS[name]
        model = getattr(tf, kind)(config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        _known[name] = model, understand(model, Call((), inputs(1), None, None))
    return _known[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_uniform_cut_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, graph = understood(name)
    plan = uniform(graph, model, 0.5)
    assert plan.widths
    made = cut(model, graph, plan)
    write_config(made, model, graph)
    made.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.manual_seed(1)
    inputs = MODELS[name][2](3)
    with torch.no_grad():
        one, other = again(**inputs).logits, made.model(**inputs).logits
        assert torch.equal(one, other) and not torch.allclose(one, model(**inputs).logits)
    count = sum(p.numel() for p in again.parameters())
    assert count == sum(p.numel() for p in made.model.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    assert model.config.to_dict() != again.config.to_dict()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("of", ["macs", "params"])
def test_the_share_is_kept(name: str, of: str) -> None:
    model, graph = understood(name)
    plan = uniform(graph, model, 0.8, of=of)
    if of == "macs":
        left = graph.macs(plan) / graph.macs()
    else:
        made = cut(model, graph, plan).model
        left = sum(p.numel() for p in made.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.1 < left <= 0.8


def test_the_best_units_stay() -> None:
    model, graph = understood("bert")
    group = next(g for g in graph.groups if "intermediate" in g.name)
    scores = {group.name: [float(i % 5) for i in range(group.size)]}
    kept = uniform(graph, model, 0.5, scores=scores).widths[group.name]
    worst = min(scores[group.name][i] for i in kept)
    assert all(scores[group.name][i] <= worst for i in set(range(group.size)) - set(kept))


def test_a_cut_that_no_configuration_expresses_names_the_layers() -> None:
    model, graph = understood("bert")
    group = next(g for g in graph.groups if "layer.1.intermediate" in g.name)
    made = cut(model, graph, Plan(graph.program.fingerprint, {group.name: tuple(range(5))}))
    before = made.model.config.to_dict()
    with pytest.raises(PlanError, match=r"BertConfig cannot express the cut.*layer\.[01]\.intermediate"):
        write_config(made, model, graph)
    assert made.model.config.to_dict() == before


def test_a_share_that_nothing_reaches_is_refused() -> None:
    model, graph = understood("llama")
    with pytest.raises(PlanError, match="LlamaConfig"):
        uniform(graph, model, 1e-6, of="params")
    for keep, of in ((0.0, None), (1.5, None), (0.5, "bytes")):
        with pytest.raises(PlanError):
            uniform(graph, model, keep, of=of)


def test_the_whole_model_is_a_uniform_plan() -> None:
    model, graph = understood("llama")
    assert uniform(graph, model, 1.0).is_identity


def test_uniform_pruning_is_saved_and_loaded_by_the_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        use_cache=False,
    )
    model = tf.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 60, (2, 7))
    before = model.config.to_dict()
    candidate = shohin.prune(model, shohin.Data(example=(ids,)), keep=0.6, of="params", criterion="magnitude", uniform=True, recover=None)
    assert candidate.notes["left"] <= 0.6 and model.config.to_dict() == before
    candidate.model.save_pretrained(tmp_path)
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, candidate.model(ids).logits)
