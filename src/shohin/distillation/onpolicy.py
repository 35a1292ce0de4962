"""Distillation of language models on what the student itself writes (GKD, Agarwal et al., ICLR 2024, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shohin.data import Call, first_output
from shohin.distillation import losses
from shohin.distillation.losses.shapes import same
from shohin.distillation.named import counting
from shohin.distillation.teacher import Teacher
from shohin.errors import DataError
from shohin.training import Objective
from shohin.training.state import training_modes


@dataclass(frozen=True, eq=False)
class Continuation:
    """Prompts and what a model wrote after them; rows begin with their prompt and end with padding.

    Args:
        tokens: ``[N, L]``.
        mask: ``[N, L]``, true for prompt and answer, false for padding.
        written: ``[N, L]``, true for the words that the model wrote, the end token with them.
    """

    tokens: Tensor
    mask: Tensor
    written: Tensor

    @property
    def counts(self) -> Tensor:
        """``[N, L]``, true where a position's logits predict a word that the model wrote."""
        return torch.cat([self.written[:, 1:], torch.zeros_like(self.written[:, :1])], 1)


def continuations(
    model: nn.Module,
    prompts: Tensor,
    generator: torch.Generator,
    *,
    mask: Tensor | None = None,
    max_new: int = 32,
    temperature: float = 1.0,
    end: int | None = None,
    pad: int = 0,
) -> Continuation:
    """Words drawn from a causal model after prompts, in evaluation mode, without gradients.

    The model is called as ``model(tokens)`` and gives logits ``[N, L, V]`` (a tensor, or as ``.logits``). Prompts may be padded on either
    side; each row is moved to the left first and written where its prompt ends, so that a causal model sees no padding and needs neither
    mask nor positions. There is no cache of keys and values: every new word costs a forward pass over the rows that have not ended.

    Args:
        prompts: ``[N, P]``, whole numbers.
        generator: decides the words; drawn on its own device.
        mask: ``[N, P]``, true (or 1) for the words of a prompt; None: all.
        max_new: most words written, >= 1.
        temperature: of the distribution that is drawn from; 0 takes the likeliest word.
        end: word that ends a row; None: every row gets ``max_new`` words.
        pad: fills the rows' ends.

    Raises:
        DataError: if a prompt is empty, shapes do not fit, or the logits hold NaN.
    """
    if prompts.dim() != 2 or prompts.is_floating_point() or (mask is not None and mask.shape != prompts.shape):
        theirs = "" if mask is None else f", the mask {tuple(mask.shape)}"
        raise DataError(f"prompts are whole numbers [N, P], and a mask has their shape; got {prompts.dtype} {tuple(prompts.shape)}{theirs}")
    if max_new < 1 or not temperature >= 0:
        raise DataError(f"max_new must be >= 1 and temperature >= 0; got {max_new} and {temperature}")
    real = torch.ones_like(prompts, dtype=torch.bool) if mask is None else mask.bool()
    lengths = real.sum(1)
    if not bool((lengths > 0).all()):
        raise DataError(f"row {int((lengths == 0).nonzero()[0])} of the prompts is empty: each needs at least one word")
    order = (~real).byte().argsort(dim=1, stable=True)
    packed = prompts.gather(1, order).masked_fill(torch.arange(prompts.shape[1], device=prompts.device) >= lengths[:, None], pad)
    tokens = torch.cat([packed, packed.new_full((len(packed), max_new), pad)], 1)
    began, alive = lengths.clone(), torch.arange(len(tokens), device=tokens.device)
    with training_modes(model), torch.no_grad():
        model.eval()
        for _ in range(max_new):
            at = lengths[alive]
            logits = _logits(model(tokens[alive, : int(at.max())]), len(alive))
            drawn = _draw(logits[torch.arange(len(alive), device=logits.device), at - 1], temperature, generator)
            tokens[alive, at] = drawn.to(tokens)
            lengths[alive] += 1
            alive = alive if end is None else alive[drawn.to(alive.device) != end]
            if not len(alive):
                break
    width = int(lengths.max())
    place = torch.arange(width, device=tokens.device)
    inside = place < lengths[:, None]
    return Continuation(tokens[:, :width], inside, inside & (place >= began[:, None]))


Prompt = int | Callable[[Call], Tensor]
"""Where prompts end: after so many words, or ``call -> mask [N, L]``, true for the words of the prompts."""


