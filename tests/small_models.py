"""Small models, each with one difficulty. Pre-trained look: batch-norm statistics and scales are never trivial."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode, with random normalization statistics, scales and biases."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.data.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 2.0)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, -0.5, 0.5)
    return model.double().eval()


class Residual1d(nn.Module):
    """Conv1d, a residual block, a strided block with a shortcut convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.a1, self.n1, self.a2, self.n2 = nn.Conv1d(8, 6, 3, padding=1), nn.BatchNorm1d(6), nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8)
        self.b1, self.b2, self.short = nn.Conv1d(8, 10, 3, 2, 1), nn.Conv1d(10, 12, 3, padding=1), nn.Conv1d(8, 12, 1, 2)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.n2(self.a2(F.relu(self.n1(self.a1(x))))))
        x = F.relu(self.b2(F.relu(self.b1(x))) + self.short(x))
        return self.fc(x.mean(-1))


class BasicBlock(nn.Module):
    """In-place activations, also before the skip."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.act(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(BasicBlock(6, 6, 1), BasicBlock(6, 6, 1), BasicBlock(6, 9, 2), BasicBlock(9, 9, 1))
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.pool(self.act(self.bn(self.conv(x)))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, r: int) -> None:
        super().__init__()
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, r, 1), nn.Conv2d(r, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))


class Inverted(nn.Module):
    def __init__(self, i: int, o: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.residual = i == o and stride == 1
        self.pw, self.b1 = nn.Conv2d(i, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.dw, self.b2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)
        self.se = SqueezeExcite(hidden, 4)
        self.pl, self.b3 = nn.Conv2d(hidden, o, 1, bias=False), nn.BatchNorm2d(o)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.b2(self.dw(self.act(self.b1(self.pw(x))))))
        y = self.b3(self.pl(self.se(y)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Inverted(6, 6, 12, 1), Inverted(6, 8, 10, 2))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseNet(nn.Module):
    """Each layer reads, through its own normalization, all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.c0 = nn.Conv2d(3, 4, 3, padding=1)
        self.n1, self.c1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
        self.n2, self.c2 = nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3, padding=1)
        self.n3, self.transition, self.fc = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c0(x)
        x = torch.cat([x, self.c1(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c2(F.relu(self.n2(x)))], dim=-3)
        return self.fc(F.relu(self.transition(F.avg_pool2d(F.relu(self.n3(x)), 2))).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.g(F.relu(self.a(x)))))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 5, 3, 2, 1), nn.Linear(5 * 16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.fc2(F.elu(self.fc1(x.view(x.size(0), -1))))


class Chunks(nn.Module):
    """Two halves with different activations, then an uneven split."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.p, self.q, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.a(x).chunk(2, 1)
        x = self.c(torch.cat([torch.sigmoid(u), F.relu(v)], 1))
        p, q = torch.split(x, [3, 5], dim=1)
        return self.out(torch.tanh(self.p(p) + self.q(q)))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        return self.b(x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w))


class SubPixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.up(self.a(x))))


class Twice(nn.Module):
    """``cat([x, x])``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(torch.cat([x, x], 1))


class SharedBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.e = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 7, 3, padding=1), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.e(torch.tanh(self.s(F.relu(x)) + self.s(F.max_pool2d(x, 3, 1, 1))))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.e = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(torch.tanh(self.s(torch.tanh(self.s(self.a(x))))))


class SharedOddly(nn.Module):
    """One linear layer over channels in one place and over a fixed axis of the input in another: both uses must stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.e = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(torch.tanh(self.s(F.relu(self.a(x))) + self.s(x)))


class Tied(nn.Module):
    """Token classification over the vocabulary with the embedding as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.l1, self.l2 = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.l2(F.gelu(self.l1(x))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 5), nn.Linear(5, 9), nn.Linear(5, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.glu(self.a(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Scaled(nn.Module):
    """A broadcast addition of a parameter, a scale for each channel, one scalar, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1), nn.PReLU(6)
        self.shift, self.scale = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.rand(1, 6, 1, 1) + 0.5)
        self.temperature = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x) * self.scale + self.shift) * self.temperature)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.ConvTranspose2d(8, 5, 2, 2)
        self.n, self.c, self.out = nn.BatchNorm2d(11), nn.Conv2d(11, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.up(F.relu(self.b(F.max_pool2d(x, 2))))
        return self.out(F.relu(self.c(self.n(torch.cat([y, x], 1)))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b, self.c = (
            nn.Conv1d(2, 6, 3, padding=1),
            nn.LSTM(6, 5, batch_first=True),
            nn.Conv1d(5, 7, 3),
            nn.Conv1d(7, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(F.relu(self.a(x)).transpose(1, 2))
        return self.c(F.relu(self.b(y.transpose(1, 2)))).mean(-1)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sort(self.a(x), dim=-1).values
        return self.c(F.relu(self.b(x)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = -x
        return x


class Named(nn.Module):
    """Keyword inputs, one of them a dict; a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, *, left: Tensor, other: dict[str, Tensor]) -> dict[str, Tensor | tuple[Tensor, ...]]:
        x = torch.tanh(self.a(left) + self.b(other["right"]))
        return {"logits": self.c(x), "pair": (torch.softmax(self.c(-x), -1), left * 2)}


class NormGroups(nn.Module):
    def __init__(self, c: int = 8, groups: int = 2) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, c, 1), nn.GroupNorm(groups, c), nn.Conv2d(c, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))


