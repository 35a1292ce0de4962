"""Rotations in Hugging Face models, whose normalizations are written out and whose heads are often tied to their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shohin
from shohin.program import ProgramModule, capture
from shohin.quantization import quantizable, rotated

tf = pytest.importorskip("transformers")
TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 20}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
GATED = {**TEXT, **ENDS, "intermediate_size": 24, "num_key_value_heads": 1}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 8}


class Logits(torch.nn.Module):
    """What a language model gives without its cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # type: ignore[no-any-return]


def text() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def lively(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if "norm" in name else 0.1 * torch.randn_like(parameter))
    return model.eval()


def decoders() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tied in (False, True):
        for kind in ("Llama", "Qwen2", "Mistral"):
            config = getattr(tf, f"{kind}Config")(**GATED, tie_word_embeddings=tied)
            found[f"{kind}, {'tied' if tied else 'apart'}"] = (f"{kind}ForCausalLM", config)
    eager = tf.LlamaConfig(**GATED, attn_implementation="eager")
    found["Llama, eager"] = ("LlamaForCausalLM", eager)
    found["OPT"] = ("OPTForCausalLM", tf.OPTConfig(**TEXT, **ENDS, ffn_dim=24, word_embed_proj_dim=16))
    return found


@pytest.mark.parametrize("name", ["Llama, apart", "Llama, tied", "Qwen2, apart", "Qwen2, tied", "Mistral, tied", "Llama, eager", "OPT"])
def test_decoders_compute_the_same(name: str) -> None:
    torch.set_num_threads(1)
    kind, config = decoders()[name]
    program = capture(Logits(lively(getattr(tf, kind)(config))), text())
    found = rotated(program, quantizable(program))
    turned, layers = found.program, found.layers
    assert len(layers) >= 14
    with torch.no_grad():
        wanted, now = (ProgramModule(p)(**text()) for p in (program, turned))
    torch.testing.assert_close(now, wanted, atol=2e-5, rtol=1e-4)


def test_vision_transformers_compute_the_same() -> None:
    torch.set_num_threads(1)
    x = torch.randn(4, 3, 16, 16)
    program = capture(lively(tf.ViTForImageClassification(tf.ViTConfig(**IMAGE))), {"pixel_values": x})
    found = rotated(program, quantizable(program))
    turned, layers = found.program, found.layers
    assert len(layers) >= 13
    with torch.no_grad():
        wanted, now = (ProgramModule(p)(pixel_values=x).logits for p in (program, turned))
    torch.testing.assert_close(now, wanted, atol=2e-5, rtol=1e-4)


def test_a_tied_model_comes_back_with_two_tensors(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    kind, config = decoders()["Llama, tied"]
    model = Logits(lively(getattr(tf, kind)(config)))
    found: Any = shohin.quantize(model, shohin.Data(train=[text()]), {"*": "w7a8", "*lm_head*": "float32"})
    assert found.notes["rotated"]
    inner = found.model.model
    assert inner.lm_head.weight is not inner.model.embed_tokens.weight and inner.config.tie_word_embeddings is False
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight and model.model.config.tie_word_embeddings is True  # type: ignore[union-attr, operator]
    inner.save_pretrained(tmp_path)
    back = Logits(tf.LlamaForCausalLM.from_pretrained(tmp_path).eval())
    with torch.no_grad():
        torch.testing.assert_close(back(**text()), found.model(**text()))
