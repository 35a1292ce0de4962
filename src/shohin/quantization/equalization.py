"""Channels of one activation made alike, so that they share its scale fairly: the layer before takes the factor, the layers behind its inverse.

Cross-layer equalization and high-bias absorption (Nagel et al., "Data-Free Quantization", 1906.04721, sections 4.1.2 and 4.1.3). There ranges
of weights are made alike, whose scales are one for each output here; so it is the ranges of activations, on the calibration data (Meller et
al., 1902.01917, section 4). Between the layers may lie what gives ``f(s x) = s f(x)`` for positive s, channel by channel; in floats nothing
changes but rounding. Absorption alone takes for granted that a channel goes on to exceed what it nearly always has.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from shohin.data import Call
from shohin.evidence.layers import tensor_readers
from shohin.program import Program, family, interpret
from shohin.program.fold import CONVOLUTIONS
from shohin.program.nodes import argument
from shohin.program.program import shape_of
from shohin.quantization.observation import channels_last, in_slices, taken_whole
from shohin.quantization.sites import IDENTITY, PADS, is_zero_pad, weight_of

#: a channel's factor is so much of its range: less than all leaves room for what the calibration data did not show
POWER = 0.8
#: least range of a channel beside the largest; one that shows less may be rare, and would take the range from all others when it comes
LEAST = 0.05
#: least number of values of each channel that say how far it goes: of fewer, rare ones are not among them
VALUES = 256
#: samples, and values of each channel, after which no more are looked at
SAMPLES, ENOUGH = 32, 1024
#: standard deviations below its mean that a channel nearly always exceeds
DEVIATIONS = 3.0
#: standard deviations above its mean that a channel hardly ever exceeds
RARE = 4.5
#: least spread of a layer's factors: channels that are alike are left alone
SPREAD = 1.2

_HOMOGENEOUS = frozenset(("relu", "leaky_relu", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", *IDENTITY))
_TO_ROWS = frozenset(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean", "flatten", "view", "reshape", "squeeze"))


@dataclass(frozen=True)
class Pair:
    """An activation that one layer makes and only layers read.

    Args:
        maker: the layer.
        norm: the batch normalization behind it, or None.
        read: what the others read.
        readers: these.
        clipped: True if a ReLU lies between, and nothing else that computes.
    """

    maker: fx.Node
    norm: fx.Node | None
    read: fx.Node
    readers: tuple[fx.Node, ...]
    clipped: bool

    @property
    def made(self) -> fx.Node:
        """What the maker and its normalization give."""
        return self.maker if self.norm is None else self.norm


def equalized(program: Program, layers: Collection[str], calls: Sequence[Call]) -> tuple[Program, dict[str, tuple[str, ...]]]:
    """The program with other values of its tensors, which computes the same; and address of each activation that was changed -> the layers
    that make and read it.

    Args:
        program: with its batch normalizations, whose factors are changed in the place of the weights'.
        layers: addresses of the layers that are going to compute on integers: both sides of an activation must be among them.
        calls: calibration batches; as many samples are looked at as `SAMPLES` and `ENOUGH` say.
    """
    readers = tensor_readers(program)
    pairs = [pair for pair in _pairs(program, layers) if _own(program, pair, readers)]
    if not pairs:
        return program, {}
    seen = _seen(program, pairs, calls)
    tensors, changed = dict(program.tensors), dict[str, tuple[str, ...]]()
    for pair in pairs:
        most = _reach(pair, seen)
        if seen[pair.read.name].count < VALUES or not bool(torch.isfinite(most).all()):
            continue
        moved = _absorb(program, tensors, pair, seen[pair.read.name].always())
        most = most - moved
        top = float(most.max())
        factors = torch.ones_like(most)
        if top > 0:
            factors = torch.where(most > 0, (most / top).clamp_min(LEAST) ** POWER, factors)
        spread = float(factors.max() / factors.min()) >= SPREAD
        if spread:
            _divide(program, tensors, pair, factors)
        if spread or bool(moved.any()):
            layers_of = (pair.maker, *pair.readers)
            changed[program.origins[pair.read.name].address] = tuple(program.origins[node.name].address for node in layers_of)
    return replace(program, tensors=tensors), changed


def _pairs(program: Program, layers: Collection[str]) -> list[Pair]:
    found = []
    for node in program.graph.nodes:
        if weight_of(program, node) is None or program.origins[node.name].address not in layers:
            continue
        norm, relus, others, at = None, 0, 0, node
        while len(at.users) == 1:
            user = next(iter(at.users))
            if user.op != "call_function" or weight_of(program, user) is not None or not _passes(user, at, node):
                break
            if family(user) == "batch_norm":
                if user.args[5] is not False:
                    break
                norm = user
            relus += family(user) == "relu"
            others += family(user) not in IDENTITY | {"relu", "batch_norm"}
            at = user
        readers = tuple(at.users)
        if readers and all(_reads(program, user, at, layers) for user in readers):
            found.append(Pair(node, norm, at, readers, bool(relus) and not others))
    return found


def _passes(user: fx.Node, at: fx.Node, maker: fx.Node) -> bool:
    """True if an operation scales its output where its input is scaled, channel by channel, and keeps channels in their place."""
    name, values = family(user), user.meta.get("val")
    if not isinstance(values, Tensor) or argument(user, 0) is not at:
        return False
    if name == "batch_norm":
        return at is maker
    if family(maker) == "linear":
        return name in ("relu", "leaky_relu") or name in IDENTITY
    if name in PADS:
        return is_zero_pad(user) and len(argument(user, 1)) <= 2 * (values.dim() - 2)
    if name in _TO_ROWS:  # one number for each channel, or still a picture of them
        before, after = shape_of(at), shape_of(user)
        if name == "mean":
            dims = [d % len(before) for d in argument(user, 1) or range(len(before))]
            return len(before) > 2 and min(dims) > 1
        alone = math.prod(before[2:]) == 1 or name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d")
        return alone and len(before) > 2 and after[:2] == before[:2] and math.prod(after[2:]) <= math.prod(before[2:])
    return name in _HOMOGENEOUS


def _reads(program: Program, user: fx.Node, at: fx.Node, layers: Collection[str]) -> bool:
    """True if a layer reads the channels of an activation as its own inputs."""
    if weight_of(program, user) is None or argument(user, 0) is not at or program.origins[user.name].address not in layers:
        return False
    shape = tuple(program.tensors[str(weight_of(program, user))].shape)
    channels = shape_of(at)[-1 if family(user) == "linear" else 1]
    if family(user) == "linear":
        return shape[1] == channels
    groups = argument(user, 6, 1)
    return groups == 1 or (groups == channels == shape[0] and shape[1] == 1)


def _own(program: Program, pair: Pair, readers: Mapping[int, Sequence[Any]]) -> bool:
    """True if nothing else reads what would be changed."""
    touched = [*pair.maker.args[1:3], *(() if pair.norm is None else pair.norm.args[1:5]), *(r.args[1] for r in pair.readers)]
    named = [program.tensors[program.names[a.name]] for a in touched if isinstance(a, fx.Node)]
    alone = all(len(readers.get(id(tensor), ())) == 1 for tensor in named)
    scales = pair.norm is None or all(isinstance(a, fx.Node) for a in pair.norm.args[1:3])
    rows = {family(r) == "linear" for r in pair.readers}
    # a picture's channels are its second axis, those of rows and sequences the last: one of the two must be meant on both sides
    same = rows == {family(pair.maker) == "linear"} or (rows == {True} and len(shape_of(pair.read)) == 2)
    return alone and scales and same


@dataclass
class _Channels:
    """What was seen of each channel of an activation, float64 ``[C]``."""

    most: Tensor
    least: Tensor
    total: Tensor
    squares: Tensor
    count: int

    def deviation(self) -> Tensor:
        """Standard deviation."""
        return (self.squares / self.count - (self.total / self.count).square()).clamp_min(0.0).sqrt()

    def rarely(self) -> Tensor:
        """What a channel hardly ever exceeds."""
        return self.total / self.count + RARE * self.deviation()

    def always(self) -> Tensor:
        """What a channel exceeds, nearly always: section 4.1.3's mean less three standard deviations, and never more than was seen."""
        return torch.minimum(self.least, self.total / self.count - DEVIATIONS * self.deviation()).clamp_min(0.0)


