"""A program as a module: the graph compiled to Python once, its tensors registered under the model's own names."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.errors import DataError
from shohin.program.inputs import arranged, samples
from shohin.program.nodes import arguments, callable_of, run
from shohin.program.origins import family
from shohin.program.program import Program


class _Form:
    """How a program is called and what it returns; shared by copies."""

    def __init__(self, program: Program) -> None:
        self.inputs, self.outputs, self.signature = program.in_spec, program.out_spec, program.signature
        self.example = tuple(x.new_empty(0) if isinstance(x, Tensor) else x for x in program.example)  # kinds, not values
        self.compile: Callable[..., Callable[..., Any]]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Form:
        return self

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments of a call in the order of the program's inputs."""
        return arranged((args, kwargs), self.inputs, self.signature, self.example)


class ProgramModule(nn.Module):
    """Runs a graph with the user's signature.

    ``state_dict`` has the names of the original model. ``train()`` switches batch normalization and dropout as in the
    original, by rewriting their training arguments (`ExportedProgram.module()` cannot). A training program has one form: what
    training mode did when it was captured.

    Args:
        program: gives names and specs.
        graph: the graph to run; the program's own by default.
        tensors: values by qualified name; the program's own by default. Parameters stay parameters.
        taps: names of operation nodes whose values are returned too: the output becomes ``(*flat outputs, *taps)``.
    """

    def __init__(
        self,
        program: Program,
        graph: fx.Graph | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        taps: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self._form = _Form(program)
        self._tapped = bool(taps)
        values = {**program.tensors, **(tensors or {})}
        source = graph if graph is not None else program.graph
        used = {node.name for node in source.nodes if node.op == "placeholder"}
        for node_name, name in program.names.items():
            if node_name in used:
                self._register(name, values[name], name in program.trainable)
        present = {id(values[program.names[n]]) for n in used if n in program.names}
        for name in program.tensors:
            if name in values and id(values[name]) in present:
                self._register(name, values[name], name in program.trainable)
        self._form.compile = partial(_compile, source, program.names, taps)
        self._functions = {mode: self._form.compile(training=mode) for mode in (False, True)}
        self.__class__ = _signed(str(program.signature), program.signature)
        self.train(program.training)

    def _register(self, name: str, value: Tensor, trainable: bool) -> None:
        owner: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            if child is None:
                return
            owner = child
        if leaf in owner._parameters or leaf in owner._buffers:
            return
        if trainable:
            owner.register_parameter(leaf, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
        else:
            owner.register_buffer(leaf, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model, in the model's own structure (or flat, with taps)."""
        outputs = self._functions[self.training](self, *self._form.flat(args, kwargs))
        return tuple(outputs) if self._tapped else pytree.tree_unflatten(list(outputs), self._form.outputs)

    def settle(self, families: frozenset[str]) -> None:
        """From now on operations of these families ("batch_norm") do in training what they do in evaluation."""
        self._functions[True] = self._form.compile(training=True, settled=families)


_CLASSES: dict[str, type[ProgramModule]] = {}


def _signed(key: str, signature: inspect.Signature) -> type[ProgramModule]:
    """A subclass whose forward shows the user's signature, from which exporters take the names of inputs."""
    if key not in _CLASSES:

        def forward(self: ProgramModule, *args: Any, **kwargs: Any) -> Any:
            return ProgramModule.forward(self, *args, **kwargs)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        others = [p.replace(kind=p.POSITIONAL_ONLY) if p.kind is p.POSITIONAL_ONLY else p for p in signature.parameters.values()]
        forward.__signature__ = signature.replace(parameters=[own, *others])  # type: ignore[attr-defined]
        _CLASSES[key] = type("ProgramModule", (ProgramModule,), {"forward": forward})
    return _CLASSES[key]


def _compile(
    graph: fx.Graph, names: Mapping[str, str], taps: tuple[str, ...], *, training: bool, settled: frozenset[str] = frozenset()
) -> Callable[..., Any]:
    """The graph as a Python function ``f(module, *flat inputs)``; operations of ``settled`` families always as in evaluation."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in names:
            mapping[node] = copy.create_node("get_attr", names[node.name], name=node.name)
        elif node.op == "output":
            outputs = [mapping[n] if isinstance(n, fx.Node) else n for n in arguments(node)[0]]
            by_name = {old.name: new for old, new in mapping.items()}
            copy.output(tuple(outputs) + tuple(by_name[t] for t in taps))
        else:
            mapping[node] = copy.node_copy(node, lambda n: mapping[n])
            if node.op == "call_function":
                mapping[node].target = callable_of(node)
            if training and not (node.op == "call_function" and family(node) in settled):
                _set_training(mapping[node])
    code = copy.python_code("self")
    space: dict[str, Any] = {"torch": torch, "device": torch.device, **code.globals}
    exec(compile(code.src, "<shohin program>", "exec"), space)
    function: Callable[..., Any] = space["forward"]
    return function


#: what operators call the flag that tells training from evaluation
_MODES = frozenset(["train", "training", "use_input_stats"])


def _set_training(node: fx.Node) -> None:
    """Sets the flag of dropout, batch statistics and the dropout between recurrent layers, where the program has it off."""
    schema = getattr(node.target, "_schema", None)
    positions = [i for i, a in enumerate(schema.arguments) if a.name in _MODES] if schema is not None else []
    for position in positions:
        if position < len(node.args) and node.args[position] is False:
            node.args = tuple(True if i == position else a for i, a in enumerate(node.args))


def interpret(
    program: Program,
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    inputs: tuple[Any, ...],
    visit: Callable[[fx.Node, Any, tuple[Any, ...]], Any] | None = None,
    feed: Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> Any:
    """Runs the graph node by node; ``visit(node, value, args)`` may replace each operation's value.

    Args:
        inputs: flattened.
        visit: gets the node, its value and its evaluated arguments; returns the value to go on with.
        feed: gets the node and its evaluated arguments before it runs; returns the arguments to run it with.

    Returns:
        The flat outputs.
    """
    values: dict[fx.Node, Any] = {}
    remaining = {node: len(node.users) for node in graph.nodes}
    given = dict(zip(program.inputs, inputs, strict=True))
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = tensors[program.names[node.name]] if node.name in program.names else given[node.name]
        elif node.op == "output":
            return fx.map_arg(node.args[0], lambda n: values[n])
        else:
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
            if feed is not None:
                args = feed(node, args)
            value = run(node, args, kwargs)
            values[node] = value if visit is None else visit(node, value, args)
            for used in node.all_input_nodes:
                remaining[used] -= 1
                if not remaining[used]:
                    del values[used]
    return None


def call_inputs(program: Program, call: Call) -> tuple[Any, ...]:
    """A call's arguments in the order of the program's inputs.

    Raises:
        DataError: if the call has another structure than the example, a tensor of another shape beyond the batch, or another batch
            where the model fixes it.
    """
    flat = arranged((tuple(call.args), dict(call.kwargs)), program.in_spec, program.signature, program.example)
    for name, x, example in zip(program.inputs, flat, program.example, strict=True):
        if isinstance(x, Tensor) and isinstance(example, Tensor) and x.shape[1:] != example.shape[1:]:
            raise DataError(
                f"input {name!r} of a batch has shape {tuple(x.shape)}; the example had {tuple(example.shape)} (only the batch may differ)"
            )
        if name in program.fixed and isinstance(x, Tensor) and x.shape[:1] != example.shape[:1]:
            raise DataError(
                f"{program.fixed[name]}, and a batch has {len(x)} samples: write x.shape[0] in place of len(x) in the model, or give "
                f"batches of {len(example)}"
            )
    return tuple(flat)


def apart(program: Program, inputs: tuple[Any, ...], size: int) -> bool:
    """True if the answers for a sample are its own: the first two give the same alone as together. False where the model fixes the batch.

    Args:
        inputs: of a batch of ``size``.
    """
    if program.fixed:
        return False
    if size < 2:
        return True
    with torch.no_grad():
        both, first, second = (
            [
                t
                for t in pytree.tree_leaves(interpret(program, program.graph, program.tensors, samples(inputs, size, *ends)))
                if isinstance(t, Tensor)
            ]
            for ends in ((0, 2), (0, 1), (1, 2))
        )
    for pair, one, other in zip(both, first, second, strict=True):
        if pair.dim() == 0 or len(pair) != 2 or one.shape[0] != 1:
            return False
        alone, pair = torch.cat([one, other]).double(), pair.double()
        largest = float(alone.abs().nan_to_num(0.0, 0.0, 0.0).max()) if alone.numel() else 0.0
        if not torch.allclose(alone, pair, rtol=1e-3, atol=1e-3 * largest, equal_nan=True):
            return False
    return True


def restore_outputs(program: Program, flat: Any) -> Any:
    """Flat outputs in the model's own structure."""
    return pytree.tree_unflatten(list(flat), program.out_spec)


def joined_inputs(program: Program, calls: Sequence[Call], limit: int) -> tuple[Any, ...]:
    """Inputs of all calls as one batch of at most ``limit`` samples; of the first call where the model fixes the batch, with a warning."""
    if program.fixed:
        warnings.warn(f"{next(iter(program.fixed.values()))}: only the first batch is looked at", stacklevel=3)
        return call_inputs(program, calls[0])
    before = itertools.accumulate((c.size for c in calls), initial=0)
    needed = [c for c, seen in zip(calls, before, strict=False) if seen < limit]
    columns = list(zip(*[call_inputs(program, c) for c in needed], strict=True))
    return tuple(torch.cat(list(column))[:limit] if isinstance(column[0], Tensor) and column[0].dim() else column[0] for column in columns)
