"""Quantization-aware training: the view with bits as a module whose grids learn beside its weights.

Batch normalization stays alive while weights are rounded, one scale for each output: folding it afterwards only multiplies these scales,
so the codes that ship are the ones that were trained. Late in training its statistics settle, then the grids do (Krishnamoorthi 2018,
"Quantizing deep convolutional networks for efficient inference", 1806.08342, section 4), so that weights learn on what ships.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from shohin.errors import PlanError
from shohin.formats import Quantizer
from shohin.program import Folded, Program, ProgramModule, family, fold
from shohin.program.fold import CONVOLUTIONS
from shohin.program.nodes import argument
from shohin.program.program import shape_of
from shohin.quantization.biases import on_the_grid_of_sums
from shohin.quantization.learned import rounded, scaled_gradient, whole
from shohin.quantization.quantized import Quantized
from shohin.quantization.simulate import Insert, read_apart, with_snaps
from shohin.quantization.sites import LAYERS, weight_of
from shohin.quantization.static import LeastScale

LEARNS = ("lsq", "pact", "fixed")


@dataclass(frozen=True)
class QAT:
    """How grids behave while a quantized network is trained.

    Args:
        learn: "lsq" (scales and zero points learn what rounding and clipping cost: LSQ, LSQ+), "pact" (those of activations learn from
            clipped values alone), or "fixed" (they stay as calibrated; straight-through).
        settle: shares of the training after which batch normalization uses its running statistics, and grids stop learning. They count
            only where the loader tells its length.
    """

    learn: Literal["lsq", "pact", "fixed"] = "lsq"
    settle: tuple[float, float] = (0.6, 0.8)

    def __post_init__(self) -> None:
        if self.learn not in LEARNS:
            raise PlanError(f"learn={self.learn!r} is not known; one of {', '.join(map(repr, LEARNS))}")
        if len(self.settle) != 2 or not all(0 <= share <= 1 for share in self.settle):
            raise PlanError(f"settle is two shares of the training from 0 to 1, such as (0.6, 0.8); got {self.settle!r}")


@dataclass(frozen=True)
class _Grid:
    """What learns of one grid, by tensor name: the logarithm of its scale's growth, and its zero point's shift as a share of the codes.

    Both begin at 0, so that one learning rate suits grids of any size (Jain et al. 2019, "Trained Quantization Thresholds",
    1903.08066, section 3.4).
    """

    quantizer: Quantizer
    growth: str
    shift: str | None = None
    most: float = math.inf

    def scale(self, growth: Tensor, base: Tensor) -> Tensor:
        """The scales now."""
        return (base * growth.exp()).clamp(max=self.most)

    def zero(self, shift: Tensor, base: Tensor) -> Tensor:
        """The zero points now."""
        form = self.quantizer.format
        return whole((base + shift * (form.high - form.low)).clamp(form.low, form.high))


class AwareModule(nn.Module):
    """A program that rounds while it is trained.

    Args:
        program: with the values to begin with, batch normalization not folded.
        quantized: the same program on its first grids.
        qat: how they learn.
        passes: forward passes of the whole training, or None where that is not known.
        least_scale: see `quantize_program`.
    """

    def __init__(
        self, program: Program, quantized: Quantized, qat: QAT, passes: int | None = None, least_scale: LeastScale | None = None
    ) -> None:
        super().__init__()
        self._program, self._quantized, self._least = program, quantized, least_scale
        self._starts = [math.inf, math.inf] if passes is None else [share * passes for share in qat.settle]
        self._settled = False
        norms = [n for n in program.graph.nodes if n.op == "call_function" and family(n) == "batch_norm"]
        self._by_rows = any(math.prod(shape_of(n)[2:]) == 1 for n in norms)
        made = _Builder(program, quantized, qat, least_scale)
        self._activations, self._weights = made.activations, made.weights
        self.inner = ProgramModule(made.program, made.graph)
        self.inner.train(self.training)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model, rounded as they will be."""
        if not self.training or not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        self._count()
        alone = next((len(x) == 1 for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), False)
        if not alone or not self._by_rows:
            return self.inner(*args, **kwargs)
        self.inner.eval()  # one sample has no spread: the statistics of the others serve it
        try:
            return self.inner(*args, **kwargs)
        finally:
            self.inner.train()

    def _count(self) -> None:
        done = int(self.get_buffer("passes"))
        if done >= self._starts[0] and not self._settled:
            self._settled = True
            self.inner.settle(frozenset(["batch_norm"]))
        if done >= self._starts[1]:
            for grid in (*self._activations.values(), *self._weights.values()):
                for name in (grid.growth, grid.shift):
                    if name is not None and isinstance(parameter := self._tensor(name), nn.Parameter):
                        parameter.requires_grad_(False)
        self.get_buffer("passes").add_(1)

    def _tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.inner.get_submodule(path), leaf)
        return found

    def quantized(self) -> Quantized:
        """The folded program on the grids that were learned; its view computes what this module computes in evaluation."""
        with torch.no_grad():
            tensors = {name: self._tensor(name).detach() for name in self._program.tensors if self._holds(name)}
            tensors = {**self._program.tensors, **tensors}
            aliases = {id(t): [n for n, other in self._program.tensors.items() if other is t] for t in self._program.tensors.values()}
            unfolded: dict[str, Quantizer] = {}
            snapped: dict[str, Tensor] = {}
            for name, grid in self._weights.items():
                scale = grid.scale(self._tensor(grid.growth), grid.quantizer.scale.float())
                q = replace(grid.quantizer, scale=_least(scale, tensors[name], self._rule(name)).double())
                bounds = _bounds(q, self._gamma(name, tensors), tensors[name])
                value = rounded(tensors[name], *_spread(q, q.scale.float(), tensors[name]), *bounds)
                unfolded[name] = q
                snapped |= dict.fromkeys(aliases[id(self._program.tensors[name])], value)
            folded = fold(replace(self._program, tensors={**tensors, **snapped}))
            weights = {name: _refolded(q, folded, name, tensors) for name, q in unfolded.items()}
            held = dict(folded.program.tensors)
            for name, q in weights.items():
                held |= dict.fromkeys((n for n in aliases[id(self._program.tensors[name])] if n in held), q.fake(held[name]))
            own = {name: self._activation(grid) for name, grid in self._activations.items()}
            sites = self._quantized.sites
            activations = {name: own[sites.grids[name]] for name in self._quantized.activations}
            program = replace(folded.program, tensors=held)
            program = replace(program, tensors=on_the_grid_of_sums(program, sites, activations, weights))
        return Quantized(Folded(program, folded.folded), activations, weights, sites)

    def _holds(self, name: str) -> bool:
        try:
            self._tensor(name)
        except AttributeError:
            return False
        return True

    def _rule(self, name: str) -> Callable[[Tensor], Tensor] | None:
        return _rule(self._program, self._quantized, name, self._least)

    def _gamma(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
        gamma = self._quantized.folded.folded.get(name, ((None,), 0.0))[0][0]
        return None if gamma is None else tensors[gamma]

    def _activation(self, grid: _Grid) -> Quantizer:
        scale = grid.scale(self._tensor(grid.growth), grid.quantizer.scale.float())
        zero = grid.quantizer.zero_point
        if grid.shift is not None:
            zero = grid.zero(self._tensor(grid.shift), zero.float()).to(torch.int64)
        return replace(grid.quantizer, scale=scale.double(), zero_point=zero)


class _Builder:
    """The graph that rounds, and the program that names its tensors."""

    def __init__(self, program: Program, quantized: Quantized, qat: QAT, least_scale: LeastScale | None) -> None:
        self.names, self.tensors, self.trainable = dict(program.names), _copies(program), set(program.trainable)
        self.room = "grids"
        while any(name.split(".")[0] == self.room for name in program.tensors):
            self.room += "_"
        self.learns = qat.learn != "fixed"
        norms = _folded_norms(program, quantized.folded)
        sites, clips = quantized.sites, qat.learn == "pact"
        begin = {name: _unfolded(q, program, quantized.folded, name) for name, q in quantized.weights.items()}
        self.activations = {
            name: self._grid(q, f"activation_{name}", sites.low.get(name) != 0.0, sites.high.get(name))
            for name, q in quantized.activations.items()
            if sites.grids[name] == name
        }
        self.weights = {name: self._grid(q, f"weight_{number}", False) for number, (name, q) in enumerate(begin.items())}
        inserts = {norms.get(name, name): self._activation(self.activations[sites.grids[name]], clips) for name in quantized.activations}
        apart = {norms.get(name, name): chosen for name, chosen in read_apart(quantized.activations, sites.readers).items()}
        self.graph = with_snaps(program, inserts, apart)
        for name in begin:
            gamma = quantized.folded.folded.get(name, ((None,), 0.0))[0][0]
            self._round_weight(program, name, self.weights[name], gamma, _rule(program, quantized, name, least_scale))
        self.graph.lint()
        self.program = replace(program, graph=self.graph, names=self.names, tensors=self.tensors, trainable=frozenset(self.trainable))

    def _grid(self, q: Quantizer, name: str, moves: bool, high: float | None = None) -> _Grid:
        like = torch.zeros((), dtype=torch.float32) if q.axis == -1 else torch.zeros(q.scale.shape, dtype=torch.float32)
        growth = self._held(f"{self.room}.{name}.growth", like)
        shift = self._held(f"{self.room}.{name}.shift", torch.zeros((), dtype=torch.float32)) if moves else None
        most = math.inf if high is None or moves else high / (q.format.high - q.format.low)
        return _Grid(q, growth, shift, most)

    def _held(self, name: str, value: Tensor) -> str:
        self.tensors[name] = nn.Parameter(value) if self.learns else value
        if self.learns:
            self.trainable.add(name)
        return name

    def _placeholder(self, graph: fx.Graph, name: str, value: Tensor | None = None) -> fx.Node:
        """The node of a tensor of this program."""
        found: fx.Node | None = next((n for n in graph.nodes if n.op == "placeholder" and self.names.get(n.name) == name), None)
        if found is None:
            if value is not None:
                self.tensors[name] = value
            with graph.inserting_before(next(iter(graph.nodes))):
                found = graph.placeholder("q_" + name.replace(".", "_"))
            self.names[found.name] = name
        return found

    def _parts(self, graph: fx.Graph, grid: _Grid) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Nodes of what a grid's scale and zero point are made of."""
        base = self._placeholder(graph, grid.growth.removesuffix("growth") + "scale", grid.quantizer.scale.float())
        return base, self._placeholder(graph, grid.growth), None if grid.shift is None else self._placeholder(graph, grid.shift)

    def _activation(self, grid: _Grid, clips: bool) -> Insert:
        form = grid.quantizer.format

        def snap_learned(x: Tensor, base: Tensor, growth: Tensor, shift: Tensor | None, zero: Tensor) -> Tensor:
            factor = 1 / math.sqrt(max(x.numel() // max(x.shape[0] if x.dim() else 1, 1), 1) * form.high)
            scale = scaled_gradient(grid.scale(growth, base), factor)
            if shift is not None:
                zero = scaled_gradient(grid.zero(shift, zero), factor)
            return rounded(x, scale, zero, form.low, form.high, clips=clips)

        def insert(graph: fx.Graph, source: fx.Node) -> fx.Node:
            zero = self._placeholder(graph, grid.growth.removesuffix("growth") + "zero", grid.quantizer.zero_point.float())
            return graph.call_function(snap_learned, (source, *self._parts(graph, grid), zero))

        return insert

    def _round_weight(self, program: Program, name: str, grid: _Grid, gamma: str | None, rule: Callable[[Tensor], Tensor] | None) -> None:
        """Lets the layers that read a weight read it rounded."""
        graph, q = self.graph, grid.quantizer

        def snap_weight(weight: Tensor, base: Tensor, growth: Tensor, sign: Tensor | None) -> Tensor:
            factor = 1 / math.sqrt(max(weight.numel() // max(base.numel(), 1), 1) * q.format.high)
            scale = _least(scaled_gradient(grid.scale(growth, base), factor), weight, rule)
            return rounded(weight, *_spread(q, scale, weight), *_bounds(q, sign, weight))

        aliases = {n for n, tensor in program.tensors.items() if tensor is program.tensors[name]}
        base, growth, _ = self._parts(graph, grid)
        sign = None if gamma is None else self._placeholder(graph, gamma)
        for place in [n for n in graph.nodes if n.op == "placeholder" and self.names.get(n.name) in aliases]:
            readers = [user for user in place.users if user.op == "call_function" and family(user) in LAYERS | {"embedding"}]
            with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
                snapped = graph.call_function(snap_weight, (place, base, growth, sign))
            for reader in readers:
                reader.replace_input_with(place, snapped)


def _copies(program: Program) -> dict[str, Tensor]:
    """The program's tensors as its own, tied where they are; parameters stay parameters. In the layout in which convolutions train fastest."""
    made: dict[int, Tensor] = {}
    for name, tensor in program.tensors.items():
        if id(tensor) not in made:
            copy = tensor.detach().clone()
            if copy.dim() == 4:
                copy = copy.to(memory_format=torch.channels_last)
            made[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if name in program.trainable else copy
    return {name: made[id(tensor)] for name, tensor in program.tensors.items()}


def _spread(q: Quantizer, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points of a weight in shapes that broadcast with it."""
    steps = q.spread(scale, weight)
    if q.columns is not None:
        steps = steps * q.columns.to(weight)
    return steps, q.spread(q.zero_point, weight).to(weight.device)


def _bounds(q: Quantizer, gamma: Tensor | None, weight: Tensor) -> tuple[Tensor | int, Tensor | int]:
    """The least and the largest code of each output; mirrored where normalization turns the sign of a channel, since folding turns its codes."""
    low, high = q.format.low, q.format.high
    if gamma is None or not q.format.symmetric or low == -high:
        return low, high
    turned = (gamma.detach() < 0).reshape(-1, *[1] * (weight.dim() - 1))
    numbers = weight.new_tensor([low, high])
    return torch.where(turned, -numbers[1], numbers[0]), torch.where(turned, -numbers[0], numbers[1])


def _rule(program: Program, quantized: Quantized, name: str, least: LeastScale | None) -> Callable[[Tensor], Tensor] | None:
    """The least scales of a weight's outputs, where integer kernels can saturate."""
    q = quantized.weights[name]
    if least is None or name not in quantized.sites.layers.values() or q.format.bits < 7:
        return None
    groups = _groups(program, name)
    return lambda weight: least(weight if q.columns is None else weight / q.columns.to(weight), groups)


def _groups(program: Program, name: str) -> int:
    for node in program.graph.nodes:
        if node.op == "call_function" and family(node) in CONVOLUTIONS and weight_of(program, node) == name:
            return int(argument(node, 6, 1))
    return 1


def _least(scale: Tensor, weight: Tensor, rule: Callable[[Tensor], Tensor] | None) -> Tensor:
    return scale if rule is None else torch.maximum(scale, rule(weight).to(scale))


def _folded_norms(program: Program, folded: Folded) -> dict[str, str]:
    """Layer -> the batch normalization behind it that folding merges with it; node names."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and family(node) == "batch_norm":
            layer: Any = node.args[0]
            if weight_of(program, layer) in folded.folded:
                found[layer.name] = node.name
    return found


def _ratio(folded: Folded, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What normalization multiplies each output of a weight by, float64; None where none was folded into it."""
    if name not in folded.folded:
        return None
    (gamma, _, _, variance), eps = folded.folded[name]
    if variance is None:
        return None
    spread = torch.sqrt(tensors[variance].detach().double() + eps)
    return (1.0 if gamma is None else tensors[gamma].detach().double()) / spread


def _times(q: Quantizer, factors: Tensor, instead: Tensor) -> Quantizer:
    """The quantizer of a weight whose outputs are multiplied; its scales are ``instead`` where the factor is 0."""
    shape = (-1, *[1] * (q.scale.dim() - 1))
    scale = q.scale * factors.abs().reshape(shape)
    if q.axis is None:
        raise PlanError(
            "a weight with one scale for all outputs cannot be trained beside batch normalization: give it one for each channel"
        )
    scale = torch.where(scale > 0, scale, instead.double().reshape(shape).expand_as(scale))
    if q.format.symmetric:
        return replace(q, scale=scale)
    mirrored = q.format.low + q.format.high - q.zero_point
    return replace(q, scale=scale, zero_point=torch.where((factors < 0).reshape(shape), mirrored, q.zero_point))


def _unfolded(q: Quantizer, program: Program, folded: Folded, name: str) -> Quantizer:
    """The grid of a weight before normalization was folded into it."""
    ratio = _ratio(folded, name, program.tensors)
    if ratio is None:
        return q
    weight = program.tensors[name].detach().double()
    plain = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / q.format.high
    return _times(q, torch.where(ratio == 0, 0.0, 1 / ratio), plain)


def _refolded(q: Quantizer, folded: Folded, name: str, tensors: Mapping[str, Tensor]) -> Quantizer:
    ratio = _ratio(folded, name, tensors)
    return q if ratio is None else _times(q, ratio, torch.ones_like(ratio))
