"""Which granularity speeds up ONNX Runtime: ``python benchmarks/cutting/granularities.py [--only resnet20] [--show]``.

Each network is pruned to half of its multiplications (of its weights, where zeros stay in place) once for every granularity, without
recovery, which changes neither time nor size. Where a kind of unit alone cannot reach half, the smallest share of `SHARES` that it can
reach is taken. The files of one network, float32 and int8, are timed against each other: slices in random
interleaved order in fresh processes, thread CPU time, one thread, one sample. Then single operations at widths in steps of one, so that
what widths a runtime likes can be seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import shohin
from shohin.errors import ShohinError
from shohin.run import write_atomic, write_json

HERE = Path(__file__).parents[1]
#: what is left is the first of these that a kind of unit can reach
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
#: name in the table -> options of `shohin.prune`
UNITS: dict[str, dict[str, Any]] = {
    "channel": {},
    "channel, multiples of 16": {"granularity": "channel", "align": 16},
    "neuron": {},
    "head": {},
    "width": {},
    "depth": {"criterion": "cosine"},
}
ZEROS: dict[str, dict[str, Any]] = {name: {"criterion": "magnitude"} for name in ("unstructured", "2:4", "block 1x8")}
PRECISIONS = ("float32", "int8")
WIDTHS = range(24, 73)
#: widths that the table shows; all are in the JSON file
SHOWN = (24, 28, 30, 31, 32, 33, 40, 44, 47, 48, 49, 56, 60, 63, 64, 65, 72)
#: equal operations in a row, so that changes of layout at both ends count as little as they do in a network
CHAIN = 4
#: samples in the batches that depth and int8 look at
SAMPLES = 64


@dataclass(frozen=True)
class Network:
    """What is pruned.

    Args:
        make: the trained model in eval mode, and batches without labels.
    """

    name: str
    make: Callable[[], tuple[nn.Module, list[Any]]]


class Classifier(nn.Module):
    """MiniLM's encoder and ten classes: with a layer behind it, its width can be removed too."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.bert, self.head = encoder.bert, nn.Linear(384, 10)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[N, L]`` and ``[N, L]`` to ``[N, 10]``."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden.mean(1))  # type: ignore[no-any-return]


def _minilm() -> tuple[nn.Module, list[Any]]:
    from distilling.corpus import texts
    from distilling.minilm import load_teacher, padded, tokenized

    torch.manual_seed(0)
    _, held = texts()
    rows = [[*row[:31], 102] for row in tokenized(held["pieces"]) if len(row) >= 32][:SAMPLES]
    return Classifier(load_teacher()).eval(), [padded(rows[i : i + 16]) for i in range(0, len(rows), 16)]


def _on_fashion(name: str) -> Callable[[], tuple[nn.Module, list[Any]]]:
    def make() -> tuple[nn.Module, list[Any]]:
        from cutting.originals import ORIGINALS

        original = ORIGINALS[name]
        calls = list(original.data().calls("validation", SAMPLES))
        return original.model(), [call.args[0] for call in calls]

    return make


NETWORKS = {
    n.name: n
    for n in (
        Network("resnet20", _on_fashion("resnet20")),
        Network("mobilenetv2", _on_fashion("mobilenetv2")),
        Network("minilm", _minilm),
    )
}


def pruned(model: nn.Module, data: shohin.Data, name: str) -> tuple[float, shohin.Candidate] | str:
    """The share that is left and the candidate, or why there is none."""
    options = {"granularity": name, "recover": None, "samples": SAMPLES, **UNITS.get(name, {}), **ZEROS.get(name, {})}
    said = ""
    for keep in SHARES:
        try:
            made = shohin.prune(model, data, keep, **options)
        except ShohinError as error:
            said = said or str(error)
            if "cannot be reached" not in said:
                break
        else:
            return float(made.notes["left"]), made
    return said


def candidates(model: nn.Module, data: shohin.Data) -> Iterator[tuple[str, float, shohin.Candidate | nn.Module]]:
    """Name, share that is left, and what to export; granularities that a network has not are told and left out."""
    yield "original", 1.0, model
    for granularity in (*UNITS, *ZEROS):
        found = pruned(model, data, granularity)
        if isinstance(found, str):
            print(f"  no {granularity}: {found[:110]}", flush=True)
        else:
            yield granularity, *found


