"""The walk over a program that gives every tensor its labels, and the table of rules it uses."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.core import Array, Classes, Labels, compress, rigid
from shohin.program import Program, concrete, family, shape_of


@dataclass(frozen=True)
class Frozen:
    """Something that cannot be chosen, and why.

    Args:
        address: of the operation that prevents it.
        reason: one sentence part ("unknown operator", "output of the model").
        line: the user's source line, or "".
    """

    address: str
    reason: str
    line: str = ""


@dataclass(eq=False)
class Parameter:
    """A model tensor as an argument of a rule. Its axes get labels from the rules that use them.

    Args:
        planes: label arrays of the parameter's own rank; an element is removed if any plane's label is.
    """

    name: str
    shape: tuple[int, ...]
    planes: list[Array] = field(default_factory=list)


Rule = Callable[["Context", fx.Node, tuple[Any, ...]], Any]
RULES: dict[str, Rule] = {}

#: more elements than this and a parameter that is used as a plain tensor is frozen rather than labelled element by element
LARGEST_PLAIN = 1 << 22


def rule(*families: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operator families ("conv2d", "add"). A rule gets (context, node, evaluated arguments), where
    tensors are `Labels` or `Parameter`, and returns the labels of the node's value.
    """

    def register(function: Rule) -> Rule:
        for name in families:
            RULES[name] = function
        return function

    return register


class Context:
    """State of one walk: classes, the labels of every node, what was frozen, and notes for later."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.classes = Classes()
        self.frozen: list[tuple[Frozen, Array]] = []
        self.normalized: list[Array] = []
        self.parameters: dict[str, Parameter] = {}
        self.values: dict[fx.Node, Any] = {}

    def labels(self, value: Any) -> Labels:
        """Labels of an argument; a parameter used as a plain tensor gets one fresh label for each element."""
        if isinstance(value, Labels):
            data = self.classes.find(value.data)
            return compress(data, value.shape) if (data != value.data).any() else value
        if isinstance(value, Parameter):
            size = int(np.prod(value.shape))
            if size > LARGEST_PLAIN or self.program.tensors[value.name].dtype in (torch.int64, torch.int32, torch.bool):
                return rigid(value.shape)
            if value.planes:
                plane = value.planes[0]
            else:
                plane = self.classes.fresh(size).reshape(value.shape)
                value.planes.append(plane)
            return self.labels(Labels(plane, value.shape))
        return rigid(())

    def axis(self, parameter: Parameter, axis: int, labels: Array) -> None:
        """Says that index i of a parameter's axis is removed with ``labels[i]``."""
        shape = [1] * len(parameter.shape)
        shape[axis] = parameter.shape[axis]
        plane = labels.reshape(shape)
        for other in parameter.planes:
            if other.shape == plane.shape:
                self.classes.unite(other, plane)
                return
            if all(o > 1 or n == 1 for o, n in zip(other.shape, shape, strict=True)):  # element labels: unite, index by index
                self.classes.unite(other, plane)
                return
        parameter.planes.append(plane)

    def freeze(self, node: fx.Node, reason: str, *values: Any) -> None:
        """Freezes all labels of the values, noting the reason."""
        origin = self.program.origins.get(node.name)
        note = Frozen(origin.address if origin else node.name, reason, origin.line if origin else "")
        for value in values:
            data = value if isinstance(value, np.ndarray) else self.labels(value).data
            data = np.unique(self.classes.find(data))
            if data.any():
                self.frozen.append((note, data[data > 0]))
                self.classes.freeze(data)

    def merge(self, node: fx.Node, *values: Any) -> Labels:
        """Labels of an elementwise result: labels that meet are united; what an operand lacks along an axis it broadcasts.

        A coarser operand (a gate of one value per head, met by head x dim) is linked: its element goes when all it meets go.
        """
        operands = [self.labels(v) for v in values if isinstance(v, (Labels, Parameter))]
        shape = np.broadcast_shapes(*[o.shape for o in operands])
        rank = len(shape)
        aligned = []
        for o in operands:
            missing = rank - len(o.shape)
            data = o.data.reshape((1,) * missing + o.data.shape)
            own = tuple(d for d in range(rank) if d >= missing and o.shape[d - missing] > 1)
            aligned.append((data, own))
        finest = max(aligned, key=lambda item: (sum(n > 1 for n in item[0].shape), item[0].any()))
        result = finest[0]
        varying = {d for d, n in enumerate(result.shape) if n > 1}
        for data, own in aligned:
            if data is finest[0]:
                continue
            mine = {d for d, n in enumerate(data.shape) if n > 1}
            if not mine <= varying:
                self.freeze(node, "labels of two operands vary on different axes", data, result)
                return rigid(shape)
            here = varying & set(own)
            if not here:
                if data.any():
                    self.freeze(node, "a prunable axis meets one that it broadcasts over", data)
                continue
            if here == varying:
                self.classes.unite(data, result)
                continue
            axes = sorted(here)
            rest = [d for d in range(rank) if d not in axes]
            lines = result.transpose(axes + rest).reshape(int(np.prod([result.shape[d] for d in axes])), -1)
            coarse = np.broadcast_to(data, [result.shape[d] if d in here else 1 for d in range(rank)]).reshape(-1)
            self.classes.link(coarse, list(lines))
        return compress(self.classes.find(result), shape)


def propagate(program: Program) -> Context:
    """Walks the program once and gives every tensor its labels. Unknown operators freeze what they touch, by name and line."""
    import shohin.graph.labels.attention
    import shohin.graph.labels.contraction
    import shohin.graph.labels.elementwise
    import shohin.graph.labels.movement
    import shohin.graph.labels.normalization  # noqa: F401

    context = Context(program)
    given = dict(zip(program.inputs, program.example, strict=True))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in program.names:
                name = program.names[node.name]
                if name not in context.parameters:
                    context.parameters[name] = Parameter(name, tuple(program.tensors[name].shape))
                context.values[node] = _share(program, context, name)
            else:
                value = given[node.name]
                context.values[node] = rigid(tuple(value.shape)) if isinstance(value, torch.Tensor) else value
        elif node.op == "output":
            for out in node.args[0]:
                if isinstance(out, fx.Node):
                    context.freeze(node, "output of the model", *_tensors(context.values[out]))
        else:
            context.values[node] = _apply(context, node)
    context.classes.settle()
    return context


def _share(program: Program, context: Context, name: str) -> Parameter:
    """Tied tensors (two names, one tensor) share one Parameter."""
    tensor = program.tensors[name]
    for other, parameter in context.parameters.items():
        if program.tensors[other] is tensor:
            context.parameters[name] = parameter
            return parameter
    return context.parameters[name]


def _tensors(value: Any) -> list[Any]:
    if isinstance(value, (Labels, Parameter)):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    return []


def _apply(context: Context, node: fx.Node) -> Any:
    args = fx.map_arg(node.args, lambda n: context.values[n])
    name = family(node)
    if name == "sym_size":
        return _tensors(args)[0].shape[args[1]]
    if node.target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):  # arithmetic on sizes
        return concrete(node.meta["val"]) if "val" in node.meta else node.target(*args)  # type: ignore[operator]
    if name in RULES and not _tensors(list(node.kwargs.values())):
        result = RULES[name](context, node, args)
        if result is not NotImplemented:
            return result
    tensors = _tensors(list(args))
    if tensors:
        context.freeze(node, f"operator {node.target} has no rule", *tensors)
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return rigid(shape_of(node))
    return [rigid(tuple(concrete(s) for s in v.shape)) if isinstance(v, torch.Tensor) else v for v in val]
