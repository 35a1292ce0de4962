"""A network as the ONNX file that its peers start from, by torch's own exporter; MiniLM as a program with a free batch and length."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distilling.minilm import padded, tokenized


def captured(model: nn.Module) -> torch.export.ExportedProgram:
    """The program, batch and length free."""
    example = padded(tokenized(["a small dog runs", "the"] * 2))
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    return torch.export.export(model, (), example, dynamic_shapes=free)


def _saved(program: torch.export.ExportedProgram, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(program, (), dynamo=True, opset_version=20, verbose=False)
    made.save(str(path))
    return path


def exported(model: nn.Module, path: Path) -> Path:
    """The float file of MiniLM."""
    return _saved(captured(model), path)


def onnx_file(model: nn.Module, batch: Mapping[str, torch.Tensor], path: Path) -> Path:
    """The float file of a network, the batch free; ``batch`` holds its arguments by name."""
    free = {name: {0: torch.export.Dim.DYNAMIC} for name in batch}
    return _saved(torch.export.export(model, (), dict(batch), dynamic_shapes=free), path)


class Vectors(nn.Module):
    """A runtime's answers as a module, so that one judge asks all."""

    def __init__(self, run: Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[N, 384]``."""
        return torch.from_numpy(np.array(self._run({"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()})))


def session(path: Path) -> Callable[..., torch.Tensor]:
    """The file in ONNX Runtime, with one thread: its arguments by name to its first output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    held = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda **inputs: torch.from_numpy(held.run(None, {name: t.numpy() for name, t in inputs.items()})[0])


def in_onnxruntime(path: Path) -> nn.Module:
    """The file of an encoder in ONNX Runtime."""
    run = session(path)
    return Vectors(lambda inputs: run(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy())


def few_bits(source: Path, path: Path, way: str, layers: int, group: int) -> tuple[float, int]:
    """ONNX Runtime's own quantizer of matrix products ("nearest, int4", "nearest, uint4" or "hqq, uint4"): processor seconds, and bytes of the weights.

    Raises:
        SystemExit: if it quantizes another number of layers.
    """
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as own

    own.logger.setLevel("WARNING")
    began = time.process_time()
    options = {"block_size": group, "is_symmetric": way == "nearest, int4"}
    settings = (
        own.HQQWeightOnlyQuantConfig(block_size=group, bits=4) if way == "hqq, uint4" else own.DefaultWeightOnlyQuantConfig(**options)
    )
    quantizer = own.MatMulNBitsQuantizer(onnx.load(str(source)), **options, algo_config=settings)
    quantizer.process()
    seconds = time.process_time() - began
    done = quantizer.model.model
    nodes = [node for node in done.graph.node if node.op_type == "MatMulNBits"]
    if len(nodes) != layers:
        raise SystemExit(f"ONNX Runtime quantized {len(nodes)} layers, not {layers}")
    onnx.save(done, str(path))
    held = {i.name: len(i.raw_data) for i in done.graph.initializer}  # its HQQ has float zero points
    return seconds, sum(held[name] for node in nodes for name in node.input[1:])