def network_rows(network: Network, folder: Path, processes: int) -> list[dict[str, Any]]:
    """One row for each granularity and precision, with ratios to the original's file of the same precision."""
    model, batches = network.make()
    data, target = shohin.Data(train=batches), shohin.Target("onnxruntime")
    files: dict[str, Path] = {}
    rows: list[dict[str, Any]] = []
    precisions = list(PRECISIONS)
    for granularity, left, made in candidates(model, data):
        plain = made if isinstance(made, nn.Module) else made.model
        assert plain is not None
        for precision in list(precisions):
            try:
                what = made if precision == "float32" else shohin.quantize(plain, data)
                name = f"{granularity} {precision}"
                shipped = shohin.export(what, data, target, folder / f"{name}.onnx".replace(" ", "-").replace(":", "-"))
            except ShohinError as error:
                print(f"  no {precision} of {granularity}: {str(error)[:110]}", flush=True)
                if granularity == "original":  # nothing to compare with
                    precisions.remove(precision)
                continue
            assert shipped.artifact is not None
            files[name] = shipped.artifact
            rows.append(
                {
                    "network": network.name,
                    "granularity": granularity,
                    "precision": precision,
                    "left": left,
                    "file_bytes": shipped.artifact.stat().st_size,
                    "packed_bytes": packed_bytes(plain) if precision == "float32" else None,
                }
            )
    example = data.example()
    ratios: dict[str, Any] = {}
    for precision in PRECISIONS:
        same = {name: path for name, path in files.items() if name.endswith(precision)}
        if same:
            ratios |= target.compare(
                same, example.args, kwargs=example.kwargs, reference=f"original {precision}", processes=processes, rounds=60
            )
    for row in rows:
        found = ratios[f"{row['granularity']} {row['precision']}"]
        whole = next(r for r in rows if r["precision"] == row["precision"])
        row |= {
            "ms": found.timing.value,
            "time": [found.ratio, found.low, found.high],
            "size": row["file_bytes"] / whole["file_bytes"],
            "packed": row["packed_bytes"] / whole["packed_bytes"] if row["packed_bytes"] else None,
        }
    return rows


def packed_bytes(model: nn.Module) -> int:
    """Of the weights on disk as `shohin.prune` stores them: zeros packed."""
    from shohin.pruning import sparse

    return sparse.stored_bytes(model)


def operation(kind: str, precision: str, width: int, path: Path) -> None:
    """A file of `CHAIN` equal operations: 3x3 convolutions on 14 x 14, or linear layers on 32 rows, from ``width`` to ``width``."""
    generator = np.random.default_rng(width)
    shape = (1, width, 14, 14) if kind == "convolution" else (32, width)
    sides = (width, width, 3, 3) if kind == "convolution" else (width, width)
    values: list[Any] = []
    nodes: list[Any] = []

    def constant(name: str, value: Any) -> str:
        values.append(numpy_helper.from_array(value, name))
        return name

    one, zero = constant("one", np.float32(1.0)), constant("zero", np.uint8(128))
    weight_scale, weight_zero = constant("ws", np.float32(0.01)), constant("wz", np.int8(0))

    def rounded(source: str, name: str) -> str:
        """Through uint8 and back, as a quantized activation is."""
        nodes.append(helper.make_node("QuantizeLinear", [source, one, zero], [f"{name}q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}q", one, zero], [name]))
        return name

    last = "x"
    for i in range(CHAIN):
        if precision == "int8":
            last = rounded(last, f"a{i}")
            weight = constant(f"w{i}i", generator.integers(-64, 64, sides).astype(np.int8))
            nodes.append(helper.make_node("DequantizeLinear", [weight, weight_scale, weight_zero], [f"w{i}"]))
        else:
            constant(f"w{i}", generator.normal(0, 0.1, sides).astype(np.float32))
        if kind == "convolution":
            nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"y{i}"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]))
        else:
            nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"y{i}"]))
        last = f"y{i}"
    if precision == "int8":
        last = rounded(last, "end")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", last)]
    graph = helper.make_graph(nodes, "operation", ends[:1], ends[1:], values)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))


def width_rows(folder: Path, widths: Sequence[int] = WIDTHS, rounds: int = 120) -> list[dict[str, Any]]:
    """Microseconds of one operation at each width."""
    found: dict[int, dict[str, Any]] = {width: {"width": width} for width in widths}
    for kind in ("convolution", "linear"):
        files = {}
        for precision in PRECISIONS:
            for width in widths:
                path = folder / f"{kind}-{precision}-{width}.onnx"
                operation(kind, precision, width, path)
                files[(precision, width)] = path
        for (precision, width), path in files.items():
            shape = (1, width, 14, 14) if kind == "convolution" else (32, width)
            found[width].setdefault("paths", {})[f"{kind} {precision}"] = (path, torch.ones(shape))
    for what in list(next(iter(found.values()))["paths"]):
        for width, us in _interleaved({w: row["paths"][what] for w, row in found.items()}, rounds).items():
            found[width][what] = us
    return [{name: value for name, value in row.items() if name != "paths"} for row in found.values()]