def _reach(pair: Pair, seen: Mapping[str, _Channels]) -> Tensor:
    """How far each channel may go, ``[C]``: as far as was seen, and as a channel with its mean and deviation does now and then; before a
    ReLU, too, so that one which is seldom above zero is not taken for one that is always small."""
    read, before = seen[pair.read.name], seen[pair.made.name]
    found = torch.maximum(read.most, read.rarely())
    if pair.clipped:
        found = torch.maximum(found, torch.maximum(before.rarely(), before.deviation()))
    return torch.where(read.most > 0, found, torch.zeros_like(found))


def _seen(program: Program, pairs: Sequence[Pair], calls: Sequence[Call]) -> dict[str, _Channels]:
    """What the calibration data show of what the readers of each pair read."""
    wanted = {pair.made.name: -1 if family(pair.maker) == "linear" else 1 for pair in pairs}
    wanted |= {pair.read.name: -1 if family(pair.readers[0]) == "linear" else 1 for pair in pairs}
    found: dict[str, _Channels] = {}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name not in wanted or not value.numel():
            return value
        lines = value.movedim(wanted[node.name], 0).flatten(1)
        low, high = (x.double() for x in torch.aminmax(lines, dim=1))
        one = _Channels(torch.maximum(high, -low), low, lines.sum(1).double(), lines.square().sum(1).double(), lines.shape[1])
        old = found.get(node.name)
        found[node.name] = (
            one
            if old is None
            else _Channels(
                torch.maximum(old.most, one.most),
                torch.minimum(old.least, one.least),
                old.total + one.total,
                old.squares + one.squares,
                old.count + one.count,
            )
        )
        return value

    tensors = channels_last(program)
    with torch.no_grad():
        for before, _, inputs in in_slices(program, calls, taken_whole(program, calls, {})):
            if before >= SAMPLES and all(channels.count >= ENOUGH for channels in found.values()):
                break
            interpret(program, program.graph, tensors, inputs, visit)
    return found


