"""Capture: a model becomes a program (`torch.export`, non-strict), with provenance, in one pass.

The example is repeated to a batch of at least 2 and its first dimensions are dynamic: with a batch of 1 export specializes
in silence. The user's module is never touched: a structural copy that shares its tensors is exported.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from shohin.addresses import number
from shohin.data import Call
from shohin.errors import ModelError
from shohin.program.functional import make_functional
from shohin.program.program import Origin, Program
from shohin.program.provenance import Recorder, locate, tag


def capture(model: nn.Module, example: Call | tuple[Any, ...]) -> Program:
    """Exports ``model`` in evaluation mode as a `Program`.

    Args:
        example: the arguments of one call; dimension 0 of every tensor is the batch.

    Raises:
        ModelError: if the model does not run on the example, cannot be exported, or has NaN in its weights.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    call = example if isinstance(example, Call) else Call(tuple(example), {}, None, None)
    args, kwargs = pytree.tree_map_only(Tensor, _at_least_two, (call.args, call.kwargs))
    _check_weights(model)
    shadow = structural_copy(model).eval()
    _check_runs(shadow, args, kwargs)
    tag(shadow)
    recorder = Recorder()
    shapes = pytree.tree_map(_dynamic, (args, kwargs))
    try:
        with warnings.catch_warnings(), recorder:
            warnings.simplefilter("ignore")
            exported = torch.export.export(shadow, args, kwargs, dynamic_shapes=_by_parameter(shadow, *shapes), strict=False)
    except Exception as error:
        raise ModelError(f"the model runs but cannot be captured as a graph: {_first_lines(error)}{_user_line(error)}") from error
    return _program(model, exported, recorder, (args, kwargs))


def structural_copy(model: nn.Module, replace: dict[int, Any] | None = None) -> nn.Module:
    """A copy of the module tree that shares parameters and buffers, except those in ``replace`` (id -> new tensor).

    Raises:
        ModelError: if the module cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo.update(replace or {})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied (copy.deepcopy failed: {_first_lines(error)}); remove what it holds that cannot be copied"
        ) from error


def _at_least_two(x: Tensor) -> Tensor:
    return x.repeat(2, *[1] * (x.dim() - 1)) if x.dim() and x.shape[0] == 1 else x


def _dynamic(x: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None


def _by_parameter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic shapes in the form that torch.export expects: by parameter name if there are keywords."""
    if not kwargs:
        return args
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    return dict(bound.arguments)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        values = tensor.detach()
        bad = int((~values.isfinite() if isinstance(tensor, nn.Parameter) else values.isnan()).sum())  # masks are infinite buffers
        if bad:
            raise ModelError(f"the model's {name!r} holds {bad} NaN or infinite values of {tensor.numel()}; repair the weights first")


def _check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    shapes = ", ".join([_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()])
    if not any(isinstance(x, Tensor) and x.dim() for x in pytree.tree_leaves((args, kwargs))):
        raise ModelError(f"the model does not run on the example ({shapes or 'nothing'}): it holds no tensor with a batch dimension")
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise ModelError(
            f"the model does not run on the example ({shapes}): {type(error).__name__}: {_first_lines(error)}{_user_line(error)}"
        ) from error


def _describe(value: Any) -> str:
    return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else type(value).__name__


