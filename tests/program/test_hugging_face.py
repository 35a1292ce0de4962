"""Tiny random models of the transformers library: keyword arguments in, nested model outputs out, a batch of any size."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shohin.errors import ModelError
from shohin.program import ProgramModule, capture
from sweep.torchvision_schemas import torchvision_models

if find_spec("torchvision"):
    torchvision_models()  # transformers imports torchvision, which may need help
tf = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(batch: int, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (batch, length))


def text(batch: int) -> dict[str, Any]:
    ids = tokens(batch)
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT))


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **ENDS, num_key_value_heads=2))


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**IMAGE))


def whisper() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    more = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    return tf.WhisperModel(tf.WhisperConfig(vocab_size=64, decoder_start_token_id=1, **sizes, **more, **ENDS))


def clip() -> nn.Module:
    parts = {"text_config": {**TEXT, **ENDS, "projection_dim": 16}, "vision_config": {**IMAGE, "projection_dim": 16}}
    return tf.CLIPModel(tf.CLIPConfig(**parts, projection_dim=16))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]] = {
    "bert": (bert, text),
    "llama": (llama, lambda b: {**text(b), "use_cache": False, "output_hidden_states": True}),
    "t5": (t5, lambda b: {**text(b), "decoder_input_ids": tokens(b, 4), "use_cache": False}),
    "vit": (vit, lambda b: {"pixel_values": torch.randn(b, 3, 16, 16)}),
    "whisper": (whisper, lambda b: {"input_features": torch.randn(b, 8, 20), "decoder_input_ids": tokens(b, 4), "use_cache": False}),
    "clip": (clip, lambda b: {**text(b), "pixel_values": torch.randn(b, 3, 16, 16)}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tiny_model_is_captured_with_its_own_outputs(name: str) -> None:
    torch.manual_seed(0)
    build, inputs = CASES[name]
    model = build().eval()
    program = capture(model, inputs(1))
    assert not program.remarks
    assert set(dict(model.named_parameters(remove_duplicate=False))) <= set(program.tensors)
    module = ProgramModule(program)
    for batch in (1, 3):
        given = inputs(batch)
        with torch.no_grad():
            got, wanted = module(**given), model(**given)
        assert type(got) is type(wanted) and list(got.keys()) == list(wanted.keys())
        flat, spec = pytree.tree_flatten(got)
        other, its = pytree.tree_flatten(wanted)
        assert spec == its
        for a, b in zip(flat, other, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_a_cache_in_the_output_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"DynamicCache.*use_cache=False"):
        capture(llama(), text(1))