def _divide(program: Program, tensors: dict[str, Tensor], pair: Pair, factors: Tensor) -> None:
    """Divides what the maker gives by the factors, and multiplies the readers' weights by them."""
    for argument_ in pair.made.args[1:3]:
        if isinstance(argument_, fx.Node):
            _scale(tensors, program.names[argument_.name], 1 / factors, 0)
    for reader in pair.readers:
        name = str(weight_of(program, reader))
        _scale(tensors, name, factors, 0 if _depthwise(reader) else 1)


def _depthwise(reader: fx.Node) -> bool:
    return family(reader) in CONVOLUTIONS and argument(reader, 6, 1) > 1


def _scale(tensors: dict[str, Tensor], name: str, factors: Tensor, axis: int) -> None:
    value = tensors[name].detach()
    shape = [1] * value.dim()
    shape[axis] = -1
    tensors[name] = (value.double() * factors.reshape(shape)).to(value.dtype)


def _absorb(program: Program, tensors: dict[str, Tensor], pair: Pair, amount: Tensor) -> Tensor:
    """Moves what each channel behind a ReLU always exceeds from the maker's bias to what the readers give; returns what was moved.

    Nothing is moved where zeros are padded to it, which would no longer be zeros, or where there is no place for it.
    """
    none = torch.zeros_like(amount)
    bias = argument(pair.made, 2)
    places = [_place(program, reader) for reader in pair.readers]
    if not pair.clipped or not bool(amount.max() > 0) or not isinstance(bias, fx.Node) or None in places:
        return none
    name = program.names[bias.name]
    tensors[name] = (tensors[name].detach().double() - amount).to(tensors[name].dtype)
    for reader, place in zip(pair.readers, places, strict=True):
        weight = tensors[str(weight_of(program, reader))].detach().double()
        weight = weight.flatten(2).sum(-1) if weight.dim() > 2 else weight
        moved = weight[:, 0] * amount if _depthwise(reader) else weight @ amount
        target, sign = place  # type: ignore[misc]
        tensors[target] = (tensors[target].detach().double() + sign * moved).to(tensors[target].dtype)
    return amount


def _place(program: Program, reader: fx.Node) -> tuple[str, float] | None:
    """The bias of a layer, or the running mean that is taken off its output, with the sign; None if it has neither, or pads zeros."""
    padding = argument(reader, 4, 0) if family(reader) in CONVOLUTIONS else 0
    if any(padding) if isinstance(padding, (list, tuple)) else bool(padding):
        return None
    held, sign = argument(reader, 2), 1.0
    if held is None and len(reader.users) == 1 and family(next(iter(reader.users))) == "batch_norm":
        held, sign = argument(next(iter(reader.users)), 3), -1.0
    if not isinstance(held, fx.Node) or held.name not in program.names or len(held.users) != 1:
        return None
    return program.names[held.name], sign
