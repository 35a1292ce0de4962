"""Channels mixed by an orthogonal matrix, so that none stands out: what layers write is turned, and turned back by those that read it.

QuaRot (Ashkboos et al. 2024, 2404.00456, sections 3 and 4) and SpinQuant (Liu et al. 2024, 2405.16406, section 3.1), with the rotations
that cost nothing in the file: of a residual stream between normalizations, and of the values in each head of attention. A normalization
by the root mean square commutes with every rotation once its gain has moved into the weights behind it; layer normalization does with
one that leaves the mean where it is (SliceGPT, Ashkboos et al. 2024, 2401.15024, section 3, makes it one by the root mean square
instead). Only values of tensors change, and the network computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from shohin.evidence.layers import tensor_readers
from shohin.program import Program, concrete, family, shape_of
from shohin.program.fold import CONVOLUTIONS
from shohin.program.nodes import argument, run
from shohin.quantization.sites import IDENTITY, table_of, weight_of

#: a weight with a larger share of zeros has been pruned; rotated it would have none
ZEROS = 0.05
#: least gain of a layer normalization beside its largest
SMALLEST = 1e-2
#: fewest channels that are worth mixing
LEAST = 8

_CASTS = ("to", "_to_copy", "float", "type_as")
_NORMS = frozenset(("layer_norm", "rms_norm"))
_MOVES = IDENTITY | frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "unsqueeze", "squeeze", "slice", "select", "expand"),
        *("repeat", "repeat_interleave", "cat", "mean", *_CASTS),
    )
)


Use = tuple[fx.Node, fx.Node]
"""An operation, and the placeholder of a tensor that it reads."""


@dataclass(frozen=True)
class Turn:
    """An axis of a tensor along which the channels of a stream lie, one block of all channels after the other.

    Args:
        gain: name of what the channels are multiplied by before they meet this tensor, which it takes; None for nothing.
    """

    name: str
    axis: int
    gain: str | None = None


@dataclass(frozen=True)
class Norm:
    """What scales the channels of a stream before layers read them.

    Args:
        gain, shift: names, or None.
        readers: the layers.
    """

    gain: str | None
    shift: str | None
    readers: tuple[fx.Node, ...]


@dataclass
class Stream:
    """Activations that hold the same channels: everything that writes them and reads them can take a rotation.

    Args:
        size: channels.
        centred: a layer normalization reads them, which takes off the mean.
        turns: what takes the rotation -> operation and placeholder of each of its uses.
        norms: what scales the channels on their way to layers.
        scaled: the normalization and the placeholder of each gain and shift.
        layers: addresses.
    """

    size: int
    centred: bool = False
    turns: dict[Turn, set[Use]] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)
    scaled: set[Use] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)


class _Fixed(Exception):
    """Something holds the channels as they are."""


@dataclass(frozen=True)
class Rotated:
    """A program with rotated channels.

    Args:
        layers: addresses of what writes and reads them.
        untied: names of the tables of embeddings that were the weights of layers, too, and are tensors of their own now.
    """

    program: Program
    layers: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()


def rotated(program: Program, layers: Collection[str], seed: int = 0) -> Rotated:
    """The program with other values of its tensors, which computes the same.

    A table of an embedding that is also the weight of a layer becomes two tensors, where the model knows it by two names.

    Args:
        layers: addresses of those that will be rounded; streams that none of them touches stay as they are.
        seed: of the signs of the rotations.
    """
    apart, names = _untied(program)
    found = _chosen(apart, layers)
    if not {turn.name for stream in found for turn in stream.turns} & set(names):
        apart, names, found = program, (), _chosen(program, layers)
    for i, stream in enumerate(found):
        apart = replace(apart, tensors=_turned(apart, stream, rotation(stream.size, seed + i, centred=stream.centred)))
    return Rotated(apart, tuple(sorted(set().union(*(stream.layers for stream in found)))), names)


def rotation(size: int, seed: int, *, centred: bool = False) -> Tensor:
    """An orthogonal matrix that spreads every channel over all, float64 ``[size, size]``.

    A Hadamard matrix of the largest power of two in ``size``, times (Kronecker) the discrete Hartley transform of what is left, so that no
    entry exceeds ``sqrt(2 / size)``; with random signs. ``centred``: one that leaves the mean of the channels where it is.
    """
    chance = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=chance).double() * 2 - 1
    matrix = _transform(size)
    if not centred:
        return signs[:, None] * matrix
    signs[0] = 1.0  # the transform's first column is the mean
    return matrix @ (signs[:, None] * matrix)


def _transform(size: int) -> Tensor:
    """Symmetric and orthogonal."""
    two = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < two:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    rest = torch.arange(size // two, dtype=torch.float64)
    angles = 2 * math.pi * torch.outer(rest, rest) / len(rest)
    return torch.kron(hadamard, angles.cos() + angles.sin()) / math.sqrt(size)


def _streams(program: Program) -> list[Stream]:
    readers = tensor_readers(program)
    found, seen = [], set[tuple[fx.Node, int]]()
    for node, size in _seeds(program):
        if (node, size) in seen or size < LEAST:
            continue
        stream = Stream(size)
        places: dict[fx.Node, int] = {}
        try:
            _follow(program, stream, node, places)
            _check(program, stream, readers)
        except _Fixed:
            continue
        finally:
            seen |= {(other, size) for other in places}
        found.append(stream)
    return found


def _seeds(program: Program) -> list[tuple[fx.Node, int]]:
    """Activations that may hold the channels of a stream in their last axis: what is normalized, and what attention gives."""
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = family(node)
        if name in _NORMS or (name == "pow" and _squared(node)):
            found.append(argument(node, 0))
        elif name == "scaled_dot_product_attention" or (name == "matmul" and _weighted(node)):
            found.append(node)
    return [(node, shape_of(node)[-1]) for node in found if shape_of(node)]


def _weighted(node: fx.Node) -> bool:
    """True for a product with what softmax gives."""
    source: Any = argument(node, 0)
    while source.op == "call_function" and family(source) in (*IDENTITY, *_CASTS):
        source = source.args[0]
    return source.op == "call_function" and family(source) in ("softmax", "_softmax")


def _squared(node: fx.Node) -> bool:
    """True for squares of which nothing but the mean over the last axis is taken: no rotation changes that."""
    value = argument(node, 0)
    if argument(node, 1) != 2 or not isinstance(value, fx.Node) or not node.users:
        return False
    last = {-1, len(shape_of(value)) - 1}
    return all(
        family(user) in ("mean", "sum") and len(argument(user, 1) or ()) == 1 and argument(user, 1)[0] in last for user in node.users
    )


def _follow(program: Program, stream: Stream, seed: fx.Node, places: dict[fx.Node, int]) -> None:
    """Fills a stream with all that holds its channels: ``places`` says in which axis.

    Raises:
        _Fixed: if some of it cannot be rotated.
    """
    waiting = [(seed, len(shape_of(seed)) - 1)]
    while waiting:
        node, axis = waiting.pop()
        if node in places:
            if places[node] != axis:
                raise _Fixed
            continue
        if shape_of(node)[axis] % stream.size:
            raise _Fixed
        places[node] = axis
        waiting.extend(_made_of(program, stream, node, axis))
        for user in node.users:
            waiting.extend(_read_by(program, stream, user, node, axis))


def _made_of(program: Program, stream: Stream, node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
    """What holds the channels that a node gives."""
    if node.op == "placeholder":
        if node.name not in program.names:
            raise _Fixed  # the caller's
        stream.turns.setdefault(Turn(_changeable(program, node), axis), set()).update((user, node) for user in node.users)
        return []
    if node.op != "call_function":
        raise _Fixed
    name, last = family(node), len(shape_of(node)) - 1
    if weight_of(program, node) is not None and axis == (1 if name in CONVOLUTIONS else last) and argument(node, 6, 1) == 1:
        for place in (1, 2):
            _take(program, stream, node, argument(node, place), 0)
        return []
    if table_of(program, node) is not None and axis == last:
        _take(program, stream, node, argument(node, 0), 1)
        return []
    if name in ("scaled_dot_product_attention", "matmul") and axis == last:
        source = argument(node, 2 if name != "matmul" else 1)
        return [(source, len(shape_of(source)) - 1)]
    if name in ("add", "sub", "mul", "div"):
        return _operands(node, axis, name in ("mul", "div"))
    if name in _MOVES:
        sources = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
        for before in range(len(shape_of(sources[0]))):
            if _moved(node, before, stream.size) == axis:
                return [(source, before) for source in sources]
    raise _Fixed


def _read_by(program: Program, stream: Stream, user: fx.Node, node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
    """What holds the channels that an operation reads."""
    if user.op != "call_function":
        raise _Fixed  # the model gives it back
    name, last = family(user), len(shape_of(node)) - 1
    if _reads(program, user, node, axis):
        _take(program, stream, user, argument(user, 1), 1)
        return []
    if name in _NORMS and node is argument(user, 0):
        if axis != last or list(argument(user, 1)) != [stream.size] or shape_of(node)[axis] != stream.size:
            raise _Fixed
        stream.centred |= name == "layer_norm"
        _behind(program, stream, user, axis, argument(user, 2), argument(user, 3) if name == "layer_norm" else None)
        return []
    if name == "pow" and _squared(user) and axis == last and shape_of(node)[axis] == stream.size:
        return []
    if name == "mul" and (gain := _gain(program, user, node)) is not None and axis == last and shape_of(node)[axis] == stream.size:
        _behind(program, stream, user, axis, gain, None)
        return []
    if name == "scaled_dot_product_attention" and [argument(user, i) is node for i in range(4)] == [False, False, True, False]:
        if axis != last:
            raise _Fixed
        return [(user, len(shape_of(user)) - 1)]
    if name == "matmul" and argument(user, 1) is node and argument(user, 0) is not node and axis == last:
        return [(user, len(shape_of(user)) - 1)]
    if name in ("add", "sub", "mul", "div"):
        after = axis + len(shape_of(user)) - len(shape_of(node))
        return [(user, after)]  # what it is made of is looked at from there
    if name in _MOVES and (moved := _moved(user, axis, stream.size)) is not None:
        return [(user, moved)]
    raise _Fixed


def _behind(program: Program, stream: Stream, norm: fx.Node, axis: int, gain: Any, shift: Any) -> None:
    """Adds what reads a normalization: layers alone, at most behind what moves data."""
    readers, waiting = [], [(norm, axis)]
    while waiting:
        node, at = waiting.pop()
        for user in node.users:
            if user.op != "call_function":
                raise _Fixed
            if _reads(program, user, node, at):
                readers.append(user)
            elif family(user) in _MOVES - {"cat"} and (moved := _moved(user, at, stream.size)) is not None:
                waiting.append((user, moved))
            else:
                raise _Fixed
    names = [None if held is None else _changeable(program, held) for held in (gain, shift)]
    stream.scaled |= {(norm, held) for held in (gain, shift) if held is not None}
    for reader in readers:
        _take(program, stream, reader, argument(reader, 1), 1, names[0])
    stream.norms.append(Norm(names[0], names[1], tuple(readers)))


def _gain(program: Program, user: fx.Node, node: fx.Node) -> fx.Node | None:
    """The vector of the model that a product multiplies the last axis of ``node`` with."""
    others = [a for a in user.args[:2] if a is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0].name not in program.names:
        return None
    return others[0] if shape_of(others[0]) == shape_of(node)[-1:] else None


def _reads(program: Program, user: fx.Node, node: fx.Node, axis: int) -> bool:
    """True for a layer that contracts over the channels."""
    if weight_of(program, user) is None or argument(user, 0) is not node:
        return False
    return axis == (1 if family(user) in CONVOLUTIONS else len(shape_of(node)) - 1) and argument(user, 6, 1) == 1


def _take(program: Program, stream: Stream, node: fx.Node, held: Any, axis: int, gain: str | None = None) -> None:
    if held is None:
        return
    name = _changeable(program, held)
    if program.tensors[name].shape[axis] % stream.size:
        raise _Fixed
    stream.turns.setdefault(Turn(name, axis, gain), set()).add((node, held))
    stream.layers.add(program.origins[node.name].address)


def _changeable(program: Program, held: Any) -> str:
    """The name of a parameter. Buffers may be absent from checkpoints, and constants have no place in the user's class: both stay."""
    if not isinstance(held, fx.Node) or program.names.get(held.name) not in program.trainable:
        raise _Fixed
    return program.names[held.name]


