"""What pruning without training leaves of the MiniLM text encoder: ``python -m cutting.texts --what sparse neurons heads depth width``.

Sparse weights, feed-forward neurons, attention heads, layers and the residual stream go through `shohin.prune`, which sees texts to
learn from and no labels. How far the embeddings of held-out texts move says how faithful the encoder still is, and chooses among the
rows of the table; WordSim-353 and the Lee news texts are looked at for the record alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import shohin
from distilling.corpus import texts
from distilling.judging import Evaluation, Figures, draws_of
from distilling.minilm import embed, evaluated, load_teacher, padded, tokenized
from records import HERE, Record
from shohin.graph import Graph
from shohin.graph.kinds import kind
from shohin.run import write_atomic

#: calibration texts of each kind, and the length to which all are cut or filled: positions that no text reaches are not learned
TEXTS, WIDTH, BATCH = {"words": 128, "spans": 128, "sentences": 128, "pieces": 128}, 64, 64
DRAWS = 1000
#: most that the rank correlation with people may fall when a quarter of the neurons has gone
DROP = 0.02
RESULTS, TABLE = HERE / "pruning_texts.json", HERE / "pruning_texts.md"


@dataclass(frozen=True)
class Row:
    """One way to prune.

    Args:
        what: the part of the table.
        name: of the row.
        options: of `shohin.prune`.
        gone: share of the units of the granularity that goes, or number of layers; None where the options say it.
        headed: a linear layer, at first the identity, gives the embedding, so that the residual stream may become narrower.
    """

    what: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    gone: float | None = None
    headed: bool = False


PATTERNS = ("unstructured", "2:4")
#: from the smallest error demanded to the largest
ORDER = ("SparseGPT", "Wanda", "magnitude")
SPARSE: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "recover": None},
    "Wanda": {"criterion": "wanda", "recover": None},
    "SparseGPT": {"criterion": "sparsegpt"},
    "auto": {"criterion": "auto"},
}


def _sparse() -> list[Row]:
    return [Row("sparse", f"{p}, {way}", {"granularity": p, "keep": 0.5, **options}) for p in PATTERNS for way, options in SPARSE.items()]


def _units() -> list[Row]:
    """Neurons and heads; the rows of the smaller share first."""
    rows = []
    for what, granularity, shares in (("neurons", "neuron", (0.25, 0.5)), ("heads", "head", (0.25,))):
        for gone in shares:
            for allocation, criterion in (("uniform", "taylor"), ("uniform", "obs_greedy"), ("planned", "taylor")):
                options: dict[str, Any] = {"granularity": granularity, "allocation": allocation, "criterion": criterion}
                rows.append(Row(what, f"{gone:.0%}, {allocation}, {criterion}", options, gone))
            alone = {"granularity": granularity, "allocation": "uniform", "criterion": "taylor", "recover": None}
            rows.append(Row(what, f"{gone:.0%}, uniform, taylor, cut alone", alone, gone))
    return rows


def _depth_and_width() -> list[Row]:
    rows = []
    for layers in (1, 2):
        for criterion, recover in (("cosine", "compensate"), ("divergence", "compensate"), ("cosine", None)):
            options: dict[str, Any] = {"granularity": "depth", "criterion": criterion, "recover": recover}
            rows.append(Row("depth", f"{layers} of 6, {criterion}{'' if recover else ', cut alone'}", options, layers))
    for recover in ("compensate", None):
        options = {"granularity": "width", "criterion": "taylor", "recover": recover}
        rows.append(Row("width", f"25%, taylor{'' if recover else ', cut alone'}", options, 0.25, headed=True))
    return rows


ROWS = [*_sparse(), *_units(), *_depth_and_width()]
PARTS = tuple(dict.fromkeys(row.what for row in ROWS))


class Headed(nn.Module):
    """An encoder whose embedding a linear layer gives: as it comes, the same embedding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        bert: Any = encoder.bert
        self.bert, width = bert, int(bert.config.hidden_size)
        self.head = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(width))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """As `Encoder`."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return F.normalize(self.head((hidden * mask).sum(1) / mask.sum(1)), dim=1)


def calibration(counts: Mapping[str, int], width: int = WIDTH) -> shohin.Data:
    """Texts to learn from, the kinds in turn, each cut or filled to one width."""
    learned, _ = texts()
    turns = sorted((i / count, k, i) for k, count in counts.items() for i in range(count))
    return batches([row[:width] for row in tokenized([learned[k][i] for _, k, i in turns])], width)


def batches(rows: Sequence[Sequence[int]], width: int) -> shohin.Data:
    """Rows of word numbers as training batches of one width."""
    filled = {name: F.pad(t, (0, width - t.shape[1])) for name, t in padded(rows).items()}
    return shohin.Data(train=[{name: t[i : i + BATCH] for name, t in filled.items()} for i in range(0, len(rows), BATCH)])


def share_left(graph: Graph, granularity: str, gone: float) -> float:
    """The share of multiplications left without this share of the units of every group of the kind, or without so many layers.

    Raises:
        SystemExit: if the encoder has nothing of the kind.
    """
    if granularity == "depth":
        layers = [layer.name for layer in graph.layers if layer.name.rpartition(".")[2].isdigit()]
        return graph.macs(shohin.Plan(graph.program.fingerprint, {}, tuple(layers[: int(gone)]))) / graph.macs()
    kept = {g.name: tuple(range(g.size - round(gone * g.size))) for g in graph.groups if kind(graph, g) == granularity}
    if not kept:
        raise SystemExit(f"the encoder has no {granularity} to remove")
    return graph.macs(shohin.Plan(graph.program.fingerprint, kept)) / graph.macs()


def pruned(teacher: nn.Module, row: Row, data: shohin.Data) -> tuple[nn.Module, Record]:
    """The smaller encoder, and what is known of it without texts.

    Raises:
        SystemExit: if the encoder has nothing of what should go.
    """
    model: nn.Module = Headed(teacher).eval() if row.headed else teacher
    options = dict(row.options)
    if row.gone is not None:
        graph = shohin.understand(model, data)
        if not isinstance(graph, Graph):
            raise SystemExit("the encoder was not captured as a whole")
        options["keep"] = share_left(graph, options["granularity"], row.gone)
    began = time.process_time()
    found = shohin.prune(model, data, **options)
    seconds = time.process_time() - began
    if found.model is None or (found.metrics.size_bytes is None and row.what == "sparse"):
        raise SystemExit(f"{row.name}: shohin.prune gave no model or no size")
    made = found.model.eval()
    size = found.metrics.size_bytes
    record: Record = {
        "what": row.what,
        "name": row.name,
        "options": {name: value for name, value in options.items() if name != "keep"},
        "keep": options["keep"],
        "left": found.notes["left"],
        "seconds": round(seconds, 2),
        "steps": found.notes["seconds"],
        "parameters": sum(p.numel() for p in made.parameters()),
        "bytes": dense_bytes(made) if size is None else int(size.value),
        "widths": {name: len(kept) for name, kept in found.plan.widths.items()},
        "skips": list(found.plan.skips),
    }
    if "form" in found.notes:
        record |= {"form": found.notes["form"], "proof": found.notes["proof"]}
    return made, record


def dense_bytes(model: nn.Module) -> int:
    """Of all weights as they are."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def moved(model: nn.Module, wanted: Mapping[str, Tensor], lines: Mapping[str, Sequence[str]]) -> Record:
    """How far embeddings of length 1 are from those wanted: squared distance and 1 - cosine, the mean over texts of each kind."""
    kinds = {}
    for name, vectors in wanted.items():
        found = embed(model, lines[name])
        kinds[name] = {
            "squared": float((found - vectors).square().sum(1).mean()),
            "turned": 1 - float((found * vectors).sum(1).mean()),
        }
    return {"kinds": kinds, **{what: sum(k[what] for k in kinds.values()) / len(kinds) for what in ("squared", "turned")}}


