"""MiniLM with fewer layers: ``python -m distilling.minilm --method shohin --seed 0 --out record.json``.

The student is the teacher through a plan that skips layers (and keeps a share of the feed-forward neurons); it is trained on texts
without labels, its word embeddings as they are. Choices (the layers, the loss, the learning rate) were made on held-out texts and
SimLex-999; WordSim-353 and the Lee news texts are looked at once, for the record. People agree with the untrained student as well as
with the teacher (see "start"), so that the share which a student keeps says little of how it was taught: "agreement" and "cosine"
say how faithful it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import shohin
from distilling.corpus import documents, file, texts, word_pairs
from distilling.judging import Evaluation, interval, similarities, spearman
from shohin.data import Call
from shohin.distillation import FeatureTap, Teacher, distill
from shohin.planning.loss import kept_units
from shohin.pruning.layerwise import refit
from shohin.pruning.saliency import group_saliency
from shohin.surgery import Cut, cut, understand
from shohin.training import TrainConfig

#: method -> the loss between vectors, and whether the layers follow too
METHODS = {"start": ("", False), "mse": ("mse", False), "shohin": ("cosine", True)}
#: student -> share of the feed-forward neurons that stay
STUDENTS = {"3 layers": 1.0, "3 layers, 3/4 of the neurons": 0.75}
#: layers of the teacher that stay
KEPT = (0, 4, 5)
#: layers whose outputs the student follows; at a skipped layer its own output is that of the layer before
FOLLOWED = (3, 4, 5)
#: weight of these, and the peak learning rate of every method
FEATURES, RATE = 1.0, 5e-4
#: most words of a text, and words of the example that the teacher is understood with
LENGTH, WIDTH = 256, 32


class Encoder(nn.Module):
    """Words to one vector of length 1: mean of the last layer over the words of a text."""

    def __init__(self) -> None:
        super().__init__()
        if find_spec("torchvision"):
            from sweep.torchvision_schemas import torchvision_models

            torchvision_models()  # transformers imports it
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig.from_json_file(str(file("config.json"))), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[N, L]`` of word numbers, and of 1 where there is a word, to ``[N, 384]``."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def load_teacher() -> Encoder:
    """all-MiniLM-L6-v2, in eval mode."""
    from safetensors.torch import load_file

    model = Encoder()
    state = load_file(str(file("model.safetensors")))
    missing, _ = model.bert.load_state_dict(state, strict=False)
    if missing:
        raise SystemExit(f"the weights of MiniLM lack {missing[:3]}")
    return model.eval()


def tokenized(lines: Sequence[str]) -> list[list[int]]:
    """Word numbers of each text, at most `LENGTH`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(lines))]


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """One batch."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Batches:
    """Texts of nearly equal length together, always the same batches, in a new order each time (drawn from torch's generator).

    Args:
        lines: texts.
        words: of one batch, about.
        seed: of who is together.
        most: texts of one batch.
    """

    def __init__(self, lines: Sequence[str], words: int = 384, seed: int = 0, most: int = 64) -> None:
        rows = tokenized(lines)
        random.Random(seed).shuffle(rows)
        rows.sort(key=len)
        self.batches: list[dict[str, Tensor]] = []
        while rows:
            count = max(3, min(most, words // len(rows[0])))
            self.batches.append(padded(rows[:count]))
            rows = rows[count:]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in torch.randperm(len(self)).tolist():
            yield self.batches[i]


@torch.no_grad()
def embed(model: nn.Module, lines: Sequence[str], batch: int = 32) -> Tensor:
    """``[N, 384]``, in the order of the texts."""
    rows = tokenized(lines)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = torch.zeros(len(rows), 384)
    model.eval()
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        out[places] = model(**padded([rows[i] for i in places]))
    return out


def held_out_cosine(model: nn.Module, wanted: dict[str, Tensor]) -> float:
    """Mean cosine to the teacher over held-out texts, each kind counting alike."""
    _, held = texts()
    return float(np.mean([float((embed(model, held[kind]) * wanted[kind]).sum(1).mean()) for kind in wanted]))


def evaluated(model: nn.Module) -> Evaluation:
    """The model on both sets."""
    words, news = word_pairs("wordsim353.tsv"), documents()
    vectors = embed(model, news.texts).double().numpy()
    return Evaluation(similarities(embed(model, words.texts), words), vectors @ vectors.T)


def ranked(teacher: Encoder, count: int = 3) -> list[tuple[float, tuple[int, ...]]]:
    """Every choice of ``count`` layers by its mean cosine to the teacher on held-out texts, without training, the best first."""
    _, held = texts()
    wanted = {kind: embed(teacher, lines) for kind, lines in held.items()}
    layers = teacher.bert.encoder.layer
    found = []
    try:
        for kept in itertools.combinations(range(len(layers)), count):
            teacher.bert.encoder.layer = nn.ModuleList([layers[i] for i in kept])
            found.append((held_out_cosine(teacher, wanted), kept))
    finally:
        teacher.bert.encoder.layer = layers
    return sorted(found, reverse=True)


def shortened(teacher: Encoder, kept: Sequence[int] = KEPT, neurons: float = 1.0) -> Encoder:
    """The teacher through a plan: without the other layers, and with a share of the feed-forward neurons of those that stay, whose
    layers are refitted to what they gave.
    """
    example = padded([[101, *[2000] * (WIDTH - 2), 102], [101, 2000, 102]])
    graph = understand(teacher, tuple(example.values()))
    skips = tuple(f"bert.encoder.layer.{i}" for i in range(len(teacher.bert.encoder.layer)) if i not in kept)
    made = cut(teacher, graph, shohin.Plan(graph.program.fingerprint, {}, skips))
    if neurons == 1.0:
        return _own_class(made)
    shorter = _own_class(made)
    graph = understand(shorter, tuple(example.values()))
    learned, _ = texts()
    rows = tokenized([text for kind in ("words", "spans", "sentences") for text in learned[kind][:300]])
    batch = {name: F.pad(t, (0, max(0, WIDTH - t.shape[1]))) for name, t in padded([row[:WIDTH] for row in rows]).items()}
    calls = [Call(tuple(t[i : i + 100] for t in batch.values()), {}, None, None) for i in range(0, len(rows), 100)]
    saliency = group_saliency(graph, shohin.Data(example=tuple(example.values())), calls)
    widths = {
        group.name: kept_units(saliency[group.name], round(neurons * group.size))
        for group in graph.groups
        if ".intermediate." in group.name
    }
    plan = shohin.Plan(graph.program.fingerprint, widths)
    narrow = cut(shorter, graph, plan)
    refitted = refit(graph, plan, narrow.rewritten, narrow.rewritten.sliced(), calls, samples=len(rows))
    model = _own_class(narrow)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(refitted[name])
    return model


def _own_class(made: Cut) -> Encoder:
    if not isinstance(made.model, Encoder) or not made.proof.holds:
        raise SystemExit(f"the cut is not the encoder's own class: {made.reason or made.proof}")
    return made.model.eval()


def taught(method: str, student: Encoder, teacher: Encoder, seed: int, epochs: int = 1) -> dict[str, Any]:
    """Trains the student in place: one of `METHODS`. The layers follow by name, as a plan leaves them.

    Returns:
        Seconds, steps, and the mean cosine to the teacher on held-out texts before and after.
    """
    learned, held = texts()
    wanted = {kind: embed(teacher, lines) for kind, lines in held.items()}
    data = shohin.Data(train=Batches([text for kind in learned for text in learned[kind]], seed=seed))
    student.bert.embeddings.requires_grad_(False)
    before, started = held_out_cosine(student, wanted), time.perf_counter()
    loss, follows = METHODS[method]
    taps = tuple(FeatureTap(f"bert.encoder.layer.{i}", None, -1) for i in FOLLOWED) if follows else ()
    result = distill(
        student,
        Teacher(teacher, [tap.teacher_module for tap in taps], cache_bytes=0 if epochs == 1 else 2 << 30),
        data,
        config=TrainConfig(epochs=epochs, lr=RATE, weight_decay=0.01, warmup=0.06, clip=1.0, seed=seed),
        loss=loss,
        feature_weight=FEATURES if taps else 0.0,
        taps=taps,
        evaluate=lambda model: held_out_cosine(model, wanted),
        lower_is_better=False,
        progress=True,
        optimizer=lambda named: torch.optim.AdamW(named, lr=RATE, weight_decay=0.01, fused=True),
    )
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 1),
        "steps": sum(r.steps for r in result.history),
        "cosine": [before, held_out_cosine(student, wanted)],
    }


def record(method: str, seed: int = 0, neurons: float = 1.0, kept: Sequence[int] = KEPT) -> dict[str, Any]:
    """One run: the student made, taught and evaluated.

    Args:
        method: one of `METHODS`; "start" is not trained.
        neurons: share of the feed-forward neurons that stay.
    """
    if method not in METHODS:
        raise SystemExit(f"method {method!r} is not known; one of {', '.join(METHODS)}")
    torch.manual_seed(seed)
    teacher = load_teacher()
    student = shortened(teacher, kept, neurons)
    training = {"seconds": 0.0, "steps": 0} if method == "start" else taught(method, student, teacher, seed)
    whole, short = evaluated(teacher), evaluated(student)
    figures, best = short.figures(), whole.figures()
    choice = word_pairs("simlex999.txt")
    return {
        "task": "minilm",
        "method": method,
        "seed": seed,
        "test": figures.mean,
        "layers": list(kept),
        "neurons": neurons,
        "spearman_wordsim": figures.words,
        "spearman_lee": figures.news,
        "teacher": {"spearman_wordsim": best.words, "spearman_lee": best.news, "mean": best.mean},
        "simlex": spearman(similarities(embed(student, choice.texts), choice), choice),
        "kept_share": figures.mean / best.mean,
        "interval": list(interval(short, whole)),
        "agreement": short.agreement(whole),
        "parameters": sum(p.numel() for p in student.parameters()),
        "parameters_teacher": sum(p.numel() for p in teacher.parameters()),
        **training,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Distils MiniLM into fewer layers and tells what it keeps.")
    parser.add_argument("--method", choices=METHODS, default="shohin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--neurons", type=float, default=1.0, help="share of the feed-forward neurons that stay")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--layers", action="store_true", help="only rank the choices of three layers on held-out texts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if given.layers:
        for cosine, kept in ranked(load_teacher()):
            print(f"{cosine:.4f} {kept}", flush=True)
        return
    found = json.dumps(record(given.method, given.seed, given.neurons))
    if given.out is not None:
        given.out.write_text(found + "\n", "utf-8")
    print(found)


if __name__ == "__main__":
    main()
