"""The user's data: batches in, a quality out. The only room that knows what a batch looks like."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shohin.errors import DataError, ShohinError

Runner = Callable[..., Any]

_ONE_PASS = "an iterator is used up after one pass; give a list or a DataLoader"
#: the label that torch's own losses leave out
IGNORED = -100


@dataclass(frozen=True)
class Call:
    """One batch as a call of the model: positional and keyword arguments, and the batch it came from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    batch: Any

    @property
    def size(self) -> int:
        """Number of samples: the first dimension of the first tensor that has one."""
        return int(_first_tensor((self.args, self.kwargs), least_dims=1).shape[0])


class Data:
    """What a job may look at.

    Args:
        train: iterable of batches for calibration, saliency and training; iterated anew each epoch. A batch is a tensor
            ``x``, a pair ``(x, y)``, or a dict of keyword arguments (``labels`` is the target and is not passed to the
            model; labels that repeat ``input_ids`` are of next words, and are moved to the scores that predict them). An
            iterator is refused: it is used up after one pass.
        validation: like ``train``; optimized against. Defaults to ``train`` (a warning is journaled).
        test: like ``train``; used once, for the report, never to choose.
        metric: ``metric(run) -> float`` where ``run`` has the model's signature; called for each candidate.
            Default: top-1 accuracy over ``validation``, which needs integer targets of the shapes below.
        loss: ``loss(outputs, batch) -> scalar Tensor``. Default: ``outputs.loss`` where the model computes one without
            labels, else cross-entropy of the first output with integer targets: classes in the last dimension,
            ``(..., C)`` with ``(...)``, or in the second, ``(B, C, ...)`` with ``(B, ...)``; targets of -100 do not count.
        example: the model's positional arguments, a tuple. Default: those of the first batch of train or validation.
        lower_is_better: the direction of the metric.
        device: where tensors are moved to.

    Raises:
        DataError: if nothing is given at all, or batches come from an iterator.
    """

    def __init__(
        self,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        *,
        test: Iterable[Any] | None = None,
        metric: Callable[[Runner], float] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        example: tuple[Any, ...] | Tensor | None = None,
        lower_is_better: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if train is None and validation is None and example is None:
            raise DataError("Data needs batches or an example: Data(train=loader, validation=loader2) or Data(example=(x,))")
        for split, batches in (("train", train), ("validation", validation), ("test", test)):
            if isinstance(batches, Iterator):
                raise DataError(f"the {split} batches are a {type(batches).__name__}: {_ONE_PASS}")
        self.train, self.validation, self.test = train, validation, test
        self.metric, self.loss = metric, loss
        self.lower_is_better, self.device = lower_is_better, torch.device(device)
        self._example = (example,) if isinstance(example, Tensor) else example

    @property
    def has_batches(self) -> bool:
        """True if there is anything to calibrate on."""
        return self.train is not None or self.validation is not None

    def example(self) -> Call:
        """The call used to capture the model.

        Raises:
            DataError: if the loader it would come from is empty.
        """
        if self._example is not None:
            return Call(self._move(tuple(self._example)), {}, None, self._example)
        return next(self.calls("train" if self.train is not None else "validation"))

    def calls(self, split: str, limit: int | None = None) -> Iterator[Call]:
        """The batches of a split as calls, at most ``limit`` samples in whole batches; batches without samples are passed over.

        Raises:
            DataError: if the split is missing or empty, or a batch has a form that is not known.
        """
        batches = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if batches is None and split == "validation":
            batches = self.train
        if batches is None and split == "train":
            batches = self.validation
        if batches is None:
            raise DataError(f"Data has no {split} batches; give Data({split}=loader)")
        seen, came = 0, False
        for batch in batches:
            came = True
            call = self.call(batch)
            size = call.size
            if not size:
                continue
            yield call
            seen += size
            if limit is not None and seen >= limit:
                return
        if not seen:
            why = "the first dimension of all its batches is 0" if came else f"iterating it gave no batch ({_ONE_PASS})"
            raise DataError(f"the {split} loader is empty: {why}")

    def call(self, batch: Any) -> Call:
        """One batch as a call. Raises DataError for a form that is not known."""
        batch = self._move(batch)
        if isinstance(batch, Tensor):
            return Call((batch,), {}, None, batch)
        if isinstance(batch, Mapping):
            return Call((), {k: v for k, v in batch.items() if k != "labels"}, _next_words(batch), batch)
        if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
            target = batch[1] if len(batch) == 2 else None
            inputs = batch[0]
            return Call(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, target, batch)
        raise DataError(
            f"a batch must be x, (x, y) or a dict of keyword arguments; got {type(batch).__name__}"
            + (f" of length {len(batch)}" if hasattr(batch, "__len__") else "")
        )

    def _move(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, Mapping):
            return {k: self._move(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._move(v) for v in value) if type(value) in (tuple, list) else value
        return value

    def batch_loss(self, outputs: Any, call: Call) -> Tensor:
        """The user's loss, or the default.

        Raises:
            DataError: if there is neither, it raises, it is not a scalar tensor, or the targets do not fit the outputs.
        """
        value: Any
        if self.loss is not None:
            try:
                value = self.loss(outputs, call.batch)
            except Exception as error:
                raise DataError(f"the loss raised {_said(error)}; it is called as loss(outputs, batch)") from error
        elif getattr(outputs, "loss", None) is not None:
            value = outputs.loss
        elif isinstance(call.target, Tensor) and not call.target.is_floating_point():
            value = _cross_entropy(first_output(outputs), call.target)
        else:
            raise DataError("no loss: the batches have no integer targets; give Data(loss=(outputs, batch) -> Tensor)")
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise DataError(f"the loss must be a scalar tensor; got {getattr(value, 'shape', type(value).__name__)}")
        return value

    @property
    def has_labels(self) -> bool:
        """True if a loss with respect to the task can be computed."""
        if self.loss is not None:
            return True
        if not self.has_batches:
            return False
        call = next(self.calls("train" if self.train is not None else "validation"))
        return call.target is not None and isinstance(call.target, Tensor) and not call.target.is_floating_point()

    def quality(self, run: Runner, split: str = "validation") -> float:
        """The metric of ``run`` (anything with the model's signature).

        A user's metric is about validation by definition; for another split the default accuracy is computed.

        Raises:
            DataError: if no metric can be computed, it raises, or it is not a finite number.
        """
        if self.metric is not None and split == "validation":
            try:
                with torch.no_grad():
                    value = float(self.metric(run))
            except ShohinError:
                raise
            except Exception as error:
                raise DataError(f"the metric raised {_said(error)}; it is called as metric(run) and returns a number") from error
        else:
            value = self._accuracy(run, split)
        if not math.isfinite(value):
            raise DataError(f"the metric returned {value}; it must be a finite number")
        return value

    def _accuracy(self, run: Runner, split: str) -> float:
        right = total = 0
        with torch.no_grad():
            for call in self.calls(split):
                if call.target is None or call.target.is_floating_point():
                    raise DataError("the default metric is accuracy and needs integer targets; give Data(metric=(run) -> float)")
                try:
                    logits = first_output(run(*call.args, **call.kwargs))
                except Exception as error:
                    shapes = [tuple(a.shape) for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]
                    raise DataError(f"the model does not run on a {split} batch (shapes {shapes}): {_said(error)}") from error
                if not bool(torch.isfinite(logits).all()):
                    raise DataError(f"the model's outputs on the {split} batches hold NaN or Inf: look for NaN in the data or the weights")
                axis = _fitting(logits, call.target)
                if axis is None:
                    raise DataError(
                        f"the default metric is accuracy: outputs of shape {tuple(logits.shape)} do not fit targets of shape "
                        f"{tuple(call.target.shape)}; give Data(metric=(run) -> float)"
                    )
                counted = call.target != IGNORED
                right += int((logits.argmax(axis) == call.target)[counted].sum())
                total += int(counted.sum())
        if not total:
            raise DataError(f"the default metric is accuracy, and all labels of the {split} batches are {IGNORED}, which do not count")
        return right / total


def _cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of scores with integer classes. Raises DataError if the two do not fit."""
    target, axis = target.long(), _fitting(out, target)
    if axis == -1:
        out, target = out.reshape(-1, out.shape[-1]), target.reshape(-1)
    elif axis is None:
        raise DataError(
            f"the default loss is cross-entropy: outputs of shape {tuple(out.shape)} do not fit labels of shape {tuple(target.shape)}; "
            "give Data(loss=(outputs, batch) -> Tensor)"
        )
    counted = target[target != IGNORED]
    if not counted.numel():
        return (out * 0).sum()
    if not 0 <= int(counted.min()) <= int(counted.max()) < out.shape[1]:
        raise DataError(
            f"labels from {int(counted.min())} to {int(counted.max())} do not fit {out.shape[1]} classes (outputs of shape "
            f"{tuple(out.shape)}, labels of shape {tuple(target.shape)}): labels are 0 to {out.shape[1] - 1}"
        )
    return F.cross_entropy(out, target, ignore_index=IGNORED)


def _said(error: Exception) -> str:
    """An exception of the user's code with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def class_axis(outputs: Any, call: Call) -> int | None:
    """Along which axis the first output holds class scores: -1 or 1 by the shape of integer labels (the last where both fit), -1 if it is
    ``[N, C]`` and there are no labels; None if it holds no scores, or there is no telling.
    """
    scores, target = first_output(outputs), call.target
    if scores.dim() < 2 or not scores.is_floating_point():
        return None
    if isinstance(target, Tensor):
        axis = None if target.is_floating_point() else _fitting(scores, target)
    else:
        axis = -1 if target is None and scores.dim() == 2 else None
    return None if axis is None or scores.shape[axis] < 2 else axis


def _next_words(batch: Mapping[str, Any]) -> Any:
    """The labels of a batch, each beside the scores that predict it. Labels that repeat the words (``labels = input_ids``, as causal models
    of `transformers` take them and shift them inside) are those of the place before; others stand beside their scores already.
    """
    labels, words = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, Tensor) or not isinstance(words, Tensor) or labels.shape != words.shape or labels.dim() != 2:
        return labels
    counts = labels != IGNORED
    if labels.is_floating_point() or not bool(counts.any()) or not torch.equal(labels[counts], words[counts].to(labels.dtype)):
        return labels
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)


