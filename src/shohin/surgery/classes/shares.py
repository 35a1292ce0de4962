"""One module's share of a rewritten program, as a module: where a single forward cannot follow a plan, only it is replaced."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shohin.program import Program, ProgramModule, interpret, structural_copy
from shohin.surgery.rewritten import Rewritten

#: operations outside a module that may be computed again inside (masks and sizes made from nothing)
LIMIT = 24


@dataclass
class Recorded:
    """The one call of a module in the example.

    Args:
        args: flattened arguments, and their structure.
        outputs: flattened results, and their structure.
        calls: how often it was called.
        entries: node name -> index of the argument that it is.
        exits: index of a result -> node name.
    """

    args: list[Any] = field(default_factory=list)
    in_spec: Any = None
    outputs: list[Any] = field(default_factory=list)
    out_spec: Any = None
    calls: int = 0
    entries: dict[str, int] = field(default_factory=dict)
    exits: dict[int, str] = field(default_factory=dict)


def record(model: nn.Module, program: Program, paths: Iterable[str]) -> dict[str, Recorded]:
    """Runs the example once through the model and once through its program, and finds which node is which argument or result.

    Equal values tell; the proof of what is built from this decides.
    """
    found = {path: Recorded() for path in paths}
    shadow = structural_copy(model).eval()
    for path, one in found.items():
        shadow.get_submodule(path).register_forward_hook(_hook(one), with_kwargs=True)
    args, kwargs = pytree.tree_unflatten(list(program.example), program.in_spec)
    inside = {path: _inside(program, path) for path in found}

    def visit(node: fx.Node, value: Any, _: tuple[Any, ...]) -> Any:
        for path, one in found.items():
            if isinstance(value, Tensor):
                _match(one, node, value, node.name in inside[path])
        return value

    with torch.no_grad():
        shadow(*args, **kwargs)
        for node, value in zip(program.inputs, program.example, strict=True):
            for one in found.values():
                if isinstance(value, Tensor):
                    _match(one, node, value, False)
        for node, name in program.names.items():
            for one in found.values():
                for index, given in enumerate(one.args):
                    if given is program.tensors[name]:
                        one.entries.setdefault(node, index)
        interpret(program, program.graph, {n: t.detach() for n, t in program.tensors.items()}, program.example, visit)
    return found


def _hook(one: Recorded) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        one.calls += 1
        one.args, one.in_spec = pytree.tree_flatten((args, kwargs))
        one.outputs, one.out_spec = pytree.tree_flatten(output)

    return hook


def _match(one: Recorded, node: fx.Node | str, value: Tensor, inside: bool) -> None:
    name = node if isinstance(node, str) else node.name
    known = one.outputs if inside else one.args
    for index, given in enumerate(known):
        if isinstance(given, Tensor) and given.shape == value.shape and given.dtype == value.dtype and _equal(given, value):
            if inside:
                one.exits[index] = name
            else:
                one.entries.setdefault(name, index)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)


def _inside(program: Program, path: str) -> set[str]:
    return {n for n, o in program.origins.items() if o.module == path or o.module.startswith(path + ".")}


class _Cannot(Exception):
    """A part that reads more than its arguments."""


def share(program: Program, rewritten: Rewritten, path: str, own: nn.Module, one: Recorded) -> nn.Module | str:
    """The operations of one module in the rewritten program, as a module with the same call, tensors and hooks; or why there is none.

    Args:
        own: the module in the copy, whose tensors are sliced.
    """
    if one.calls != 1:
        return f"{path} is called {one.calls} times"
    made = fx.Graph()
    inputs = [made.placeholder(f"given_{i}") for i in range(len(one.args))]
    held = {**dict(own.named_parameters(remove_duplicate=False)), **dict(own.named_buffers(remove_duplicate=False))}
    work = _Work(program, rewritten, made, path, _inside(program, path), one, inputs, held)
    by_name = {n.name: n for n in rewritten.graph.nodes}
    try:
        outputs = []
        for i, value in enumerate(one.outputs):
            if isinstance(value, Tensor) and one.exits.get(i) not in by_name:
                return f"a result of {path} was not found in the program"
            outputs.append(work.get(by_name[one.exits[i]]) if isinstance(value, Tensor) else value)
    except _Cannot as error:
        return str(error)
    made.output(tuple(outputs))
    _inputs_last(made, inputs)
    sub = replace(
        program,
        graph=made,
        names=work.names,
        tensors={**held, **work.outside},
        trainable=frozenset(n for n, t in held.items() if isinstance(t, nn.Parameter)),
        inputs=tuple(n.name for n in inputs),
        input_names=tuple(n.name for n in inputs),
        in_spec=one.in_spec,
        out_spec=one.out_spec,
        example=tuple(x if isinstance(x, (Tensor, int, float, bool, str)) else None for x in one.args),
        signature=inspect.signature(own.forward),
        origins={},
        sources={},
    )
    return _dressed(ProgramModule(sub), own, held)


def _dressed(made: nn.Module, own: nn.Module, held: dict[str, Tensor]) -> nn.Module:
    """With the tensors that no operation reads, hooks, modes and the persistence of buffers of the module that it replaces."""
    for path, module in own.named_modules():
        owner = made
        for name in path.split(".") if path else []:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        for name, parameter in module._parameters.items():
            if name not in owner._parameters:
                owner.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            if name not in owner._buffers:
                owner.register_buffer(name, buffer)
        owner._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    made._forward_hooks, made._forward_pre_hooks = own._forward_hooks, own._forward_pre_hooks
    return made.train(own.training)


def _inputs_last(graph: fx.Graph, inputs: list[fx.Node]) -> None:
    """Placeholders in one run: tensors, then the arguments in order."""
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder" and n not in inputs), None)
    if last is not None:
        for node in reversed(inputs):
            last.append(node)


@dataclass
class _Work:
    program: Program
    rewritten: Rewritten
    made: fx.Graph
    path: str
    inside: set[str]
    one: Recorded
    inputs: list[fx.Node]
    held: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)
    outside: dict[str, Tensor] = field(default_factory=dict)
    known: dict[fx.Node, fx.Node] = field(default_factory=dict)
    foreign: int = 0

    def __post_init__(self) -> None:
        self.shapes = {n.name: n.meta["val"].shape for n in self.program.graph.nodes if n.name in self.one.entries}
        self.first = self.inputs[-1]

    def get(self, node: fx.Node) -> fx.Node:
        """The node in the part."""
        if node not in self.known:
            self.known[node] = self._made(node)
        return self.known[node]

    def _made(self, node: fx.Node) -> fx.Node:
        if node.name in self.one.entries:
            return self.inputs[self.one.entries[node.name]]
        if node.op == "placeholder":
            return self._tensor(node)
        if not isinstance(node.meta.get("val"), (Tensor, tuple, list)) and node.name not in self.inside:
            size = self._size(node)
            if size is not None:
                return size
        if node.name not in self.inside and node.name in self.program.origins:
            self.foreign += 1
            if self.foreign > LIMIT:
                raise _Cannot(f"{self.path} reads more than its arguments: {self.program.origins[node.name].address}")
        return self.made.node_copy(node, self.get)

    def _tensor(self, node: fx.Node) -> fx.Node:
        name = self.program.names.get(node.name)
        if name is None:
            raise _Cannot(f"{self.path} reads an input of the model that is not its argument")
        relative = name.removeprefix(self.path + ".")
        if name == relative and name in self.program.trainable:
            raise _Cannot(f"{self.path} reads the parameter {name}, which is not its own")
        if name == relative or relative not in self.held:  # a constant of the program, or a buffer of another module
            relative = "constant_" + relative.replace(".", "_")
            self.outside[relative] = self.rewritten.own(name)
        with self.made.inserting_before(self.first):
            made = self.made.placeholder(f"own_{len(self.names)}")
        self.names[made.name] = relative
        return made

    def _size(self, node: fx.Node) -> fx.Node | None:
        """A symbolic size of the program read off the arguments: one of their sizes, a multiple or a quotient of it."""
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return None
        wanted = value.node.expr
        for name, index in self.one.entries.items():
            for axis, size in enumerate(self.shapes.get(name, ())):
                if isinstance(size, torch.SymInt):
                    quotient = size.node.expr / wanted
                    inverse = wanted / size.node.expr
                    if quotient.is_Integer or inverse.is_Integer:
                        read = self.made.call_function(torch.ops.aten.sym_size.int, (self.inputs[index], axis))
                        if quotient == 1:
                            return read
                        if quotient.is_Integer:
                            return self.made.call_function(operator.floordiv, (read, int(quotient)))
                        return self.made.call_function(operator.mul, (read, int(inverse)))
        return None
