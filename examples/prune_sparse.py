"""Zeros in the weights of the smartwatch network of smartwatch.py: 2:4 and unstructured, trained on in an own loop, stored packed.

The shapes stay, so the ONNX file and its time do, too; what becomes smaller is the packed file of weights. About two minutes, and one
more for the baseline the first time: `python examples/prune_sparse.py`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import smartwatch
import torch
from torch.nn.functional import cross_entropy

import shohin
from shohin.pruning.sparse import masked, read, write


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Prints and returns, for each pattern: validation accuracy before and after training, and packed size as a share of dense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, default=0.2, help="share of the weights that unstructured zeros leave")
    parser.add_argument("--epochs", type=int, default=2, help="of the own loop")
    parser.add_argument("--out", type=Path, default=Path("runs") / "prune_sparse", help="where the weights go")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, data = smartwatch.task()
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    print(f"original: {data.quality(model):.2%}, {dense} bytes")

    rows = {}
    for granularity, keep in (("2:4", 0.5), ("unstructured", given.keep)):
        # layers in turn: the weights that stay take over what the others did (SparseGPT, or exact OBS where that is quick)
        found = shohin.prune(model, data, keep, granularity=granularity)
        before = data.quality(found.model)

        # any loop and any optimizer: inside the block zeros stay exactly zero
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(found.model.parameters(), lr=5e-4)
        found.model.train()
        with masked(found.model, found.plan):
            for _ in range(given.epochs):
                for x, y in data.train:
                    optimizer.zero_grad()
                    cross_entropy(found.model(x), y, label_smoothing=0.1).backward()
                    optimizer.step()
        found.model.eval()

        path = given.out / f"{granularity.replace(':', '-')}.safetensors"
        size = write(path, found.model)
        again = smartwatch.WatchNet()
        again.load_state_dict(read(path))  # bit for bit
        rows[granularity] = (before, data.quality(again.eval()), size / dense)
        print(
            f"{granularity}, {keep:.0%} left: {before:.2%}, trained on {rows[granularity][1]:.2%}; {size} bytes, {size / dense:.3f} of dense"
        )
        for name, why in found.notes["dense"].items():
            print(f"  dense: {name}: {why}")
    return rows


if __name__ == "__main__":
    main()