def on_policy_objective(
    teacher: nn.Module | Teacher,
    *,
    prompt: Prompt,
    fraction: float = 0.5,
    beta: float = 0.5,
    temperature: float = 1.0,
    max_new: int = 32,
    draw_temperature: float = 1.0,
    end: int | None = None,
    pad: int = 0,
) -> Objective:
    """An objective of `shohin.training.train`: `losses.tokens` on continuations that the student writes itself, or on the data's own sequences.

    Batches hold words ``[N, L]``: one positional tensor, or ``input_ids`` and, if you like, ``attention_mask``. For each batch the generator
    of the training decides (algorithm 1 of the paper): with probability ``fraction`` the prompts of its sequences are continued by the
    student and the loss is taken on the words that it wrote, up to its end token; else it is the off-policy loss of the data's
    sequences, on the words with a label that is not -100 (labels lie beside the logits that predict them), else of the attention mask,
    else on all. No gradient leads through the drawing of words.

    Args:
        teacher: of the same vocabulary. The data's sequences are remembered if it is a `Teacher` that remembers; the student's are not.
        prompt: see `Prompt`; padding does not count as words.
        fraction: lambda, in [0, 1]; 0 is plain distillation by words.
        beta: 0 forward KL, 1 reverse KL, between them Jensen-Shannon, see `losses.tokens`.
        temperature: of the loss.
        max_new, end, pad: see `continuations`; ``draw_temperature`` is its temperature.

    Terms of the loss: "tokens", and "on_policy", 1 for a batch that the student wrote.

    Raises:
        DataError: if a value is outside its range, batches hold something else, or the vocabularies differ.
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"fraction must be in [0, 1]; got {fraction}")
    if isinstance(prompt, int) and prompt < 1:
        raise DataError(f"prompt must be at least one word; got {prompt}")
    expert = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
    listener = Teacher(expert.model, cache_bytes=0)  # the same words hardly come again
    checked = False

    def objective(model: nn.Module, call: Call, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        nonlocal checked
        tokens, mask = _words(call)
        own = fraction > 0 and bool(torch.rand((), generator=generator, device=generator.device) < fraction)
        if own:
            if not checked:  # before the teacher reads words that it may not know
                _check_vocabularies(model, call, expert)
                checked = True
            prompts = _prompts(prompt, call, mask)
            said = continuations(model, tokens, generator, mask=prompts, max_new=max_new, temperature=draw_temperature, end=end, pad=pad)
            call = _as_called(call, said)
        student = first_output(model(*call.args, **call.kwargs))
        answer, _ = (listener if own else expert)(call)
        loss = losses.tokens(student, answer, said.counts if own else counting(call, student), temperature, beta)
        return loss, {"tokens": loss.item(), "on_policy": float(own)}

    return objective


def _words(call: Call) -> tuple[Tensor, Tensor]:
    """The words ``[N, L]`` of a batch, and which of them are no padding."""
    named = set(call.kwargs)
    if not call.args and named in ({"input_ids"}, {"input_ids", "attention_mask"}):
        tokens, mask = call.kwargs["input_ids"], call.kwargs.get("attention_mask")
    else:
        tokens, mask = (call.args[0], None) if len(call.args) == 1 and not named else (None, None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise DataError(
            "on-policy distillation needs batches of words [N, L]: one positional tensor, or input_ids and attention_mask; got "
            f"{len(call.args)} positional and {', '.join(sorted(named)) or 'no named'} inputs"
        )
    return tokens, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()


def _prompts(prompt: Prompt, call: Call, mask: Tensor) -> Tensor:
    """``[N, L]``, true for the words of the prompts."""
    if isinstance(prompt, int):
        return mask & (mask.long().cumsum(1) <= prompt)
    found = prompt(call)
    if not isinstance(found, Tensor) or found.shape != mask.shape:
        raise DataError(f"prompt=... must return a mask of shape {tuple(mask.shape)}; got {getattr(found, 'shape', type(found).__name__)}")
    return mask & found.bool()


def _as_called(call: Call, said: Continuation) -> Call:
    """Continued prompts in place of a batch's words, passed as those were."""
    if call.args:
        return Call((said.tokens,), {}, None, None)
    mask = {name: said.mask.to(old.dtype) for name, old in call.kwargs.items() if name == "attention_mask"}
    return Call((), {"input_ids": said.tokens, **mask}, None, None)


def _check_vocabularies(model: nn.Module, call: Call, teacher: Teacher) -> None:
    """Raises DataError unless both give logits of one shape. In evaluation mode: no random number is drawn, so a resumed training is the same."""
    with training_modes(model), torch.no_grad():
        model.eval()
        same(first_output(model(*call.args, **call.kwargs)), teacher(call)[0])


def _logits(outputs: object, rows: int) -> Tensor:
    logits = first_output(outputs)
    if logits.dim() != 3 or len(logits) != rows:
        raise DataError(f"a causal model gives logits [N, L, V]; got {tuple(logits.shape)} for {rows} rows")
    return logits


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A word ``[N]`` for each row of logits ``[N, V]``."""
    logits = logits.float()
    if bool(logits.isnan().any()):
        raise DataError("the model's logits hold NaN: no word can be drawn")
    if temperature == 0:
        return logits.argmax(1)
    probabilities = torch.softmax(logits / temperature, 1).to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
