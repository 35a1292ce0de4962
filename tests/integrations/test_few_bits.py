"""Weights of few bits in a model of transformers, whose answers have names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shohin
from shohin.targets import get_target

pytest.importorskip("transformers")


def test_named_answers_are_exported_in_every_format(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertModel(BertConfig(vocab_size=60, max_position_embeddings=16, **sizes)).eval()
    ids = torch.randint(0, 60, (4, 8), generator=torch.Generator().manual_seed(0))
    data = shohin.Data(train=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    found = shohin.quantize(model, data, "weights uint4 group 32")
    assert found.notes["float"] == {}
    tables = {a for a, form in found.plan.formats.items() if form == "weights int8 channel"}
    assert tables == {f"embeddings.{kind}_embeddings/embedding.0" for kind in ("word", "position", "token_type")}
    for candidate in (model, found):
        made = shohin.export(candidate, data, path=tmp_path / "m.onnx")
        answers = get_target("onnxruntime").runner(made.artifact)(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert answers.last_hidden_state.shape == (4, 8, 32)
