"""4-bit weights by Neural Compressor and torchao, in PyTorch, in an environment of its own: ``python torch_weights.py FOLDER WAY BATCHES TEXTS OUT``.

FOLDER: with the encoder's ``config.json`` and ``model.safetensors``; or "decoder", the small language model. BATCHES: an npz of calibration
batches ("0:input_ids", ...). TEXTS: an npz of batches to answer. OUT: an npz of the answers, computed with the weights that each tool
decodes. It imports nothing of Shohin.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from archives import batches
from neural_compressor.torch.quantization import GPTQConfig, HQQConfig, RTNConfig, convert, prepare
from safetensors.torch import load_file
from torch.nn import functional as F
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import BertConfig, BertModel

GROUP = 32
ASYMMETRIC = {"bits": 4, "group_size": GROUP, "use_sym": False, "dtype": "int"}
#: as their documentation offers them
COMPRESSOR = {
    "neural compressor: nearest": RTNConfig(**ASYMMETRIC),
    "neural compressor: hqq": HQQConfig(bits=4, group_size=GROUP),
    "neural compressor: gptq": GPTQConfig(**ASYMMETRIC, act_order=True),
}
FOUR = {"weight_dtype": torch.int4, "granularity": PerGroup(GROUP)}
TORCHAO = {
    "torchao: nearest": IntxWeightOnlyConfig(**FOUR, mapping_type=MappingType.ASYMMETRIC),
    "torchao: hqq": IntxWeightOnlyConfig(**FOUR, intx_choose_qparams_algorithm="hqq_scale_only"),
}


def tensors(path: str) -> list[dict[str, torch.Tensor]]:
    """The batches of an npz, in order."""
    return [{name: torch.from_numpy(value) for name, value in batch.items()} for batch in batches(path)]


def embedded(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Mean of the last layer over the words, of length 1."""
    hidden = model(**batch).last_hidden_state.float()  # of HQQ they are half
    mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).float().numpy()


def encoder(folder: str):
    """MiniLM, and how it answers."""
    model = BertModel(BertConfig.from_json_file(str(Path(folder) / "config.json")), add_pooling_layer=False).eval()
    model.load_state_dict(load_file(str(Path(folder) / "model.safetensors")), strict=False)
    model.name_or_path = model.config._name_or_path = folder  # or Neural Compressor asks the hub for it
    return model, embedded


def decoder():
    """The language model that is trained here, and how it answers."""
    sys.path.append(str(Path(__file__).parents[1]))
    from quantizing.decoders import FOLDER, small

    def answer(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> np.ndarray:
        for module in model.modules():  # HQQ's give half precision, which the products of attention do not mix
            if not list(module.children()) and not module._forward_hooks:
                module.register_forward_hook(lambda _, inputs, output: output.float())
        return model(**batch).numpy()

    model = small()
    model.name_or_path = str(FOLDER)  # any folder that exists
    return model, answer


def main() -> None:
    """The command."""
    folder, way, learned, asked, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, answer = decoder() if folder == "decoder" else encoder(folder)
    began = time.process_time()
    if way in TORCHAO:
        quantize_(model, TORCHAO[way])
    else:
        model = prepare(model, COMPRESSOR[way])
        for batch in tensors(learned) if way.endswith("gptq") else ():
            with contextlib.suppress(ValueError):  # with which it stops a forward pass once it has what it wants
                model(**batch)
        model = convert(model)
    seconds = time.process_time() - began
    np.savez(out, **{f"v{i}": answer(model, batch) for i, batch in enumerate(tensors(asked))})
    print(json.dumps({"seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