@dataclass(frozen=True)
class Judges:
    """The teacher on what people have judged, over all and over drawn pairs and texts.

    Args:
        whole: on all.
        drawn: on each draw.
    """

    whole: Evaluation
    drawn: tuple[Figures, ...]

    @classmethod
    def of(cls, teacher: nn.Module, draws: int = DRAWS) -> Judges:
        """The teacher judged."""
        whole = evaluated(teacher)
        return cls(whole, tuple(whole.figures(*drawn) for drawn in draws_of(whole, draws, 0)))

    def drop(self, other: Evaluation) -> Record:
        """How much less the other agrees with people, and 95 % of the bootstrap of that; both see the same draws."""
        own, theirs = self.whole.figures(), other.figures()
        drawn = [other.figures(*d) for d in draws_of(other, len(self.drawn), 0)]
        out: Record = {}
        for name in ("words", "news", "mean"):
            drops = [getattr(a, name) - getattr(b, name) for a, b in zip(self.drawn, drawn, strict=True)]
            low, high = np.quantile(drops, [0.025, 0.975]).tolist()
            left = getattr(theirs, name)
            out[name] = {"spearman": left, "drop": getattr(own, name) - left, "interval": [low, high]}
        return out


def verdicts(records: Sequence[Record]) -> Record:
    """What the project demands of itself: the order of the sparse methods, and how little a quarter of the neurons costs.

    Which rows with compensation count is chosen by held-out texts.
    """
    found: Record = {}
    for pattern in PATTERNS:
        errors = [r["held_out"]["squared"] for way in ORDER for r in records if r["name"] == f"{pattern}, {way}"]
        if len(errors) == len(ORDER):
            found[pattern] = {"squared": errors, "met": all(a < b for a, b in itertools.pairwise(errors))}
    quarter = [r for r in records if r["what"] == "neurons" and r["name"].startswith("25%") and r["options"].get("recover", "auto")]
    if quarter:
        best = min(quarter, key=lambda r: float(r["held_out"]["turned"]))
        drops = {name: best["people"][name] for name in ("words", "news")}
        met = all(d["drop"] <= DROP for d in drops.values())
        sure = all(d["interval"][1] <= DROP for d in drops.values())
        found["neurons 25%"] = {"row": best["name"], "drops": drops, "demanded": DROP, "met": met, "whole_interval": sure}
    return found