def _operands(node: fx.Node, axis: int, factor: bool) -> list[tuple[fx.Node, int]]:
    """The operands that hold the channels; a factor that is the same for all of them may stand beside."""
    found, rank = [], len(shape_of(node))
    for held in node.args[:2]:
        shape = shape_of(held) if isinstance(held, fx.Node) and isinstance(held.meta.get("val"), Tensor) else ()
        at = axis - (rank - len(shape))
        if at >= 0 and shape[at] == shape_of(node)[axis]:
            found.append((held, at))
        elif not factor:
            raise _Fixed
    if factor and (len(found) != 1 or (family(node) == "div" and found[0][0] is not node.args[0])):
        raise _Fixed
    return found  # type: ignore[return-value]


def _moved(node: fx.Node, axis: int, size: int) -> int | None:
    """The axis in which an operation puts the channels of this axis of its inputs, in blocks as they were; None if it does not.

    The operation itself runs on the channels' numbers, which tells where they went.
    """

    if family(node) in _CASTS:
        return axis if node.meta["val"].dtype.is_floating_point else None

    def numbers(source: fx.Node) -> Any:
        value = source.meta.get("val")
        if not isinstance(value, Tensor):
            return concrete(value)
        shape = shape_of(source)
        if axis >= len(shape) or shape[axis] % size:
            raise _Fixed
        return _laid(torch.arange(shape[axis], dtype=torch.float32) % size, axis, len(shape)).expand(shape)

    try:
        found = run(node, fx.map_arg(node.args, numbers), fx.map_arg(node.kwargs, numbers))
    except _Fixed:
        return None
    for after, count in enumerate(found.shape):
        if count % size:
            continue
        moved, wanted = found.movedim(after, -1), torch.arange(count, dtype=torch.float32) % size
        first = moved[(0,) * (found.dim() - 1)]  # looked at alone before all others
        if all(bool((part.round() == wanted).all()) for part in (first, moved)):
            return after
    return None


