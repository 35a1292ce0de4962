"""Inputs for a student when there is no data: what a network's own statistics remember of it.

DeepInversion (Yin et al., "Dreaming to Distill", 2020, 1912.08795): noise is optimized until the inputs of every batch
normalization have the mean and the variance that it saw in training, and until each sample is clearly of a class drawn for it.
Networks without batch normalization remember no statistics: they get noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shohin.distillation.inversion import Inversion, Watch, look
from shohin.errors import DataError, ModelError
from shohin.training.randomness import mix
from shohin.training.state import training_modes

WARNING = (
    "inputs are generated, not real: a student trained on them usually is less accurate than one trained on data, even unlabelled; "
    "measure it on real data before it is used"
)


def generate(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    count: int,
    *,
    steps: int = 300,
    seed: int = 0,
    lr: float = 0.1,
    mean: float | Sequence[float] | Tensor = 0.0,
    scale: float | Sequence[float] | Tensor = 1.0,
    bounds: tuple[float, float] | None = None,
    classes: bool | None = None,
    statistics_weight: float = 10.0,
    class_weight: float = 1.0,
    variation_weight: float = 0.02,
    norm_weight: float = 1e-3,
    shift: int | None = None,
    flip: bool = True,
    vocabulary: int | None = None,
) -> list[Tensor]:
    """Batches that stand in for training data, from the model alone.

    A network with batch normalization (running statistics present) gets DeepInversion; distances are in units of the running deviation,
    so that layers weigh alike (the paper sums norms as they are). Other networks get noise: Gaussian, for images also coloured (1/f), all
    mixed up in pairs. Integer inputs are token ids, drawn uniformly below the size of the embedding that reads them.

    Args:
        model: one input, one answer whose first tensor are the logits. Left as it is: weights, buffers, modes, gradients.
        example: ``[N, ...]``, or a tuple with that one tensor; shape, type and device of each batch. Numbers do not matter, ids must be
            valid. N of 32 or more lets a batch have statistics.
        count: batches.
        steps: of Adam for each batch, its rate falling from ``lr`` (in units of ``scale``) as a cosine. The paper takes 2000 or more.
        seed: batch i is a function of (seed, i).
        mean, scale: of the inputs, one number or one for each channel (dimension 1): where noise starts, and what noise is.
        bounds: least and largest value of an input.
        classes: whether the answer is ``[N, C]`` scores of exclusive classes; None takes every such shape with C > 1 for it. Each class is
            asked for equally often over the batches, in random order.
        statistics_weight, class_weight, variation_weight, norm_weight: of the statistics, the cross-entropy, and for images ``[N, C, H, W]``
            of total variation and of the L2 norm.
        shift: largest random shift of images in a step, in pixels, around the edge; default a 16th of the smaller side.
        flip: images are flipped left to right in half the steps; False where left and right matter (digits, text).
        vocabulary: number of ids; default that of the embedding.

    Returns:
        ``count`` detached tensors shaped as ``example``, for `Data` or a plain loop.

    Warns:
        UserWarning: always: accuracy with generated inputs is usually lower, and has to be measured on real data.

    Raises:
        DataError: if ``example`` is no single tensor with a batch dimension, or a number is out of range.
        ModelError: if the model does not run on ``example``, gives it no gradient, or the optimization meets NaN or Inf.
    """
    example = _one_tensor(example)
    if count < 1 or steps < 1 or not lr > 0:
        raise DataError(f"count and steps must be 1 or more and lr > 0; got {count}, {steps} and {lr}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise DataError(f"bounds must be (least, largest); got {bounds}")
    warnings.warn(WARNING, UserWarning, stacklevel=2)
    with _undisturbed(model, seed):
        watch, answer = _probe(model, example)
        if not example.is_floating_point():
            return [_ids(example, watch, vocabulary, _generator(seed, i)) for i in range(count)]
        noise = [_noise(example.shape, _generator(seed, i)) for i in range(count)]
        middle, spread = (_by_channel(v, example, name) for v, name in ((mean, "mean"), (scale, "scale")))
        if not bool((spread > 0).all()):
            raise DataError(f"scale must be > 0; got {scale}")
        if not watch.distances:
            batches = [middle + spread * z.to(example.device) for z in noise]
            return [(x if bounds is None else x.clamp(*bounds)).to(example.dtype) for x in batches]
        if classes is None:
            classes = answer.dim() == 2 and answer.shape[1] > 1 and answer.is_floating_point()
        elif classes and (answer.dim() != 2 or answer.shape[1] < 2):
            raise DataError(f"classes=True needs scores [N, C]; the model's first output has shape {tuple(answer.shape)}")
        image = example.dim() == 4 and min(example.shape[2:]) >= 4
        shift = 0 if not image else max(1, min(example.shape[2:]) // 16) if shift is None else shift
        wanted = _targets(count, len(example), answer.shape[1], seed).to(example.device) if classes else None

        inversion = Inversion(
            model,
            middle,
            spread,
            example.dtype,
            steps,
            lr,
            bounds,
            statistics_weight,
            class_weight,
            variation_weight if image else 0.0,
            norm_weight if image else 0.0,
            shift,
            flip and image,
        )
        return [
            inversion.batch(z.to(example.device), None if wanted is None else wanted[i], _generator(seed, i, "moves"), i)
            for i, z in enumerate(noise)
        ]


def statistics_distance(model: nn.Module, batch: Tensor) -> float:
    """How far a batch ``[N, ...]`` is from what the batch normalizations of a model saw in training; 0 is the same.

    Mean over the layers of the mean over channels of ``((m - M) / S)^2 + (s / S - 1)^2``, with m, s mean and deviation of the layer's input
    over the batch and M, S the running ones. Batches of the training data are not at 0: they are samples.

    Raises:
        ModelError: if the model does not run on the batch, or no batch normalization with running statistics takes part.
    """
    with _undisturbed(model, 0), torch.no_grad():
        watch, _ = _probe(model, _one_tensor(batch))
        if not watch.distances:
            raise ModelError("statistics_distance: no batch normalization with running statistics ran; there is nothing to compare with")
        return float(torch.stack(watch.distances).mean())


def _one_tensor(example: Any) -> Tensor:
    if isinstance(example, (tuple, list)):
        if len(example) != 1:
            raise DataError(
                f"inputs can be generated for models with one input; the example has {len(example)}: wrap the model, or give data"
            )
        example = example[0]
    if not isinstance(example, Tensor):
        raise DataError(f"the example must be one tensor [N, ...]; got {type(example).__name__}")
    if example.dim() < 1 or not example.numel() or example.is_complex():
        raise DataError(f"the example must be a batch [N, ...] of numbers; got shape {tuple(example.shape)} of {example.dtype}")
    return example.detach()


@contextmanager
def _undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode with gradients; modes and random state are given back."""
    with training_modes(model), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        torch.default_generator.manual_seed(seed)
        yield


