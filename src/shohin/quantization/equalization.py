"""Channels of one activation made alike, so that they share its scale fairly: the layer before takes the factor, the layers behind its inverse.

Cross-layer equalization and high-bias absorption (Nagel et al., "Data-Free Quantization", 1906.04721, sections 4.1.2 and 4.1.3). There ranges
of weights are made alike, whose scales are one for each output here; so it is the ranges of activations, on a few samples (Meller et
al., 1902.01917, section 4). Between the layers may lie what gives ``f(s x) = s f(x)`` for positive s, channel by channel; in floats nothing
changes but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
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
from shohin.quantization.observation import leading
from shohin.quantization.sites import IDENTITY, PADS, weight_of

#: a channel's factor is so much of its range: less than all leaves room for what these few samples did not show
POWER = 0.8
#: least range of a channel beside the largest
LEAST = 1e-4
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


def equalized(program: Program, layers: Collection[str], calls: Sequence[Call]) -> tuple[Program, tuple[str, ...]]:
    """The program with other values of its tensors, which computes the same, and the activations that were changed.

    Args:
        program: with its batch normalizations, whose factors are changed in the place of the weights'.
        layers: addresses of the layers that are going to compute on integers: both sides of an activation must be among them.
        calls: batches; the first samples are looked at.
    """
    pairs = [pair for pair in _pairs(program, layers) if _own(program, pair)]
    if not pairs:
        return program, ()
    seen = _seen(program, pairs, calls)
    tensors, changed = {name: t for name, t in program.tensors.items()}, []
    for pair in pairs:
        most, least = seen[pair.read.name]
        top = float(most.max())
        if not (top > 0 and math.isfinite(top)):
            continue
        most = most - _absorb(program, tensors, pair, least.clamp_min(0.0))
        top = float(most.max())
        factors = (most / top).clamp_min(LEAST) ** POWER
        if float(factors.max() / factors.min()) < SPREAD:
            continue
        _divide(program, tensors, pair, factors)
        changed.append(program.origins[pair.read.name].address)
    return replace(program, tensors=tensors), tuple(changed)


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
        amounts: Any = argument(user, 1)
        mode = argument(user, 2, "constant") if name == "pad" else "constant"
        return mode == "constant" and len(amounts) <= 2 * (values.dim() - 2) and not _value_of(user)
    if name in _TO_ROWS:  # one number for each channel, or still a picture of them
        before, after = shape_of(at), shape_of(user)
        alone = math.prod(before[2:]) == 1 or name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean")
        return alone and len(before) > 2 and after[:2] == before[:2] and math.prod(after[2:]) <= math.prod(before[2:])
    return name in _HOMOGENEOUS


def _value_of(pad: fx.Node) -> Any:
    value = argument(pad, 3 if family(pad) == "pad" else 2)
    return value if value is not None else pad.kwargs.get("value")


def _reads(program: Program, user: fx.Node, at: fx.Node, layers: Collection[str]) -> bool:
    """True if a layer reads the channels of an activation as its own inputs."""
    if weight_of(program, user) is None or argument(user, 0) is not at or program.origins[user.name].address not in layers:
        return False
    shape = tuple(program.tensors[str(weight_of(program, user))].shape)
    channels = shape_of(at)[-1 if family(user) == "linear" else 1]
    if family(user) == "linear":
        return len(shape_of(at)) == 2 or shape[1] == channels
    groups = argument(user, 6, 1)
    return groups == 1 or (groups == channels == shape[0] and shape[1] == 1)


def _own(program: Program, pair: Pair) -> bool:
    """True if nothing else reads what would be changed."""
    readers = tensor_readers(program)
    touched = [*pair.maker.args[1:3], *(() if pair.norm is None else pair.norm.args[1:5]), *(r.args[1] for r in pair.readers)]
    named = [program.tensors[program.names[a.name]] for a in touched if isinstance(a, fx.Node)]
    alone = all(len(readers.get(id(tensor), ())) == 1 for tensor in named)
    scales = pair.norm is None or all(isinstance(a, fx.Node) for a in pair.norm.args[1:3])
    channels = shape_of(pair.maker)[-1 if family(pair.maker) == "linear" else 1]
    kind = shape_of(pair.read)[-1 if family(pair.readers[0]) == "linear" else 1]
    return alone and scales and channels == kind and len({family(r) == "linear" for r in pair.readers}) == 1


def _seen(program: Program, pairs: Sequence[Pair], calls: Sequence[Call]) -> dict[str, tuple[Tensor, Tensor]]:
    """Largest magnitude and least value of each channel of what the readers of a pair read, float64 ``[C]``."""
    wanted = {pair.read.name: -1 if family(pair.readers[0]) == "linear" else 1 for pair in pairs}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in wanted:
            lines = value.movedim(wanted[node.name], 0).flatten(1).double()
            found[node.name] = lines.abs().amax(1), lines.amin(1)
        return value

    with torch.no_grad():
        interpret(program, program.graph, program.tensors, leading(program, calls)[0], visit)
    return found


def _divide(program: Program, tensors: dict[str, Tensor], pair: Pair, factors: Tensor) -> None:
    """Divides what the maker gives by the factors, and multiplies the readers' weights by them."""
    held = pair.maker.args[1:3] if pair.norm is None else pair.norm.args[1:3]
    for argument_ in held:
        if isinstance(argument_, fx.Node):
            _scale(tensors, program.names[argument_.name], 1 / factors, 0)
    for reader in pair.readers:
        name = str(weight_of(program, reader))
        _scale(tensors, name, factors, 0 if family(reader) in CONVOLUTIONS and argument(reader, 6, 1) > 1 else 1)


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
    bias = argument(pair.maker, 2) if pair.norm is None else argument(pair.norm, 2)
    places = [_place(program, reader) for reader in pair.readers]
    if not pair.clipped or not bool(amount.max() > 0) or not isinstance(bias, fx.Node) or None in places:
        return none
    name = program.names[bias.name]
    tensors[name] = (tensors[name].detach().double() - amount).to(tensors[name].dtype)
    for reader, place in zip(pair.readers, places, strict=True):
        weight = tensors[str(weight_of(program, reader))].detach().double().flatten(2).sum(-1) if family(reader) in CONVOLUTIONS else None
        weight = tensors[str(weight_of(program, reader))].detach().double() if weight is None else weight
        one_each = family(reader) in CONVOLUTIONS and argument(reader, 6, 1) > 1
        moved = weight[:, 0] * amount if one_each else weight @ amount
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
