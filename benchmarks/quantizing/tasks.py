"""The networks that are quantized to int8, what all methods learn from, and what their answers are judged by.

What is asked is never learned from, and no setting of any method was chosen by it. A batch is a dict of the model's arguments by name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import shohin
from cutting.originals import ORIGINALS
from distilling.corpus import documents, texts, word_pairs
from distilling.judging import Evaluation, similarities
from distilling.minilm import load_teacher, padded, tokenized
from quantizing.decoders import byte_windows, news_windows, small, smollm2

sys.path.append(str(Path(__file__).parents[2] / "examples"))

Batch = dict[str, Tensor]
Answers = NDArray[np.float64]
#: words of a text of MiniLM: longer ones are cut, shorter ones are filled and masked
WIDTH = 128
#: samples to learn from; "time and memory" are asked for with this many photos
LEARNED, PHOTOS = 512, 128


@dataclass(frozen=True)
class Task:
    """One network.

    Args:
        model: trained, in eval mode.
        learned: batches to learn from.
        asked: batches to answer.
        judge: of the answers ``[N, K]``, of language models ``[N, T, K]``, and the original's: figures by name; "snr" is the signal-to-noise ratio in dB.
        transformer: as some peers must be told.
    """

    name: str
    model: Callable[[], nn.Module]
    learned: Callable[[], list[Batch]]
    asked: Callable[[], list[Batch]]
    judge: Callable[[Answers, Answers], dict[str, float]]
    transformer: bool = False


def snr(found: Answers, wanted: Answers) -> float:
    """Signal-to-noise ratio in dB."""
    noise = np.square(found - wanted).sum()
    return float(10 * np.log10(np.square(wanted).sum() / noise)) if noise else float("inf")


def answers(run: Callable[..., Tensor], asked: Sequence[Mapping[str, Tensor]]) -> Answers:
    """What a callable with the model's signature says."""
    with torch.no_grad():
        return np.concatenate([run(**batch).double().numpy() for batch in asked])


def _named(model: nn.Module, x: Tensor) -> Batch:
    return {next(iter(inspect.signature(model.forward).parameters)): x}


def _classes(found: Answers, wanted: Answers) -> dict[str, float]:
    return {"snr": snr(found, wanted), "agree": float((found.argmax(1) == wanted.argmax(1)).mean())}


def _original(name: str) -> Task:
    """A trained network of the pruning benchmark: accuracy on its test split, the distance to the original on it, too."""
    original = ORIGINALS[name]

    def learned() -> list[Batch]:
        torch.manual_seed(0)
        return [_named(original.model(), call.args[0]) for call in original.data().calls("train", LEARNED)]

    def asked() -> list[Batch]:
        return [_named(original.model(), call.args[0]) for call in original.data().calls("test")]

    def judge(found: Answers, wanted: Answers) -> dict[str, float]:
        labels = np.concatenate([call.target.numpy() for call in original.data().calls("test")])
        return {**_classes(found, wanted), "accuracy": 100 * float((found.argmax(1) == labels).mean())}

    return Task(name, original.model, learned, asked, judge)


def _photos() -> Task:
    import efficientnet_lite0 as example

    def learned() -> list[Batch]:
        crops = example.crops("calibration")
        chosen = torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))[:PHOTOS]
        return [_named(example.network(), crops[part]) for part in chosen.split(16)]

    def asked() -> list[Batch]:
        crops = torch.cat([example.crops("validation"), example.crops("test")])
        return [_named(example.network(), part) for part in crops.split(16)]

    return Task("efficientnet_lite0", example.network, learned, asked, _classes)


def _filled(lines: Sequence[str], batch: int = 32) -> list[Batch]:
    rows = [row[:WIDTH] for row in tokenized(lines)]
    filled = {name: F.pad(t, (0, WIDTH - t.shape[1])) for name, t in padded(rows).items()}
    return [{name: t[i : i + batch] for name, t in filled.items()} for i in range(0, len(rows), batch)]


def _texts() -> Task:
    """MiniLM: the distance of embeddings of held-out texts, and rank correlation with people on words and news."""
    words, news = word_pairs("wordsim353.tsv"), documents()
    _, held = texts()
    parts = {**held, "word pairs": words.texts, "news": news.texts}

    def learned() -> list[Batch]:
        kinds, _ = texts()
        lines = [kinds[kind][i] for i in range(LEARNED // 4) for kind in ("words", "spans", "sentences", "pieces")]
        return _filled(lines)

    def judge(found: Answers, wanted: Answers) -> dict[str, float]:
        ends = np.cumsum([len(lines) for lines in parts.values()])[:-1]
        mine, theirs = (dict(zip(parts, np.split(a, ends), strict=True)) for a in (found, wanted))
        moved = [float(np.square(mine[kind] - theirs[kind]).sum(1).mean()) for kind in held]
        figures = [
            Evaluation(similarities(torch.from_numpy(v["word pairs"]), words), v["news"] @ v["news"].T).figures() for v in (mine, theirs)
        ]
        held_out = [np.concatenate([v[kind] for kind in held]) for v in (mine, theirs)]
        return {
            "snr": snr(*held_out),
            "squared": float(np.mean(moved)),
            "words": figures[0].words,
            "news": figures[0].news,
            "words_drop": figures[1].words - figures[0].words,
            "news_drop": figures[1].news - figures[0].news,
        }

    def asked() -> list[Batch]:
        return [batch for lines in parts.values() for batch in _filled(list(lines))]

    return Task("minilm", load_teacher, learned, asked, judge, transformer=True)


def _decoder(name: str) -> Task:
    """A language model: the distance of its logits on held-out windows, and what that does to the next token."""
    make, read = {"decoder": (small, byte_windows), "smollm2": (smollm2, news_windows)}[name]

    def batches(part: int, count: int, size: int) -> list[Batch]:
        return [{"input_ids": rows} for rows in read()[part][:count].split(size)]

    def asked() -> list[Batch]:
        return batches(1, 16, 2)

    def judge(found: Answers, wanted: Answers) -> dict[str, float]:
        logs = [F.log_softmax(torch.from_numpy(v), -1).flatten(0, -2) for v in (found, wanted)]
        ids = torch.cat([batch["input_ids"] for batch in asked()])
        following = ids[:, 1:].flatten()
        mine, theirs = (log.unflatten(0, ids.shape)[:, :-1].flatten(0, 1) for log in logs)
        nats = [float(F.nll_loss(log, following)) for log in (mine, theirs)]
        apart = float((theirs.exp() * (theirs - mine)).sum(-1).mean())
        return {
            **_classes(found.reshape(-1, found.shape[-1]), wanted.reshape(-1, wanted.shape[-1])),
            "divergence": apart,
            "nats": nats[0],
            "nats_drop": nats[0] - nats[1],
        }

    return Task(name, make, lambda: batches(0, 64, 4), asked, judge, transformer=True)


TASKS: dict[str, Callable[[], Task]] = {
    "smartwatch": lambda: _original("smartwatch"),
    "resnet20": lambda: _original("resnet20"),
    "mobilenetv2": lambda: _original("mobilenetv2"),
    "efficientnet_lite0": _photos,
    "minilm": _texts,
    "decoder": lambda: _decoder("decoder"),
    "smollm2": lambda: _decoder("smollm2"),
}


def data(task: Task) -> shohin.Data:
    """What Shohin learns from: the same batches, without labels."""
    return shohin.Data(train=task.learned())


def packed(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, NDArray[Any]]:
    """Batches as the arrays of an npz: "0:name"."""
    return {f"{i}:{name}": t.numpy() for i, batch in enumerate(batches) for name, t in batch.items()}
