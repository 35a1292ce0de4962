"""Quantization-aware training, taught by the float model: one training, and the grids that came of it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from shohin.data import Data, first_output
from shohin.distillation import LABELS, distill
from shohin.errors import DataError, ModelError
from shohin.program import Program
from shohin.quantization import QAT, AwareModule, Quantized
from shohin.quantization.static import LeastScale
from shohin.training import TrainConfig, TrainResult
from shohin.training.steps import length_of

LR = 1e-3
"""Peak learning rate of quantization-aware training from trained weights: AdamW, cosine, a tenth of the steps to warm up."""


def train_aware(
    program: Program,
    quantized: Quantized,
    teacher: nn.Module,
    data: Data,
    qat: QAT,
    config: TrainConfig,
    *,
    loss: str,
    least_scale: LeastScale | None = None,
    checkpoint: Path | None = None,
) -> tuple[Quantized, TrainResult]:
    """Trains a program on its grids to answer as its float form does, and labels as far as there are any.

    Args:
        program: with the values to begin with, batch normalization not folded; left as it is.
        quantized: the same program on its first grids.
        teacher: the float model, in eval mode.
        qat, config: how grids learn, and how the training goes.
        loss: between answers, by name.
        least_scale: see `shohin.quantization.quantize_program`.
        checkpoint: see `shohin.training.train`.

    Raises:
        ModelError: if no parameter requires gradients. DataError: if answers have none. And as `shohin.distillation.distill` does.
    """
    if not any(program.tensors[name].requires_grad for name in program.trainable):
        raise ModelError("nothing to train: no parameter of the model requires gradients; call model.requires_grad_() first")
    first = next(data.calls("train"))
    answers = first_output(teacher(*first.args, **first.kwargs))
    if not answers.is_floating_point():
        raise DataError(f"the model answers in {answers.dtype}, which no gradient leads through: train the model that gives the scores")
    batches = length_of(data.train if data.train is not None else data.validation, 1)
    module = AwareModule(program, quantized, qat, None if batches is None else batches * config.epochs, least_scale)
    result = distill(
        module,
        teacher,
        data,
        config=config,
        loss=loss,
        alpha=LABELS if data.has_labels else 0.0,
        checkpoint=checkpoint,
        method={"learn": qat.learn, "settle": list(qat.settle), "safe scales": least_scale is not None},
    )
    return module.quantized(), result


def settings(epochs: int, seed: int) -> TrainConfig:
    """The config of a quantization-aware training that the user does not describe."""
    return TrainConfig(epochs=epochs, lr=LR, weight_decay=1e-4, warmup=0.1, clip=5.0, seed=seed)
