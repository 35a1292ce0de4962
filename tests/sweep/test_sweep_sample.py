"""A stratified sample of the sweep: a small and quick model of each kind."""

from __future__ import annotations

import pytest

from sweep.catalogue import catalogue
from sweep.check import check

SAMPLE = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "transformers/distilbert",
    "torchvision/squeezenet1_1",
    "transformers/resnet",
    "transformers/hubert",
    "transformers/bert",
    "transformers/electra",
    "transformers/llama",
    "transformers/gpt2",
    "transformers/opt",
    "transformers/t5",
    "transformers/bart",
    "transformers/vit",
    "transformers/convnext",
    "transformers/poolformer",
    "transformers/regnet",
    "transformers/whisper-classifier",
    "transformers/wav2vec2",
    "transformers/clip",
)


@pytest.mark.parametrize("number, name", enumerate(SAMPLE), ids=SAMPLE)
def test_cut_equals_oracle(number: int, name: str) -> None:
    record = check(catalogue()[name], plans=1, onnx=number % 4 == 0, reload=number % 4 == 2)
    assert not record["wrong"], record["wrong"]
    assert not record["error"], (record["error"], record.get("trace"))
    assert record["groups"] and record["ratio"] <= 0.70
    assert record.get("onnx", "ok") == "ok"