def _probe(model: nn.Module, example: Tensor) -> tuple[Watch, Tensor]:
    try:
        with torch.no_grad():
            return look(model, example.clone())
    except Exception as error:
        raise ModelError(
            f"the model does not run on the example of shape {tuple(example.shape)} alone: {type(error).__name__}: {error}; "
            "inputs can be generated for models with one input"
        ) from error


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(mix("generate", *parts))


def _by_channel(value: float | Sequence[float] | Tensor, example: Tensor, name: str) -> Tensor:
    """A number, or one for each entry of dimension 1, to be broadcast over the batch."""
    found = torch.as_tensor(value, dtype=torch.float32, device=example.device)
    if found.dim() == 0:
        return found
    if found.dim() != 1 or example.dim() < 2 or found.numel() not in (1, example.shape[1]):
        channels = example.shape[1] if example.dim() > 1 else 1
        raise DataError(f"{name} must be one number or one for each of {channels} channels; got shape {tuple(found.shape)}")
    return found.reshape(1, -1, *[1] * (example.dim() - 2))


def _targets(count: int, samples: int, classes: int, seed: int) -> Tensor:
    """``[count, samples]`` classes, each equally often (up to one), in random order."""
    g = _generator(seed, "classes")
    rounds = -(-count * samples // classes)
    return torch.cat([torch.randperm(classes, generator=g) for _ in range(rounds)])[: count * samples].reshape(count, samples)


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Gaussian noise; for images half of it coloured; mixed in pairs (Zhang et al., 2018, 1710.09412), of unit variance."""
    z = torch.randn(shape, generator=generator)
    if len(shape) == 4 and min(shape[2:]) >= 4:
        coloured = torch.rand(shape[0], generator=generator) < 0.5
        z = torch.where(coloured.reshape(-1, 1, 1, 1), _colour(z, torch.rand(shape[0], generator=generator) + 0.5), z)
    share = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    other = z[torch.randperm(shape[0], generator=generator)]
    own = torch.arange(shape[0]).reshape(share.shape)  # a sample that was drawn as its own partner stays as it is
    partner_is_self = (other == z).reshape(shape[0], -1).all(1).reshape(own.shape)
    mixed = (share * z + (1 - share) * other) / (share.square() + (1 - share).square()).sqrt()
    return torch.where(partner_is_self, z, mixed)


def _colour(z: Tensor, power: Tensor) -> Tensor:
    """Noise ``[N, C, H, W]`` whose amplitude falls with frequency as ``f^-power`` (``[N]``), of unit variance over a sample's channel."""
    height, width = z.shape[2:]
    f = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width)[None].square()).sqrt()
    f[0, 0] = 1 / max(height, width)
    x: Tensor = torch.fft.irfft2(torch.fft.rfft2(z) * f.pow(-power[:, None, None, None]), s=(height, width))
    return x / x.std((1, 2, 3), keepdim=True).clamp(min=1e-6)


def _ids(example: Tensor, watch: Watch, vocabulary: int | None, generator: torch.Generator) -> Tensor:
    table: Any = watch.tables[0] if watch.tables else None
    if vocabulary is None and table is None:
        raise DataError(f"the example holds {example.dtype} and no embedding reads it: give vocabulary=, the number of values an input has")
    if vocabulary is not None and vocabulary < 1:
        raise DataError(f"vocabulary must be 1 or more; got {vocabulary}")
    size = int(table.num_embeddings) if vocabulary is None else vocabulary
    padding = table.padding_idx if table is not None and size > 1 else None
    allowed = torch.tensor([i for i in range(size) if i != padding])
    drawn = torch.randint(0, len(allowed), tuple(example.shape), generator=generator)
    return allowed[drawn].to(example.device, example.dtype)