class Attention(nn.Module):
    """Self-attention in the ways people write it: ``style`` is "fused", "timm" (head dim from the shape), "separate" or "sdpa"."""

    def __init__(self, d: int, heads: int, dim: int, style: str, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.style = heads, dim, scale or dim**-0.5, style
        if style in ("fused", "timm"):
            self.qkv = nn.Linear(d, 3 * heads * dim)
        else:
            self.q, self.k, self.v = nn.Linear(d, heads * dim), nn.Linear(d, heads * dim), nn.Linear(d, heads * dim)
        self.proj = nn.Linear(heads * dim, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.style in ("fused", "timm"):
            dim = self.head_dim if self.style == "fused" else c // self.num_heads
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.style == "sdpa":
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        o = o.transpose(1, 2)
        return self.proj(o.reshape(b, n, c) if self.style == "timm" else o.reshape(b, n, self.num_heads * self.head_dim))


class Layer(nn.Module):
    def __init__(self, d: int, heads: int, dim: int, hidden: int, style: str, scale: float | None) -> None:
        super().__init__()
        self.n1, self.attn, self.n2 = nn.LayerNorm(d), Attention(d, heads, dim, style, scale), nn.LayerNorm(d)
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.fc2(F.gelu(self.fc1(self.n2(x))))


class ViT(nn.Module):
    def __init__(
        self, style: str = "fused", d: int = 12, heads: int = 3, dim: int = 4, hidden: int = 10, scale: float | None = None, layers: int = 1
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, d, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 5, d))
        self.layers = nn.ModuleList(Layer(d, heads, dim, hidden, style, scale) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class ConvNeXt(nn.Module):
    """Channels last inside the block, layer scale, a learned norm over the stream."""

    def __init__(self, d: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, d, 2, 2), nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm, self.pw1, self.pw2 = nn.LayerNorm(d), nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.gamma, self.head = nn.Parameter(torch.rand(d) + 0.5), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.pw2(F.gelu(self.pw1(y)))).permute(0, 3, 1, 2)
        return self.head((x + y).mean([-2, -1]))


class GroupedQuery(nn.Module):
    """Grouped-query attention with a causal mask buffer: ``heads`` queries share ``kv`` keys and values."""

    def __init__(self, d: int = 6, heads: int = 4, kv: int = 2, dim: int = 3, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.kv, self.dim, self.repeats, self.scale = heads, kv, dim, heads // kv, scale or dim**-0.5
        self.q, self.k, self.v = nn.Linear(d, heads * dim), nn.Linear(d, kv * dim), nn.Linear(d, kv * dim)
        self.o = nn.Linear(heads * dim, d)
        self.register_buffer("mask", torch.ones(1, 1, 8, 8, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.dim).transpose(1, 2)
        k, v = (layer(x).view(b, n, self.kv, self.dim).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (t[:, :, None].expand(b, self.kv, self.repeats, n, self.dim).reshape(b, self.heads, n, self.dim) for t in (k, v))
        scores = (q @ k.transpose(2, 3)) * self.scale
        scores = scores.masked_fill(~self.mask[:, :, :n, :n], float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.heads * self.dim))


class Windowed(nn.Module):
    """Patch merging by strided slices, a table read through an integer buffer, a permutation by a constant index."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.merge, self.out = nn.Linear(3, 6), nn.Linear(24, 5), nn.Linear(5, 2)
        self.table = nn.Parameter(torch.randn(9, 5))
        self.register_buffer("where", torch.tensor([[0, 3], [8, 2]]))
        self.register_buffer("order", torch.tensor([4, 2, 0, 1, 5, 3]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))[..., self.order]
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        bias = self.table[self.where.view(-1)].view(1, 2, 2, 5)
        return self.out(torch.relu(self.merge(x) + bias)).mean((1, 2))


class Matrix(nn.Module):
    """Weights stored as (in, out) and multiplied with ``@`` and ``addmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 7)), nn.Parameter(torch.randn(7, 5))
        self.bias, self.w3 = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.addmm(self.bias, torch.tanh(x @ self.w1), self.w2)) @ self.w3