HEADER = (
    "| what goes | multiplications or weights left | bytes | held-out texts: squared error | 1 - cosine | WordSim-353: drop | 95 % interval "
    "| Lee: drop | 95 % interval | seconds |"
)


def table(whole: Record, records: Sequence[Record]) -> str:
    """Markdown: a part for each granularity, the smallest error on held-out texts first, and what is met."""
    people = f"rank correlation with people {whole['words']:.4f} (WordSim-353) and {whole['news']:.4f} (Lee)"
    lines = [f"MiniLM as it comes: {people}, {whole['bytes'] / 1e6:.1f} MB. Nothing is trained.", ""]
    for what in dict.fromkeys(r["what"] for r in records):
        own = sorted((r for r in records if r["what"] == what), key=lambda r: float(r["held_out"]["squared"]))
        lines += [f"## {what}", "", HEADER, "|---" * (HEADER.count("|") - 1) + "|", *(_line(r, whole["bytes"]) for r in own), ""]
    found = verdicts(records)
    for pattern in (p for p in PATTERNS if p in found):
        order = " < ".join(f"{way} {error:.4f}" for way, error in zip(ORDER, found[pattern]["squared"], strict=True))
        lines.append(f"- {pattern}, squared error, demanded {order}: {_said(found[pattern]['met'])}")
    if "neurons 25%" in found:
        entry = found["neurons 25%"]
        drops = ", ".join(f"{name} {_interval(d)}" for name, d in entry["drops"].items())
        lines.append(f"- neurons, best on held-out texts {entry['row']}: {drops}, at most {DROP} demanded: {_said(entry['met'])}")
    return "\n".join(lines) + "\n"


def _line(r: Record, whole: int) -> str:
    held, (words, news) = r["held_out"], (r["people"][name] for name in ("words", "news"))
    cells = [r["name"], f"{r['left']:.3f}", f"{r['bytes'] / 1e6:.1f} MB ({r['bytes'] / whole:.2f})"]
    cells += [f"{held['squared']:.4f}", f"{held['turned']:.4f}"]
    for drop in (words, news):
        low, high = drop["interval"]
        cells += [f"{drop['drop']:+.4f}", f"{low:+.3f} to {high:+.3f}"]
    return f"| {' | '.join(cells)} | {r['seconds']:.0f} |"


def _interval(drop: Record) -> str:
    low, high = drop["interval"]
    return f"{drop['drop']:+.4f} ({low:+.3f} to {high:+.3f})"


def _said(met: bool) -> str:
    return "met" if met else "not met"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prunes MiniLM without training and tells what is left of its embeddings.")
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the records of this run alone; the table stays as it is")
    parser.add_argument("--rows", nargs="+", default=None, help="names of the rows to run; all others stay as they were")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    teacher, (_, held), data = load_teacher(), texts(), calibration(TEXTS)
    wanted, judges = {name: embed(teacher, lines) for name, lines in held.items()}, Judges.of(teacher)
    best = judges.whole.figures()
    whole = {
        "words": best.words,
        "news": best.news,
        "bytes": dense_bytes(teacher),
        "parameters": sum(p.numel() for p in teacher.parameters()),
    }
    records = [] if given.out is not None or not RESULTS.exists() else json.loads(RESULTS.read_text("utf-8"))["records"]
    for row in (r for r in ROWS if r.what in given.what and (given.rows is None or r.name in given.rows)):
        model, record = pruned(teacher, row, data)
        record |= {"held_out": moved(model, wanted, held), "people": judges.drop(evaluated(model))}
        print(f"{row.what}: {row.name}: {record['held_out']['turned']:.4f}, {record['seconds']:.0f} s", flush=True)
        records = merged(records, record)
        save(given.out, whole, records)


def merged(records: Sequence[Record], new: Record) -> list[Record]:
    """With the new record in the place of an older one of the same row, in the order of `ROWS`."""
    place = {(row.what, row.name): i for i, row in enumerate(ROWS)}
    by_row = {(r["what"], r["name"]): r for r in [*records, new]}
    return [by_row[key] for key in sorted((key for key in by_row if key in place), key=place.__getitem__)]


def save(out: Path | None, whole: Record, records: Sequence[Record]) -> None:
    """The records, and the table unless a file was named."""
    text = json.dumps({"teacher": whole, "figures": verdicts(records), "records": records}, indent=1) + "\n"
    write_atomic(RESULTS if out is None else out, text.encode())
    if out is None:
        write_atomic(TABLE, table(whole, records).encode())


if __name__ == "__main__":
    main()