def _first_lines(error: BaseException, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is neither torch's nor Shohin's."""
    import traceback

    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "/shohin/" not in frame.filename:
            return f" (at {frame.filename}:{frame.lineno}: {frame.line})"
    return ""


def _program(model: nn.Module, exported: Any, recorder: Recorder, inputs: Any) -> Program:
    graph: fx.Graph = exported.graph_module.graph
    signature = exported.graph_signature
    sources = locate(recorder.calls, graph)
    graph, renamed = _stable(graph)
    asked = {new: old for old, new in renamed.items()}
    sources = {(renamed[node], position): source for (node, position), source in sources.items()}
    owned = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    owned = {renamed[name]: tensor for name, tensor in owned.items()}
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    tensors, names, user = {}, {}, []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in owned:
            name = owned[node.name]
            names[node.name] = name
            tensors[name] = state[name] if name in state else exported.constants[name]
        else:
            user.append(node.name)
            if not isinstance(node.meta.get("val"), torch.Tensor) and node.meta.get("val") is not None:
                raise ModelError(
                    f"input {node.name!r} is a {type(node.meta['val']).__name__}, not a tensor: give numbers that do not change as attributes of the model"
                )
    tied = {id(tensor): name for name, tensor in tensors.items()}
    aliases = {name: tied[id(tensor)] for name, tensor in state.items() if name not in tensors and id(tensor) in tied}
    tensors.update({name: state[name] for name in aliases})
    trainable = frozenset(signature.inputs_to_parameters.values())
    graph = make_functional(_clean(graph))
    origins = _origins(graph)
    for node in graph.nodes:
        sizes = [s for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor) for s in t.shape]
        if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes):
            line = origins[node.name].line if node.name in origins else node.name
            raise ModelError(
                f"the shape of a tensor depends on the values of the input (at {line}); keep shapes fixed, with a mask for instance"
            )
    flat, _ = pytree.tree_flatten(inputs)
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
        sources=sources,
        remarks=tuple(_remarks(model, graph, user)),
    )


def _stable(graph: fx.Graph) -> tuple[fx.Graph, dict[str, str]]:
    """A copy whose node names survive further copies (a copy renames what hides a builtin, ``input``), and old name -> new."""
    copy, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        mapping[node] = copy.node_copy(node, lambda n: mapping[n])
    return copy, {old.name: new.name for old, new in mapping.items()}


def _clean(graph: fx.Graph) -> fx.Graph:
    """Plain ints for tagged ones; assertions and unused operations away."""
    for node in graph.nodes:
        node.args = pytree.tree_map_only(int, _plain, node.args)
        node.kwargs = pytree.tree_map_only(int, _plain, node.kwargs)
    for node in reversed(graph.nodes):
        name = str(node.target)
        if node.op == "call_function" and not node.users and ("_assert" in name or "sym_constrain" in name or not _impure(node)):
            graph.erase_node(node)
    return graph


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool) else int(value)


def _impure(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.is_mutable)


def family(node: fx.Node) -> str:
    """The operator family of a node: the packet's name without a trailing underscore ("conv2d", "add")."""
    target = node.target
    name = target._schema.name.split("::")[-1] if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
    return str(name).rstrip("_")


def _origins(graph: fx.Graph) -> dict[str, Origin]:
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    modules = [_module_path(n) for n in nodes]
    addresses = number(zip(modules, map(family, nodes), strict=True))
    return {n.name: Origin(a, m, _line(n)) for n, a, m in zip(nodes, addresses, modules, strict=True)}


def _module_path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else re.sub(r"@\d+", "", path)


def _line(node: fx.Node) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.*)', node.meta.get("stack_trace") or "")
    frames = [f for f in frames if "/torch/nn/" not in f[0]] or frames
    if not frames:
        return ""
    file, line, function, text = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line} in {function}: {text.strip()}"


def _remarks(model: nn.Module, graph: fx.Graph, inputs: list[str]) -> list[str]:
    remarks = []
    for path, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if hooks:
            remarks.append(
                f"{path or 'the model'} has {hooks} forward hook(s): what they computed is part of the program, what they recorded is not"
            )
    for node in graph.nodes:
        if (
            node.op == "placeholder"
            and node.name in inputs
            and isinstance(node.meta.get("val"), Tensor)
            and node.meta["val"].dim()
            and isinstance(node.meta["val"].shape[0], int)
        ):
            remarks.append(f"the batch of input {node.name!r} is fixed to {node.meta['val'].shape[0]} by the model's own code")
    return remarks
