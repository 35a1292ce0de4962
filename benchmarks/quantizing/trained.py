"""Few-bit networks that are trained as they are rounded: ``python benchmarks/quantization.py qat [--model NAME] [--method NAME] [--seeds N]``.

Every method starts from the same trained network, learns its first ranges from the same samples, and is taught by the float network in
the same training: same batches, optimizer, learning rate and epochs, the best epoch by validation. The test split is looked at once, at
the end, with weights and activations simulated. Each run is a process of its own with one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cutting.originals import ORIGINALS
from records import HERE, Book, Cell, Record, mean_and_interval, process, run_all
from shohin.distillation import LABELS, distill
from shohin.pipeline.aware import settings

EPOCHS, LEARNED = 5, 512
BITS, FORMAT = 4, "w4a4"
#: layers that have 8 bits, as in the papers, which leave the first and the last one so
ENDS = {"resnet20": ("stem*", "head*"), "mobilenetv2": ("stem*", "head*")}
OURS = {"shohin": "lsq", "shohin: pact": "pact", "shohin: fixed": "fixed", "shohin: ends of 4 bits too": "lsq"}
PEER = "modelopt: max"
METHODS = ("shohin: not trained", *OURS, PEER)
#: points of accuracy below float
DEMANDED = 1.0


def formats(name: str, method: str) -> dict[str, str]:
    """Patterns of layers to formats."""
    return {"*": FORMAT, **({} if method == "shohin: ends of 4 bits too" else dict.fromkeys(ENDS[name], "int8"))}


def modelopt(model: nn.Module, name: str, calls: list[Any]) -> nn.Module:
    """ModelOpt's simulation: weights by output channel, inputs of layers by tensor, both signed, ranges by the largest value."""
    import modelopt.torch.quantization as mtq

    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": BITS, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": BITS, "axis": None}},
            *(
                {"quantizer_name": f"{end}{kind}_quantizer", "cfg": {"num_bits": 8, "axis": axis}}
                for end in ENDS[name]
                for kind, axis in (("weight", 0), ("input", None))
            ),
            {"quantizer_name": "*", "parent_class": "nn.BatchNorm2d", "enable": False},
        ],
        "algorithm": "max",
    }

    def forward(module: nn.Module) -> None:
        for call in calls:
            module(*call.args)

    found: nn.Module = mtq.quantize(model, config, forward)
    return found


def run(name: str, method: str, seed: int) -> Record:
    """One run, in this process."""
    import copy

    import shohin
    from shohin.quantization import QAT

    original = ORIGINALS[name]
    model, data = original.model(), original.data()
    config = settings(EPOCHS, seed)
    record: Record = {"float": 100 * data.quality(model, "test")}
    if method == PEER:
        torch.manual_seed(seed)
        student = modelopt(copy.deepcopy(model), name, list(data.calls("train", LEARNED))).to(memory_format=torch.channels_last)
        record["begin"] = 100 * data.quality(student)
        result = distill(student, model, data, config=config, loss="kd", alpha=LABELS)
        view, training = student.eval(), result.to_json()
    else:
        wanted = None if method not in OURS else QAT(OURS[method])  # type: ignore[arg-type]
        found = shohin.quantize(
            model, data, formats(name, method), None, recover=wanted, config=replace(config) if wanted else None, samples=LEARNED, seed=seed
        )
        assert found.view is not None
        view, training = found.view.eval(), found.notes.get("training", {"history": []})
    history = training["history"]
    if history:
        record |= {"begin": 100 * history[0]["quality"], "seconds": sum(epoch["seconds"] for epoch in history)}
    record |= {"validation": 100 * data.quality(view), "accuracy": 100 * data.quality(view, "test")}
    return record | {"model": name, "method": method, "seed": seed}


def attempt(cell: Cell) -> Record | str:
    """One run in a process of its own, the peer's in its environment."""
    return process("quantizing.trained", cell, "modelopt" if cell[1] == PEER else None, "benchmark-quantization")


def key(record: Record) -> Cell:
    """What a record is of."""
    return record["model"], record["method"], record["seed"]


def figures(records: list[Record], whole: dict[str, Any]) -> dict[str, Any]:
    """Points of test accuracy below float, by network and method."""
    found: dict[str, Any] = {}
    for model, method in dict.fromkeys(key(r)[:2] for r in records):
        lost = [r["float"] - r["accuracy"] for r in records if key(r)[:2] == (model, method)]
        mean, low, high = mean_and_interval(lost)
        found[f"{model}, {method}"] = {"lost": mean, "seeds": len(lost), **({} if len(lost) < 2 else {"low": low, "high": high})}
        if method == "shohin":
            found[f"{model}, {method}"]["met"] = mean <= DEMANDED
    return found


def text(records: list[Record], whole: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"Fashion-MNIST, weights and activations of {BITS} bits ({FORMAT}; 8 in the first and the last layer), {EPOCHS} epochs, taught by the float network. "
        f"Points of test accuracy below float; {DEMANDED:g} is demanded.",
        "",
        "| network | method | float | untrained, on validation | trained, on validation | test | lost | seeds | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    said = figures(records, whole)
    for model, method in dict.fromkeys(key(r)[:2] for r in records):
        rows = [r for r in records if key(r)[:2] == (model, method)]

        def mean(name: str, rows: list[Record] = rows) -> str:
            values = [r[name] for r in rows if name in r]
            return f"{sum(values) / len(values):.2f}" if values else ""

        one = said[f"{model}, {method}"]
        spread = f" ({one['low']:.2f} to {one['high']:.2f})" if "low" in one else ""
        seconds = mean("seconds").split(".")[0]
        cells = [model, method, mean("float"), mean("begin"), mean("validation"), mean("accuracy"), f"{one['lost']:.2f}{spread}"]
        lines.append(f"| {' | '.join(cells)} | {len(rows)} | {seconds} |")
    return "\n".join(lines) + "\n"


BOOK = Book(HERE / "quantization_qat.json", HERE / "quantization_qat.md", key, "whole", figures, text)


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="quantization.py qat", description=__doc__)
    parser.add_argument("--model", nargs="*", choices=[n for n in ORIGINALS if n != "smartwatch"], default=["mobilenetv2"])
    parser.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print what is known, and run nothing")
    chosen = parser.parse_args(arguments)
    if not chosen.show:
        _, known = BOOK.read()
        cells = [(model, method, seed) for seed in range(chosen.seeds) for model in chosen.model for method in chosen.method]
        todo = [cell for cell in cells if cell not in known and not (cell[1] == METHODS[0] and cell[2])]
        if run_all(todo, attempt, BOOK, chosen.jobs, lambda r: f"{r['float'] - r['accuracy']:.2f} points"):
            return 1
    BOOK.show()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
