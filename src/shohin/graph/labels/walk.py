"""The walk over a program that gives every tensor its labels."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from shohin.graph.labels import attention, contraction, elementwise, movement, normalization, recurrent, reduction, selection, spatial
from shohin.graph.labels.context import Context, Parameter
from shohin.graph.labels.core import Labels, rigid
from shohin.graph.labels.rules import RULES
from shohin.program import Program, concrete, family, shape_of
from shohin.program.nodes import arguments, flatten, run

#: importing these registers their rules
FAMILIES = (attention, contraction, elementwise, movement, normalization, recurrent, reduction, selection, spatial)
FACTORIES = frozenset(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"))


def propagate(program: Program) -> Context:
    """Walks the program once and gives every tensor its labels. Unknown operators freeze what they touch, by name and line."""
    context = Context(program)
    given = dict(zip(program.inputs, program.example, strict=True))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in program.names:
                context.values[node] = _tensor(program, context, program.names[node.name])
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


def _tensor(program: Program, context: Context, name: str) -> Any:
    """A tensor of the model: a `Parameter`, shared by tied tensors (two names, one tensor); known integers as they are."""
    tensor = program.tensors[name]
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.detach().cpu()
    if name not in context.parameters:
        same = (p for other, p in context.parameters.items() if program.tensors[other] is tensor)
        context.parameters[name] = next(same, None) or Parameter(name, tuple(tensor.shape))
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
    if isinstance(val, torch.Tensor) and all(isinstance(t, torch.Tensor) or _constant(t) for t in tensors):
        known = _known(node, val, tensors, args, kwargs)
        if known is not None:
            return known
    reason = "does not follow prunable axes here" if name in RULES else "has no rule"
    if name in RULES and (not _tensors(list(kwargs.values())) or name in FACTORIES):
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


def _constant(value: Any) -> bool:
    return isinstance(value, Parameter) and value.constant


def _known(node: fx.Node, val: torch.Tensor, tensors: list[Any], args: Any, kwargs: Any) -> torch.Tensor | Parameter | None:
    """A tensor that depends on no input and no weight: integers by value (an index keeps its meaning through movement),
    others as a constant, which is sliced where it meets prunable axes.
    """
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    if val.is_floating_point() or val.is_complex() or any(_constant(t) for t in tensors):
        symbolic = {d for d, n in enumerate(val.shape) if isinstance(n, torch.SymInt)}  # the batch is never cut
        return Parameter(node.name, shape_of(node), bound=symbolic, constant=True)
    if val.device.type != "cpu":
        return None
    value = run(node, args, kwargs)
    return value if isinstance(value, torch.Tensor) else None
