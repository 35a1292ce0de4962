"""The walk over a program that gives every tensor its labels, and the table of rules it uses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from shohin.graph.labels.core import Array, Classes, Labels, compress, rigid
from shohin.program import Program, concrete, family, shape_of
from shohin.program.nodes import arguments, flatten, run


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
        plain: the only plane, once the parameter has been used as a plain tensor: no other may join it.
    """

    name: str
    shape: tuple[int, ...]
    planes: list[Array] = field(default_factory=list)
    plain: Array | None = None


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
    """State of one walk: classes, the value of every node, what was frozen, and notes for later.

    The value of a node is `Labels`, a `Parameter`, a tensor of integers that is known (a constant index), a number, or a
    tuple of these.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.classes = Classes()
        self.frozen: list[tuple[Frozen, Array]] = []
        self.normalized: list[Array] = []
        self.produced: set[tuple[str, int]] = set()
        self.parameters: dict[str, Parameter] = {}
        self.values: dict[fx.Node, Any] = {}

    def labels(self, value: Any) -> Labels:
        """Labels of an argument; a parameter used as a plain tensor gets one fresh label for each element."""
        if isinstance(value, Labels):
            data = self.classes.find(value.data)
            return compress(data, value.shape) if (data != value.data).any() else value
        if isinstance(value, Parameter):
            if value.plain is None:
                value.plain = self._plain(value)
            return self.labels(Labels(value.plain, value.shape))
        return rigid(tuple(value.shape)) if isinstance(value, torch.Tensor) else rigid(())

    def _plain(self, parameter: Parameter) -> Array:
        """The one plane of a parameter that is used as a plain tensor."""
        size = int(np.prod(parameter.shape))
        if len(parameter.planes) == 1:
            return parameter.planes[0]
        if not parameter.planes and 1 < size <= LARGEST_PLAIN:
            parameter.planes.append(self.classes.fresh(size).reshape(parameter.shape))
            return parameter.planes[0]
        for plane in parameter.planes:
            self._note(Frozen(parameter.name, "used whole and by its axes at once"), plane)
        return np.zeros((1,) * len(parameter.shape), np.int64)

    def _note(self, note: Frozen, labels: Array) -> None:
        data = np.unique(self.classes.find(labels))
        if data.any():
            self.frozen.append((note, data[data > 0]))
            self.classes.freeze(data)

    def vector(self, value: Any, labels: Array) -> None:
        """Says that index i of a bias, a scale or a statistic is removed with ``labels[i]``; computed ones are united."""
        if isinstance(value, Parameter):
            self.axis(value, 0, labels)
        elif isinstance(value, (Labels, torch.Tensor)):
            self.classes.unite(self.labels(value).data.reshape(-1), labels)

    def axis(self, parameter: Parameter, axis: int, labels: Array) -> None:
        """Says that index i of a parameter's axis is removed with ``labels[i]``."""
        if parameter.shape[axis] == 1:
            return  # the only index never goes
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
        if parameter.plain is not None:
            self._note(Frozen(parameter.name, "used whole and by its axes at once"), plane)
            return
        parameter.planes.append(plane)

    def fixed(self, parameter: Parameter, axis: int) -> None:
        """Says that a use of the parameter needs the whole axis: other uses may not shrink it."""
        self.axis(parameter, axis, np.zeros(parameter.shape[axis], np.int64))

    def collapse(self, x: Labels, axes: Iterable[int]) -> Labels:
        """Unites labels that differ only along ``axes``: an operator mixes or treats alike what lies there."""
        for axis in set(axes) & set(x.varying):
            self.classes.unite(x.data, x.data.take([0], axis))
            x = self.labels(x)
        return x

    def freeze(self, node: fx.Node, reason: str, *values: Any) -> None:
        """Freezes all labels of the values, noting the reason."""
        origin = self.program.origins.get(node.name)
        note = Frozen(origin.address if origin else node.name, reason, origin.line if origin else "")
        for value in values:
            self._note(note, value if isinstance(value, np.ndarray) else self.labels(value).data)

    def merge(self, node: fx.Node, *values: Any) -> Labels:
        """Labels of an elementwise result: labels that meet are united; what an operand lacks along an axis it broadcasts.

        A coarser operand (a gate of one value per head, met by head x dim) is linked: its element goes when all it meets go.
        """
        operands = [self.labels(v) for v in values if isinstance(v, (Labels, Parameter, torch.Tensor))]
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
                tensor = program.tensors[name].detach()
                context.values[node] = _share(program, context, name) if tensor.is_floating_point() else tensor.cpu()
            else:
                value = given[node.name]
                context.values[node] = rigid(tuple(value.shape)) if isinstance(value, torch.Tensor) else value
        elif node.op == "output":
            for out in arguments(node)[0]:
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
    return [v for v in flatten(value) if isinstance(v, (Labels, Parameter, torch.Tensor))]


def _apply(context: Context, node: fx.Node) -> Any:
    args: Any = fx.map_arg(node.args, lambda n: context.values[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: context.values[n])
    name, val = family(node), node.meta.get("val")
    tensors = _tensors([*args, *kwargs.values()])
    if name == "sym_size":
        return tensors[0].shape[args[1]]
    if node.target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(val, (torch.Tensor, tuple, list)):  # arithmetic on sizes, or a number read off a tensor
        context.freeze(node, f"operator {node.target} has no rule", *tensors)
        return concrete(val) if val is not None else run(node, args, kwargs)
    if isinstance(val, torch.Tensor) and all(isinstance(t, torch.Tensor) for t in tensors):
        known = _constant(node, val, args, kwargs)
        if known is not None:
            return known
    reason = "does not follow prunable axes here" if name in RULES else "has no rule"
    if name in RULES and not _tensors(list(kwargs.values())):
        try:
            result = RULES[name](context, node, args)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            result, reason = NotImplemented, f"is called in a way that its rule does not know ({type(error).__name__}: {error})"
        if result is not NotImplemented:
            return result
    context.freeze(node, f"operator {node.target} {reason}", *tensors)
    if isinstance(val, torch.Tensor):
        return rigid(shape_of(node))
    return [rigid(tuple(concrete(s) for s in v.shape)) if isinstance(v, torch.Tensor) else v for v in val]


def _constant(node: fx.Node, val: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The value of an integer tensor that depends on no input and no weight: an index keeps its meaning through movement."""
    tags = getattr(node.target, "tags", ())
    if val.is_floating_point() or val.is_complex() or torch.Tag.nondeterministic_seeded in tags or val.device.type != "cpu":
        return None
    value = run(node, args, kwargs)
    return value if isinstance(value, torch.Tensor) else None