def _check(program: Program, stream: Stream, readers: dict[int, list[Use]]) -> None:
    """Raises _Fixed if something else reads a tensor of the stream, or two operations read the same axis in two ways."""
    gains: dict[tuple[int, int], set[str | None]] = {}
    uses: dict[tuple[int, int], set[Use]] = {}
    for turn, used in stream.turns.items():
        key = (id(program.tensors[turn.name]), turn.axis)
        gains.setdefault(key, set()).add(turn.gain)
        uses.setdefault(key, set()).update(used)
    held = {id(program.tensors[name]) for norm in stream.norms for name in (norm.gain, norm.shift) if name is not None}
    if any(len(found) > 1 for found in gains.values()) or held & {key for key, _ in uses}:
        raise _Fixed
    if any(set(readers[key]) != used for (key, _), used in uses.items()) or any(not set(readers[key]) <= stream.scaled for key in held):
        raise _Fixed
    if not any(program.tensors[turn.name].dim() > 1 for turn in stream.turns):
        raise _Fixed


def _chosen(program: Program, layers: Collection[str]) -> list[Stream]:
    return [s for s in _streams(program) if s.layers & set(layers) and not _pruned(program, s) and not _silenced(program, s)]


def _pruned(program: Program, stream: Stream) -> bool:
    weights = [program.tensors[turn.name] for turn in stream.turns]
    return any(float((w == 0).float().mean()) > ZEROS for w in weights if w.dim() > 1)