def _interleaved(files: Mapping[int, tuple[Path, Tensor]], rounds: int) -> dict[int, float]:
    """Microseconds of one operation by width: files of other input shapes cannot be timed by one call of `measure`, so turns are taken."""
    from shohin.targets import timing

    runs = []
    for path, x in files.values():
        opened = timing.session(str(path), 1)
        feed = {"x": x.numpy()}
        runs.append(lambda opened=opened, feed=feed: opened.run(None, feed))
    slices, _ = timing.interleave(runs, rounds=rounds, seed=0)
    return {width: timing.statistic(row) * 1e6 / CHAIN for width, row in zip(files, slices, strict=True)}


def page(found: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Which granularity speeds up ONNX Runtime",
        "",
        "Written by `python benchmarks/cutting/granularities.py`.",
        f"{found['cpu']}, {found['runtime']}, one thread, one sample.",
        "",
        "*left*: of the multiplications, or of the weights that can be sparse. *time*, *file*: of the ONNX file, as a share of the original's file of the same",
        "precision. *packed*: of the weights on disk as `shohin.prune` stores them.",
        "",
        *granularity_table(found["rows"]),
        "",
        "Time of one multiplication at each width, as a multiple of that at width 64 (four equal operations in a row: 3x3 convolutions on 14 x 14, linear layers",
        "on 32 rows). A cliff is a width that costs more than the next wider one in all; such widths are marked *.",
        "",
        *width_table(found["widths"]),
    ]
    return "\n".join(lines) + "\n"


def granularity_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    out = ["| network | granularity | left | float32 time | int8 time | float32 file | packed |", "|---|---|---|---|---|---|---|"]
    int8 = {(row["network"], row["granularity"]): _ratio(row["time"]) for row in rows if row["precision"] == "int8"}
    for row in rows:
        if row["precision"] == "float32" and row["granularity"] != "original":
            times = [_ratio(row["time"]), int8.get((row["network"], row["granularity"]), "")]
            cells = [row["network"], row["granularity"], f"{row['left']:.2f}", *times, f"{row['size']:.2f}", f"{row['packed']:.2f}"]
            out.append("| " + " | ".join(cells) + " |")
    return out


def _ratio(time_: Sequence[float]) -> str:
    middle, low, high = time_
    return f"{middle:.2f} ± {(high - low) / 2:.2f}"


def width_table(rows: Sequence[Mapping[str, Any]], shown: Sequence[int] = SHOWN) -> list[str]:
    """Lines of Markdown: time per multiplication relative to width 64."""
    kinds = [name for name in rows[0] if name != "width"]
    by_width = {row["width"]: row for row in rows}
    out = ["| width | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for width in (w for w in shown if w in by_width):
        cells = []
        for name in kinds:
            cost = by_width[width][name] / width**2 * 64**2 / by_width[64][name]
            wider = min((row[name] for row in rows if row["width"] > width), default=float("inf"))
            cells.append(f"{cost:.2f}" + (" *" if by_width[width][name] > 1.02 * wider else ""))
        out.append(f"| {width} | " + " | ".join(cells) + " |")
    return out


def main() -> None:
    """Writes benchmarks/granularities.md and .json; some minutes."""
    parser = argparse.ArgumentParser(prog="granularities", description=__doc__)
    parser.add_argument("--only", action="append", choices=[*NETWORKS, "widths"], help="only this, printed and not written")
    parser.add_argument("--show", action="store_true", help="write the tables again from what was measured")
    parser.add_argument("--processes", type=int, default=3, help="in which each network's files are timed")
    given = parser.parse_args()
    path = HERE / "granularities.json"
    if given.show:
        write_atomic(path.with_suffix(".md"), page(json.loads(path.read_text("utf-8"))).encode())
        return
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rows": [], "widths": []}
    for name, network in NETWORKS.items():
        if given.only and name not in given.only:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="granularities-") as folder:
            found["rows"] += network_rows(network, Path(folder), given.processes)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    if not given.only or "widths" in given.only:
        with tempfile.TemporaryDirectory(prefix="granularities-") as folder:
            found["widths"] = width_rows(Path(folder))
    if given.only:
        print("\n".join([*granularity_table(found["rows"]), *(width_table(found["widths"]) if found["widths"] else [])]))
        return
    from shohin.targets import cpu
    from shohin.targets.registry import version

    found |= {"cpu": cpu.model_name(), "runtime": f"ONNX Runtime {version('onnxruntime')}"}
    write_json(path, found)
    write_atomic(path.with_suffix(".md"), page(found).encode())
    print(page(found))


if __name__ == "__main__":
    main()
