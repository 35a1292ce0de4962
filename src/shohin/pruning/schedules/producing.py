"""The slices that produce a unit: with all of them at zero, it is zero wherever it is read, and cutting it changes nothing.

Of every group the claim is tried out, on weights and inputs that leave nothing dead; a group for which it does not hold (a
normalization computes statistics over it, a sigmoid makes one half of zero) is left out, by name and reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from shohin.errors import ShohinError
from shohin.graph import Graph, UnitGroup
from shohin.plan import Plan
from shohin.program import Program, family
from shohin.surgery import rewrite, view_of
from shohin.surgery.precision import double_precision, widen

_TOLERANCE = 1e-9

#: operator family -> position of the weight among its arguments, and the axis over which it sums
_SUMS = {
    "linear": (1, 1),
    "conv1d": (1, 1),
    "conv2d": (1, 1),
    "conv3d": (1, 1),
    "conv_transpose1d": (1, 0),
    "conv_transpose2d": (1, 0),
    "conv_transpose3d": (1, 0),
    "matmul": (1, -2),
    "mm": (1, 0),
    "addmm": (2, 0),
}


@dataclass(frozen=True, eq=False)
class Slices:
    """What produces the units of one group.

    Args:
        group: its name.
        size: number of units.
        places: (parameter name, axis, indices ``[units, k]``).
    """

    group: str
    size: int
    places: tuple[tuple[str, int, Tensor], ...]

    @property
    def home(self) -> str:
        """The parameter under which what is known of the units is kept."""
        return self.places[0][0]

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sums over each unit's elements: float64 ``[units]``, of tensors by parameter name; a missing one counts as zero."""
        out = torch.zeros(self.size, dtype=torch.float64)
        for name, axis, index in self.places:
            if name in values:
                tensor = values[name].detach().double().movedim(axis, 0)
                out += tensor.reshape(len(tensor), -1).sum(1).cpu()[index].sum(1)
        return out

    def scale(self, values: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiplies each unit's elements by its factor, in place; zero gives exact zeros."""
        for name, axis, index in self.places:
            if name not in values:
                continue
            tensor = values[name]
            line = torch.ones(tensor.shape[axis], dtype=torch.float64)
            line[index.flatten()] = factors.double().repeat_interleave(index.shape[1])
            shape = [1] * tensor.dim()
            shape[axis] = -1
            line = line.to(tensor.device).view(shape)
            tensor.mul_(line.to(tensor.dtype)).masked_fill_(line == 0, 0.0)

    def elements(self, values: Mapping[str, Tensor]) -> int:
        """Elements of one unit."""
        places = [place for place in self.places if place[0] in values]
        return sum(index.shape[1] * values[name].numel() // values[name].shape[axis] for name, axis, index in places)


def producing(graph: Graph) -> tuple[dict[str, Slices], dict[str, str]]:
    """Group name -> its producing slices, and of the other groups the reason why there are none.

    Producing are all slices of parameters but those along an axis over which every reader sums (the inputs of a linear layer or
    convolution): rows of weights, biases, scales and shifts of batch normalization, added or multiplied vectors.
    """
    summed = _summed(graph.program)
    slices = {group.name: _slices(graph, group, summed) for group in graph.groups}
    empty = {name for name, one in slices.items() if not one.places}
    plain = [one for one in slices.values() if one.places and not graph.group(one.group).normalized]
    sure = {one.group for one in plain} if plain and not _fault(graph, plain) else set()  # most models: one trial for all
    found: dict[str, Slices] = {}
    excluded: dict[str, str] = {}
    for name, one in slices.items():
        reason = "no trainable parameter produces it" if name in empty else "" if name in sure else _fault(graph, [one])
        if reason:
            excluded[name] = reason
        else:
            found[name] = one
    return found, excluded


def _slices(graph: Graph, group: UnitGroup, summed: set[tuple[str, int]]) -> Slices:
    places = tuple(
        (name, axis, torch.from_numpy(index))
        for name, axes in group.slices.items()
        for axis, index in axes.items()
        if name in graph.program.trainable and (name, axis) not in summed
    )
    return Slices(group.name, group.size, places)


def _summed(program: Program) -> set[tuple[str, int]]:
    """(parameter, axis) of the axes over which all readers of a weight sum."""
    out: set[tuple[str, int]] = set()
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in program.names or not node.users:
            continue
        name = program.names[node.name]
        axes = {_axis(user, node, program.tensors[name].dim()) for user in node.users}
        if len(axes) == 1 and None not in axes:
            out |= {(name, axis) for axis in axes if axis is not None}
    return out


def _axis(user: fx.Node, weight: fx.Node, dims: int) -> int | None:
    position, axis = _SUMS.get(family(user), (0, 0)) if user.op == "call_function" else (0, 0)
    given = [i for i, a in enumerate(user.args) if a is weight]
    return axis % dims if position and given == [position] and dims > 1 else None


def _fault(graph: Graph, slices: Sequence[Slices]) -> str:
    """Why every second unit of these groups is not gone when the producing slices are zero; "" if it is."""
    gone = {one.group: torch.arange(one.size) % 2 == 1 for one in slices}
    plan = Plan(graph.program.fingerprint, {name: tuple((~dead).nonzero().flatten().tolist()) for name, dead in gone.items()})
    try:
        error = _error(graph, plan, slices, gone)
    except ShohinError as caught:
        return str(caught)
    if error <= _TOLERANCE:
        return ""
    normalized = any(graph.group(one.group).normalized for one in slices)
    why = "a normalization computes statistics over it" if normalized else "what reads it does not see zero"
    return f"{why} (outputs differ by {error:.1e} when units are zero and when they are cut)"


def _error(graph: Graph, plan: Plan, slices: Sequence[Slices], gone: Mapping[str, Tensor]) -> float:
    """The largest relative difference between zeroed and cut, in float64, on random weights near the model's own."""
    program = graph.program
    whole = widen(view_of(graph, rewrite(graph, Plan(program.fingerprint)))).eval()
    rewritten = rewrite(graph, plan)
    part = widen(view_of(graph, rewritten)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), double_precision():
        means = {n: t for n, t in whole.named_buffers() if n in _means(program)}
        own = {**dict(whole.named_parameters()), **means}
        for p in own.values():
            if p.is_floating_point() and p.numel():
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.add_((noise * (0.2 if p.dim() <= 1 else 0.3 * p[0].numel() ** -0.5)).to(p.device))
        for one in slices:
            one.scale(own, (~gone[one.group]).double())
        for name, p in (*part.named_parameters(), *part.named_buffers()):
            if name in own:
                p.copy_(rewritten.scale(name, rewritten.slice(name, own[name].detach())))
        inputs = [_lively(x, generator) for x in program.example]
        args, kwargs = pytree.tree_unflatten(inputs, program.in_spec)
        a, b = (pytree.tree_leaves(m(*args, **kwargs)) for m in (whole, part))
    errors = [_relative(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor) and x.is_floating_point()]
    return max(errors, default=float("inf"))


def _means(program: Program) -> set[str]:
    """Names of the running means of batch normalization: a fresh model's are zero, a trained one's are not."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and family(n) == "batch_norm"]
    return {program.names[n.args[3].name] for n in nodes if isinstance(n.args[3], fx.Node) and n.args[3].name in program.names}


def _lively(x: object, generator: torch.Generator) -> object:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double() + torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    return x


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
    return error if error == error else float("inf")
