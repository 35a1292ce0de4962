"""Capture: a model becomes a program (`torch.export`, non-strict), with provenance, in one pass.

The example is repeated to a batch of at least 2 and its first dimensions are dynamic: with a batch of 1 export specializes
in silence. The user's module is never touched: structural copies that share its tensors are run and exported.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shohin.errors import ModelError
from shohin.program.copies import structural_copy
from shohin.program.functional import make_functional
from shohin.program.inline import clean, flat_copy, renamed_sources, without_unused
from shohin.program.inputs import (
    FIXED,
    at_least_two,
    batch_of,
    call_of,
    describe_call,
    dynamic_shapes,
    first_two,
    in_order,
    name_keywords,
    open_dataclasses,
)
from shohin.program.origins import family, hook_remarks, line_that_fixes, origins_of, static_inputs
from shohin.program.program import Program
from shohin.program.provenance import Recorder, locate, tag
from shohin.program.refusals import check_kind, explained, first_lines, user_line

__all__ = ["capture", "family", "structural_copy"]


def capture(model: nn.Module, example: Any, *, training: bool = False, evaluation: Program | None = None) -> Program:
    """Exports ``model`` as a `Program`; the user's module keeps its mode, its buffers and its random numbers.

    Args:
        example: the arguments of one call: a `Call`, a tuple, a dict of keyword arguments, or a tensor; dimension 0 of every
            tensor is the batch. Values that are neither tensors nor containers of tensors (None, True, a string) are fixed.
        training: capture what training mode does (dropout, stochastic depth, batch statistics) instead of evaluation mode.
            Running statistics are changed by `batch_norm` itself when the program runs; other buffers that forward changes
            keep their values. Has the tensor names of the evaluation program, and accepts its plans.
        evaluation: the evaluation program of the same model, if there is one already; ``training`` needs its fingerprint.

    Raises:
        ModelError: if the model does not run on the example, cannot be exported, has NaN in its weights, or changes its own
            tensors in evaluation mode (a program has no memory from one call to the next).
    """
    check_kind(model)
    call = call_of(example)
    _check_weights(model)
    given = (tuple(call.args), in_order(model, call.args, call.kwargs))
    open_dataclasses(given, "input")
    (args, kwargs), remarks = _that_runs(model, given, training)
    program = _captured(model, args, kwargs, remarks, training)
    if not training:
        return program
    return replace(program, training=True, plan_fingerprint=(evaluation or capture(model, example)).fingerprint)


def _that_runs(model: nn.Module, given: Any, training: bool) -> tuple[Any, list[str]]:
    """The example with a batch of at least 2, or as it is if the model runs with nothing else; and what to say about it."""
    if batch_of(given) is None:
        raise ModelError(
            f"the model does not run on the example ({describe_call(*given) or 'nothing'}): it holds no tensor with a batch dimension"
        )
    repeated = at_least_two(given)
    try:
        args, kwargs = first_two(repeated)
        _run(model, args, kwargs, training)
    except ModelError:
        pass  # a batch that the model fixes, or a model that does not run
    else:
        return repeated, []
    try:
        _run(model, repeated[0], repeated[1], training)
    except ModelError as error:
        if repeated is given:
            raise
        _run(model, given[0], given[1], training)
        return given, [f"the batch is fixed to 1: {error}"]
    return repeated, []


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> None:
    """Runs a copy with its own buffers once.

    Raises:
        ModelError: if it fails, with the user's line, or if its outputs cannot be followed.
    """
    own = {id(b): b.detach().clone() for b in model.buffers()}
    copy = structural_copy(model, own, share=True).train(training)
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            outputs = copy(*args, **kwargs)
    except Exception as error:
        raise ModelError(
            f"the model does not run on the example ({describe_call(args, kwargs)}): "
            f"{type(error).__name__}: {first_lines(error)}{user_line(error)}"
        ) from error
    open_dataclasses(outputs, "output")


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], remarks: list[str], training: bool) -> Program:
    shadow, recorder = structural_copy(model).train(training), Recorder()
    tag(shadow)
    name_keywords(shadow, kwargs)

    def export() -> Any:
        with warnings.catch_warnings(), torch.enable_grad(), redirect_stderr(io.StringIO()):  # a failed export prints its whole graph
            warnings.simplefilter("ignore")
            return torch.export.export(shadow, args, kwargs, dynamic_shapes=dynamic_shapes(shadow, args, kwargs), strict=False)

    try:
        with recorder:
            exported = export()
        return _program(model, exported, recorder, (args, kwargs), remarks, export, training)
    except ModelError:
        raise
    except Exception as error:
        raise explained(error) from error


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        values, inside = tensor.detach(), isinstance(tensor, nn.Parameter)
        total = values.sum()
        if total.isfinite() or (not inside and not total.isnan()):
            continue  # one pass is enough, nearly always: a sum keeps what is not finite
        bad = int((~values.isfinite() if inside else values.isnan()).sum())  # masks are infinite buffers
        if bad:
            raise ModelError(f"the model's {name!r} holds {bad} NaN or infinite values of {tensor.numel()}; repair the weights first")


def _program(
    model: nn.Module, exported: Any, recorder: Recorder, inputs: Any, remarks: list[str], export: Callable[[], Any], training: bool
) -> Program:
    signature = exported.graph_signature
    graph, renamed = flat_copy(exported.graph_module)
    sources = locate(recorder.calls, renamed)
    owned = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    names = {renamed[node].name: name for node, name in owned.items() if node in renamed}
    asked = {node.name: old for old, node in renamed.items() if node.op == "placeholder"}
    user = [n.name for n in graph.nodes if n.op == "placeholder" and n.name not in names]
    _check_inputs(graph, user, asked)
    tensors, aliases = _owned(model, names, exported.constants)
    trainable = frozenset(signature.inputs_to_parameters.values())
    counters = _counters(model)
    loose = counters if not training else set(names.values()) - trainable
    changed, again = make_functional(clean(graph), {node for node, name in names.items() if name in loose})
    origins = origins_of(without_unused(graph))
    _check_sizes(graph, origins)
    remarks = [*remarks, *hook_remarks(model)]
    remarks.extend(
        f"forward changes the buffer {names[c]!r}: the program computes with the change and does not keep it"
        for c in changed
        if names[c] not in counters
    )
    flat, spec = pytree.tree_flatten(inputs)
    lone = bool(remarks) and "batch" in remarks[0]  # it runs with a batch of one alone
    static = [] if lone else static_inputs(graph, user, batch_of(inputs) or 0)
    fixed = {n: remarks[0] for n, x in zip(user, flat, strict=True) if isinstance(x, Tensor) and x.dim()} if lone else {}
    if static:
        line = line_that_fixes(export)
        where = f" (at {line})" if line else ""
        fixed = {n: f"the batch of input {asked[n]!r} is fixed to {batch_of(inputs)} by the model's own code{where}" for n in static}
        remarks.extend(fixed.values())
    if spec != exported.call_spec.in_spec:
        raise ModelError(f"torch.export takes the call as {exported.call_spec.in_spec}, the example is {spec}; give arguments by keyword")
    return Program(
        graph=graph,
        names=names,
        tensors=tensors,
        trainable=trainable | {name for name, main in aliases.items() if main in trainable},
        inputs=tuple(user),
        input_names=tuple(asked[name] for name in user),
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        example=tuple(flat),
        signature=inspect.signature(model.forward),
        origins=origins,
        sources=renamed_sources(sources, again),
        remarks=tuple(remarks),
        fixed=fixed,
    )


def _owned(model: nn.Module, names: Mapping[str, str], constants: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors by name, tied ones under each of their names, and other name -> first name."""
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    tensors = {name: state[name] if name in state else constants[name] for name in names.values()}
    tied = {id(tensor): name for name, tensor in tensors.items()}
    aliases = {name: tied[id(tensor)] for name, tensor in state.items() if name not in tensors and id(tensor) in tied}
    tensors.update({name: state[name] for name in aliases})
    return tensors, aliases


def _check_inputs(graph: fx.Graph, user: list[str], asked: Mapping[str, str]) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in user and not isinstance(value, (Tensor, *FIXED)):
            raise ModelError(
                f"input {asked[node.name]!r} is a {type(value).__name__}, not a tensor: give numbers that do not change as attributes of the model"
            )


def _check_sizes(graph: fx.Graph, origins: Mapping[str, Any]) -> None:
    for node in graph.nodes:
        sizes = [s for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor) for s in t.shape]
        if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes):
            line = origins[node.name].line if node.name in origins else node.name
            raise ModelError(
                f"the shape of a tensor depends on the values of the input (at {line}); keep shapes fixed, with a mask for instance"
            )


def _counters(model: nn.Module) -> set[str]:
    """Names of the buffers in which batch normalization counts batches."""
    return {f"{path}.num_batches_tracked".lstrip(".") for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