def _fitting(scores: Tensor, target: Tensor) -> int | None:
    """The axis without which scores have the shape of their labels: the last, or 1 (dense prediction)."""
    if scores.dim() and target.shape == scores.shape[:-1]:
        return -1
    return 1 if scores.dim() > 1 and target.shape == (scores.shape[0], *scores.shape[2:]) else None


def first_output(outputs: Any) -> Tensor:
    """The first tensor of a model's outputs (the logits, by convention) that holds no whole numbers, if there is one."""
    if isinstance(outputs, Tensor):
        return outputs
    if getattr(outputs, "logits", None) is not None:
        logits: Tensor = outputs.logits
        return logits
    first = _first_tensor(outputs)
    return first if first.is_floating_point() else next((t for t in _tensors(outputs) if t.is_floating_point()), first)


def _first_tensor(value: Any, least_dims: int = 0) -> Tensor:
    for tensor in _tensors(value):
        if tensor.dim() >= least_dims:
            return tensor
    raise DataError(f"expected a tensor{' with a batch dimension' if least_dims else ''}, found none in {type(value).__name__}")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of nested containers, in their order."""
    stack = [value]
    while stack:
        item = stack.pop(0)
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            stack = [*item.values(), *stack]
        elif isinstance(item, (tuple, list)):
            stack = [*item, *stack]
