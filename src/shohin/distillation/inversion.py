"""DeepInversion of one batch (Yin et al., "Dreaming to Distill", 2020, 1912.08795): noise becomes what normalizations remember."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import first_output
from shohin.errors import ModelError


@dataclass
class Watch:
    """What a forward showed: the distance of each batch normalization's input from its statistics, and embeddings called with the input."""

    distances: list[Tensor] = field(default_factory=list)
    tables: list[nn.Module] = field(default_factory=list)


@dataclass(frozen=True)
class Inversion:
    """How noise is optimized; see `shohin.distillation.generate` for the numbers.

    Args:
        model: in evaluation mode.
        middle, spread: of inputs, to be broadcast over a batch: an input is ``middle + spread * z``.
        dtype: of inputs.
        steps, lr, bounds: of the optimization.
        statistics_weight, class_weight, variation_weight, norm_weight: of its terms; the last two are 0 where inputs are no images.
        shift, flip: random moves of images in every step.
    """

    model: nn.Module
    middle: Tensor
    spread: Tensor
    dtype: torch.dtype
    steps: int
    lr: float
    bounds: tuple[float, float] | None
    statistics_weight: float
    class_weight: float
    variation_weight: float
    norm_weight: float
    shift: int
    flip: bool

    def batch(self, noise: Tensor, wanted: Tensor | None, moves: torch.Generator, index: int) -> Tensor:
        """Inputs from noise ``[N, ...]`` of unit variance, of the classes ``wanted`` ``[N]`` if there are any; ``index`` is for messages.

        Raises:
            ModelError: if the model gives its input no gradient, or the optimization meets NaN or Inf.
        """
        z = noise.requires_grad_()
        optimizer = torch.optim.Adam([z], lr=self.lr, betas=(0.5, 0.9))
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            loss = self._loss(z, wanted, moves)
            if not bool(torch.isfinite(loss)):
                raise ModelError(
                    f"generation met {loss.item()} in batch {index}, step {step}; give a smaller lr, or mean= and scale= of inputs"
                )
            z.grad = _gradient(loss, z)
            optimizer.step()
            if self.bounds is not None:
                with torch.no_grad():
                    z.copy_(((self.middle + self.spread * z).clamp(*self.bounds) - self.middle) / self.spread)
        x = (self.middle + self.spread * z).detach()
        return (x if self.bounds is None else x.clamp(*self.bounds)).to(self.dtype)

    def _loss(self, z: Tensor, wanted: Tensor | None, moves: torch.Generator) -> Tensor:
        found, scores = look(self.model, self._moved(self.middle + self.spread * z, moves).to(self.dtype).clone())
        total = self.statistics_weight * torch.stack(found.distances).mean()
        if wanted is not None:
            total = total + self.class_weight * F.cross_entropy(_unnormalized(scores.to(z.dtype)), wanted)
        if self.variation_weight or self.norm_weight:
            total = total + self.variation_weight * _variation(z) + self.norm_weight * z.square().mean()
        return total

    def _moved(self, x: Tensor, moves: torch.Generator) -> Tensor:
        if not (self.shift or self.flip):
            return x
        limits = ((-self.shift, self.shift + 1), (-self.shift, self.shift + 1), (0, 2))
        down, right, mirrored = (int(torch.randint(low, high, (), generator=moves)) for low, high in limits)
        x = x.roll((down, right), (2, 3))
        return x.flip(3) if self.flip and mirrored else x


def _is_norm(module: nn.Module) -> bool:
    """Batch normalization with running statistics, also one of another library (frozen, fused with an activation)."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def look(model: nn.Module, x: Tensor) -> tuple[Watch, Tensor]:
    """A forward, what was seen in it, and its first output."""
    watch = Watch()

    def norm(module: Any, args: tuple[Any, ...]) -> None:
        seen = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        dims = [d for d in range(seen.dim()) if d != 1]
        var, centre = torch.var_mean(seen, dims, correction=0)
        eps = getattr(module, "eps", 1e-5)
        running = module.running_var + eps
        off = (centre - module.running_mean).square() / running + (((var + eps) / running).sqrt() - 1).square()
        watch.distances.append(off.mean())

    def table(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() == x.numel() and torch.equal(args[0].reshape(-1), x.reshape(-1)):
            watch.tables.append(module)

    handles = [m.register_forward_pre_hook(norm) for m in model.modules() if _is_norm(m)]
    if not x.is_floating_point():
        handles += [m.register_forward_pre_hook(table) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    try:
        return watch, first_output(model(x))
    finally:
        for handle in handles:
            handle.remove()


def _gradient(loss: Tensor, z: Tensor) -> Tensor:
    """Of the input alone: parameters keep no gradients."""
    try:
        return torch.autograd.grad(loss, z)[0]
    except RuntimeError as error:
        raise ModelError(f"the model gives its input no gradient ({error}): generate with the floating-point model") from error


def _unnormalized(scores: Tensor) -> Tensor:
    """Logits for the cross-entropy: of probabilities their logarithm, anything else as it is."""
    with torch.no_grad():
        sums = scores.sum(1)
        probabilities = bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
    return scores.clamp(min=1e-8).log() if probabilities else scores


def _variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbours along height, width and both diagonals of ``[N, C, H, W]``."""
    pairs = (
        (x[..., 1:, :], x[..., :-1, :]),
        (x[..., 1:], x[..., :-1]),
        (x[..., 1:, 1:], x[..., :-1, :-1]),
        (x[..., 1:, :-1], x[..., :-1, 1:]),
    )
    return torch.stack([(a - b).square().mean() for a, b in pairs]).mean()
