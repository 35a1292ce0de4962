"""Small nets with every structure that the lowering must know, and a fake-quantized simulation of a lowered file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from shohin.formats import Quantizer, named_format


class Residual2d(nn.Module):
    """Depthwise, grouped, pointwise, residual, concat, max-pool, ReLU6 and spatial mean; batch norm if asked."""

    def __init__(self, norm: bool = False, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Conv2d(3, w, 3, padding=1)
        self.depth = nn.Conv2d(w, w, 3, padding=1, groups=w)
        self.point = nn.Conv2d(w, w, 1)
        self.pool = nn.MaxPool2d(2)
        self.group = nn.Conv2d(2 * w, 2 * w, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(2 * w) if norm else nn.Identity()
        self.head = nn.Linear(2 * w, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu6(self.stem(x))
        b = F.relu(self.depth(a))
        c = self.point(b) + a
        d = self.pool(torch.cat([c, b], 1))
        e = F.relu(self.norm(self.group(d)))
        return self.head(e.mean((2, 3)))


class Residual1d(nn.Module):
    """The same idea in one dimension, with adaptive pooling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv1d(6, width, 5, padding=2)
        self.body = nn.Conv1d(width, width, 3, padding=1)
        self.pool = nn.MaxPool1d(2)
        self.average = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        x = F.relu(self.body(x) + x)
        return self.head(self.average(x).flatten(1))


class Transformer(nn.Module):
    """One pre-norm block; q without bias; a 2-d head behind a mean over the sequence."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k, self.v, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.up, self.down, self.head = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        n = self.norm1(x)
        q, k, v = (p(n).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.out(a)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Decided(nn.Module):
    """A model that answers with the largest class, through which no gradient leads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x).argmax(-1)
        return out


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Eval mode, with batch-norm statistics and biases that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                fan = value[0].numel() if value.dim() > 1 else 16
                value.copy_(
                    torch.randn(value.shape, generator=generator) / fan**0.5 + (1.0 if "norm" in name and value.dim() == 1 else 0.0)
                )
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
    return module.eval()


#: operations (by the kind of fx node) whose results become taps
TAPPED = {
    "Residual2d": ("relu6", "relu", "point", "add", "cat", "pool", "relu_1", "mean"),
    "Residual1d": ("relu", "pool", "body", "relu_1", "flatten"),
    "Transformer": ("norm1", "norm2", "reshape", "gelu", "mean"),
}


def tapped(module: nn.Module, taps: Iterable[str], rename: Mapping[str, str] | None = None) -> fx.GraphModule:
    """The module with extra outputs: the results of the fx nodes of those names."""
    traced = fx.symbolic_trace(module)
    nodes = {node.name: node for node in traced.graph.nodes}
    output = next(node for node in traced.graph.nodes if node.op == "output")
    output.args = ((output.args[0], *(nodes[tap] for tap in taps)),)
    traced.recompile()
    return traced.eval()


def act_quantizer(values: Tensor, name: str = "uint8") -> Quantizer:
    """Min-max asymmetric quantizer that holds zero exactly."""
    fmt = named_format(name)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / (fmt.high - fmt.low)
    zero = round(fmt.low - low / scale)
    return Quantizer(fmt, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero), None)


def weight_quantizer(weight: Tensor, name: str = "int7") -> Quantizer:
    """Per-channel symmetric; 7 bits by default, which no CPU saturates."""
    fmt = named_format(name)
    scale = weight.detach().double().flatten(1).abs().amax(1) / fmt.high
    return Quantizer(fmt, scale, torch.zeros(len(scale), dtype=torch.int64), 0)


def calibrated(module: nn.Module, example: Tensor, taps: tuple[str, ...]) -> tuple[dict[str, Quantizer], dict[str, Quantizer]]:
    """Activation quantizers of input and taps, and weight quantizers of all contractions."""
    graph = tapped(module, taps)
    with torch.no_grad():
        values = graph(example)[1:]
    activations = {"x": act_quantizer(example)} | {tap: act_quantizer(value) for tap, value in zip(taps, values, strict=True)}
    weights = {
        f"{n}.weight": weight_quantizer(m.weight) for n, m in module.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))
    }
    return activations, weights


class Simulation(fx.Interpreter):
    """Runs a traced module with every tapped value and every weight snapped to its grid, and keeps the tapped values."""

    def __init__(self, module: nn.Module, activations: Mapping[str, Quantizer], weights: Mapping[str, Quantizer]) -> None:
        traced = fx.symbolic_trace(module)
        with torch.no_grad():
            for name, quantizer in weights.items():
                parameter = traced.get_parameter(name)
                parameter.copy_(quantizer.fake(parameter))
        super().__init__(traced.eval())
        self.activations, self.seen = dict(activations), dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.activations:
            value = self.activations[n.name].fake(value)
            self.seen[n.name] = value
        return value

    def __call__(self, *args: Tensor) -> Any:
        with torch.no_grad():
            return self.run(*args)
