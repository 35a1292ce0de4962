"""The weights that layers multiply with: which they are, and which layers read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from shohin.evidence.rows import Window
from shohin.program import Program, family
from shohin.program.fold import CONVOLUTIONS
from shohin.program.nodes import argument


@dataclass(frozen=True)
class LayerWeight:
    """One weight that only linear layers, or only convolutions, read.

    Args:
        name: of the tensor; of tied ones the first.
        names: all of its names.
        nodes: the operations that multiply with it, in the program's order.
        kind: what they are. A depthwise convolution has one input channel for each output.
        shape: ``[O, I / groups, *kernel]``.
        groups: of the convolution.
    """

    name: str
    names: tuple[str, ...]
    nodes: tuple[str, ...]
    kind: Literal["linear", "convolution", "depthwise"]
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def feature_axis(self) -> int:
        """The axis of the layers' outputs that holds the features."""
        return -1 if self.kind == "linear" else 1 - len(self.shape)


def window_of(node: fx.Node, shape: tuple[int, ...]) -> Window | None:
    """The geometry of a convolution with a weight of this shape; None for a linear layer."""
    if family(node) not in CONVOLUTIONS:
        return None
    stride, padding, dilation, groups = (argument(node, i, d) for i, d in ((3, 1), (4, 0), (5, 1), (6, 1)))
    return Window(tuple(shape[2:]), stride, padding, dilation, int(groups))


def tensor_readers(program: Program) -> dict[int, list[tuple[fx.Node, fx.Node]]]:
    """``id`` of each tensor of the model -> the operations that read it, each with the placeholder that it reads; tied ones together."""
    readers: dict[int, list[tuple[fx.Node, fx.Node]]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.names:
            readers.setdefault(id(program.tensors[program.names[node.name]]), []).extend((user, node) for user in node.users)
    return readers


def layer_weights(program: Program) -> tuple[list[LayerWeight], dict[str, str]]:
    """Every weight that layers of one kind read, in the program's order; and name -> why not, of other parameters with two dimensions or more."""
    readers = tensor_readers(program)
    names: dict[int, list[str]] = {}
    for name, tensor in program.tensors.items():
        if name in program.trainable and tensor.dim() > 1 and tensor.is_floating_point():
            names.setdefault(id(tensor), []).append(name)
    found, others = [], {}
    for key, aliases in names.items():
        shape = tuple(program.tensors[aliases[0]].shape)
        why = _reason(readers.get(key, []))
        if why:
            others[aliases[0]] = why
        else:
            nodes = [user for user, _ in readers[key]]
            groups = {int(argument(n, 6, 1)) if family(n) in CONVOLUTIONS else 1 for n in nodes}
            if len(groups) > 1:
                others[aliases[0]] = "convolutions with other numbers of groups share it"
                continue
            kind: Literal["linear", "convolution", "depthwise"] = "convolution" if family(nodes[0]) in CONVOLUTIONS else "linear"
            if kind == "convolution" and shape[1] == 1 and groups != {1}:
                kind = "depthwise"
            found.append(LayerWeight(aliases[0], tuple(aliases), tuple(n.name for n in nodes), kind, shape, groups.pop()))
    order = {n.name: i for i, n in enumerate(program.graph.nodes)}
    return sorted(found, key=lambda w: order[w.nodes[0]]), others


def _reason(readers: list[tuple[fx.Node, fx.Node]]) -> str:
    """Why a weight with these readers is none of a layer, or ""."""
    if not readers:
        return "nothing reads it"
    for user, weight in readers:
        if family(user) not in (*CONVOLUTIONS, "linear") or argument(user, 1) is not weight or user.args.count(weight) > 1:
            return f"{family(user)} reads it, which is neither a convolution nor a linear layer"
    if len({family(user) for user, _ in readers}) > 1:
        return "layers of several kinds share it"
    return ""
