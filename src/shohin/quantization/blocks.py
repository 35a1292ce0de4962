"""Blocks of a program: runs of operations that hand one value on, in which the rounding of several layers is chosen together.

What stands between two places through which all passes: a residual block, the attention or the feed-forward half of a transformer layer
(BRECQ, Li et al., 2021, arXiv 2102.05426, section 3.2 on why blocks, and not layers or the whole network).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, fx

from shohin.evidence.layers import LayerWeight
from shohin.program import Program

#: layers up to which blocks without branches are joined
TOGETHER = 3


@dataclass(frozen=True)
class Block:
    """Operations between two places through which all passes that rounding moves.

    Args:
        nodes: the operations that depend on a rounded weight, in the program's order.
        entry: what they read of the blocks before; None for the first block.
        targets: what later blocks or the model's outputs read of it, in floats.
        weights: of the layers in it, those that are rounded; first names.
        branches: whether a value is read beside a layer that stands between, as in a residual sum.
    """

    nodes: tuple[fx.Node, ...]
    entry: fx.Node | None
    targets: tuple[fx.Node, ...]
    weights: tuple[str, ...]
    branches: bool


def moved_nodes(program: Program, weights: Sequence[LayerWeight]) -> list[fx.Node]:
    """The operations whose values rounding these weights may move, in the program's order."""
    layers, found = {node for w in weights for node in w.nodes}, dict[fx.Node, None]()
    for node in program.graph.nodes:
        if node.op == "call_function" and (node.name in layers or any(n in found for n in node.all_input_nodes)):
            found[node] = None
    return list(found)


def find_blocks(program: Program, weights: Sequence[LayerWeight]) -> list[Block]:
    """The blocks in the program's order: every layer of these weights is in exactly one.

    A block ends where one tensor is all that later operations read of what rounding moves. Values that rounding does not move (masks,
    positions, embeddings) may pass by. Operations behind a block's last layer belong to it, as an activation does; neighbours without
    branches are joined while they hold no more than `TOGETHER` layers.
    """
    moved = moved_nodes(program, weights)
    layers = {node: w.name for w in weights for node in w.nodes}
    ends = _ends(moved, layers)
    blocks: list[Block] = []
    for start, stop in pairwise([0, *ends]):
        block = _block(moved, start, stop, layers)
        before = blocks[-1] if blocks else None
        if before is not None and not before.branches and not block.branches and _size(before, layers) + _size(block, layers) <= TOGETHER:
            blocks[-1] = _block(moved, start - len(before.nodes), stop, layers)
        else:
            blocks.append(block)
    return blocks


def _ends(moved: Sequence[fx.Node], layers: Collection[str]) -> list[int]:
    """Where blocks end, as counts of moved nodes: before the next layer at the last cut, and at the last node."""
    place = {node: i for i, node in enumerate(moved)}

    def last_read(node: fx.Node) -> int:
        return max((place[u] for u in node.users if u in place), default=-1)

    found: list[int] = []
    cut, reach, fresh = 0, -1, False  # the last cut, how far values before the node are read, whether a layer was seen since the last end
    for i, node in enumerate(moved):
        if node.name in layers:
            if fresh and cut:
                found.append(cut)
                cut, fresh = 0, False
            fresh = True
            source = node.args[0]
            if isinstance(source, fx.Node) and source not in place:
                reach = max(reach, last_read(source))  # a residual around the first layers
        last = last_read(node)
        if reach <= i < last and _is_float(node) and fresh:
            cut = i + 1
        reach = max(reach, last)
    return [*found, len(moved)]


def _block(moved: Sequence[fx.Node], start: int, stop: int, layers: dict[str, str]) -> Block:
    nodes = tuple(moved[start:stop])
    inside, every = set(nodes), set(moved)
    entries = [n for node in nodes for n in node.all_input_nodes if n in every and n not in inside]
    targets = tuple(
        node for node in nodes if _is_float(node) and any(u not in inside and (u in every or u.op == "output") for u in node.users)
    )
    if not targets:  # a model that gives back its decision: what that was made of
        targets = tuple(node for node in nodes if _is_float(node) and any(u in inside and not _is_float(u) for u in node.users))
    names = dict.fromkeys(layers[node.name] for node in nodes if node.name in layers)
    return Block(nodes, entries[0] if entries else None, targets, tuple(names), _branches(nodes, layers))


def _branches(nodes: Sequence[fx.Node], layers: Collection[str]) -> bool:
    """True if a layer stands beside a way around it: something that was made before it is read behind it by what is no layer's."""
    place = {node: i for i, node in enumerate(nodes)}
    for i, node in enumerate(nodes):
        if node.name in layers:
            source = node.args[0]
            around = [n for n in (*nodes[:i], source) if isinstance(n, fx.Node) and any(place.get(u, -1) > i for u in n.users)]
            if around:
                return True
    return False


def _size(block: Block, layers: Collection[str]) -> int:
    return sum(node.name in layers for node in block.nodes)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
