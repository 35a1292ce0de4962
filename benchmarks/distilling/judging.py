"""What two sets of judgements of people say of vectors of texts: WordSim-353 and the Lee news texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from distilling.corpus import Judged, documents, word_pairs


def similarities(vectors: Tensor, judged: Judged) -> np.ndarray:
    """The cosine of each judged pair."""
    first, second = (vectors[torch.tensor(places)] for places in zip(*judged.pairs, strict=True))
    return (first * second).sum(1).double().numpy()


def spearman(found: np.ndarray, judged: Judged) -> float:
    """Rank correlation of cosines with the scores of people."""
    return float(spearmanr(found, judged.scores).statistic)


@dataclass(frozen=True)
class Figures:
    """Rank correlations with people.

    Args:
        words, news: of WordSim-353 and of the Lee news texts.
    """

    words: float
    news: float

    @property
    def mean(self) -> float:
        """Of both."""
        return (self.words + self.news) / 2


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Cosines that a model gives to what people have judged: ``[353]`` of word pairs, ``[50, 50]`` of news texts."""

    words: np.ndarray
    news: np.ndarray

    def figures(self, pairs: np.ndarray | None = None, chosen: np.ndarray | None = None) -> Figures:
        """Over all, or over drawn word pairs and drawn news texts (a text drawn twice makes no pair with itself)."""
        words, scores = word_pairs("wordsim353.tsv"), _people()[1]
        pairs = np.arange(len(self.words)) if pairs is None else pairs
        chosen = np.arange(len(self.news)) if chosen is None else chosen
        i, j = np.triu_indices(len(chosen), 1)
        i, j = chosen[i], chosen[j]
        i, j = i[i != j], j[i != j]
        first = spearmanr(self.words[pairs], np.array(words.scores)[pairs]).statistic
        return Figures(float(first), float(spearmanr(self.news[i, j], scores[i, j]).statistic))

    def agreement(self, teacher: Evaluation) -> dict[str, float]:
        """Rank correlation with the teacher's own cosines: how faithful the student is, whatever people say."""
        upper = np.triu_indices(len(self.news), 1)
        return {
            "words": float(spearmanr(self.words, teacher.words).statistic),
            "news": float(spearmanr(self.news[upper], teacher.news[upper]).statistic),
        }


@cache
def _people() -> tuple[Judged, np.ndarray]:
    """The news texts, and the scores of people ``[50, 50]``."""
    news = documents()
    scores = np.zeros((len(news.texts), len(news.texts)))
    for (i, j), score in zip(news.pairs, news.scores, strict=True):
        scores[i, j] = scores[j, i] = score
    return news, scores


def draws_of(evaluation: Evaluation, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Word pairs and news texts, drawn with replacement."""
    chance = np.random.default_rng(seed)
    for _ in range(count):
        pairs = chance.integers(len(evaluation.words), size=len(evaluation.words))
        yield pairs, chance.integers(len(evaluation.news), size=len(evaluation.news))


def interval(student: Evaluation, teacher: Evaluation, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % of the bootstrap of the share of the teacher's mean that the student keeps; both see the same draws of pairs and texts."""
    shares = [student.figures(*drawn).mean / teacher.figures(*drawn).mean for drawn in draws_of(student, draws, seed)]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)