def _silenced(program: Program, stream: Stream) -> bool:
    """True if a gain is so small that a shift behind it cannot be had from before it."""
    gains = [program.tensors[norm.gain].detach().abs() for norm in stream.norms if norm.gain is not None and norm.shift is not None]
    return any(not float(gain.min()) > SMALLEST * float(gain.max()) for gain in gains)


def _turned(program: Program, stream: Stream, matrix: Tensor) -> dict[str, Tensor]:
    """All tensors, those of a stream in its rotated channels; tied ones stay tied."""
    tensors = dict(program.tensors)
    changed: dict[int, Tensor] = {}
    for turn in {
        (id(tensors[turn.name]), turn.axis): turn for turn in stream.turns
    }.values():  # both axes of a weight that writes what it reads
        key = id(tensors[turn.name])
        changed[key] = _along(_gained(changed.get(key, tensors[turn.name].detach().double()), turn, tensors), turn.axis, matrix)
    for norm in stream.norms:
        gain = None if norm.gain is None else tensors[norm.gain].detach().double()
        if norm.gain is not None:
            changed[id(tensors[norm.gain])] = torch.ones_like(tensors[norm.gain])
        if norm.shift is not None:
            shift = tensors[norm.shift].detach().double()
            changed[id(tensors[norm.shift])] = _along(shift if gain is None else shift / gain, 0, matrix)
    kept = {id(t): changed[id(t)].to(t.dtype) for t in tensors.values() if id(t) in changed}
    return {name: kept.get(id(t), t) for name, t in tensors.items()}


def _gained(value: Tensor, turn: Turn, tensors: dict[str, Tensor]) -> Tensor:
    if turn.gain is None:
        return value
    return value * _laid(
        tensors[turn.gain].detach().double().repeat(value.shape[turn.axis] // len(tensors[turn.gain])), turn.axis, value.dim()
    )


def _laid(line: Tensor, axis: int, rank: int) -> Tensor:
    """A vector along one axis of a tensor."""
    return line.reshape([-1 if i == axis else 1 for i in range(rank)])


def _along(value: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Every block of channels of an axis times the matrix."""
    moved = value.movedim(axis, -1)
    return (torch.unflatten(moved, -1, (-1, len(matrix))) @ matrix.to(value.device)).flatten(-2).movedim(-1, axis)


def _untied(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program whose embeddings read tensors of their own, where the model knows them by a name of their own; and these names."""
    places = {name: node for node, name in program.names.items()}
    own: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (name := table_of(program, node)) is not None:
            mine = f"{program.origins[node.name].module}.weight".lstrip(".")
            others = [user for user in node.args[0].users if table_of(program, user) is None]
            if mine != name and others and mine in places and program.tensors[mine] is program.tensors[name]:
                own[node.name] = mine
    if not own:
        return program, ()
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    named = {node.name: node for node in graph.nodes}
    for node, mine in own.items():
        named[node].update_arg(0, named[places[mine]])
    tensors = {**program.tensors, **{name: program.tensors[name].detach().clone() for name in own.values()}}
    return replace(program, graph=graph, tensors=tensors), tuple(own.values())
