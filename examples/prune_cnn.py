"""Pruning a CNN: channels of the smartwatch network of smartwatch.py, what brings its accuracy back, int8 on top, and what the files cost.

Choices are made on the validation people alone; the test people are not looked at. About two minutes, and one more for the baseline
the first time: `python examples/prune_cnn.py`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import smartwatch
import torch

import shohin


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Prints and returns, for each file: validation accuracy, time and size as shares of the original's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, default=0.3, help="share of the multiplications that is left")
    parser.add_argument("--epochs", type=int, default=4, help="of distillation")
    parser.add_argument("--processes", type=int, default=5, help="in which the files are timed against each other")
    parser.add_argument("--out", type=Path, default=Path("runs") / "prune_cnn", help="where the files go")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, data = smartwatch.task()

    made: dict[str, shohin.Candidate | torch.nn.Module] = {"original": model}
    for recover in (None, "compensate", "distill"):  # the same cut each time; only what follows differs
        found = shohin.prune(model, data, given.keep, recover=recover, epochs=given.epochs, align=16)
        made[f"pruned, recover={recover!r}"] = found
    print(f"left: {found.notes['left']:.2f} of the multiplications; kept channels:")
    for name, kept in found.plan.widths.items():
        print(f"  {name:32} {len(kept)}")

    made["pruned, distilled, int8"] = shohin.quantize(found.model, data)  # a pruned model is a model

    files = {}
    for number, (name, one) in enumerate(made.items()):
        files[name] = shohin.export(one, data, path=given.out / f"{number}.onnx")
    target = shohin.Target("onnxruntime")
    paths = {name: one.artifact for name, one in files.items()}
    times = target.compare(paths, data.example().args, reference="original", processes=given.processes)
    rows = {}
    print(f"{'file':34} accuracy   time   size")
    for name, path in paths.items():
        size = path.stat().st_size / paths["original"].stat().st_size
        rows[name] = (files[name].metrics.quality.value, times[name].ratio, size)
        print(f"{name:34} {rows[name][0]:8.2%}  {rows[name][1]:.3f}  {size:.3f}")
    return rows


if __name__ == "__main__":
    main()
