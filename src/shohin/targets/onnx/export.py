"""A torch module as an ONNX graph whose tensors bear our names.

The exporter's own value names are unreliable (decompositions rename), and its optimizer merges equal initializers, which
would merge two layers that happen to hold equal weights. So the export is made unoptimized, where every parameter is an
initializer of its qualified name; outputs are named by position; and only passes that keep parameters apart are run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shohin.errors import TargetError
from shohin.targets.onnx.signature import Signature, bind

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OPSET = 20
_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")


@dataclass(frozen=True)
class Exported:
    """An ONNX model with what is known of its names.

    Args:
        model: the taps are still graph outputs.
        aliases: tap name -> name of the tensor that it is, for taps that are not a tensor of their own.
        signature: how to call the file as the torch model is called.
    """

    model: onnx.ModelProto
    aliases: dict[str, str]
    signature: Signature


@dataclass(frozen=True)
class Translated:
    """A model as the translator gave it: nothing is optimized, every tap is an output.

    Args:
        model: each parameter is an initializer of its name; the outputs are the model's own, then those taps that have a tensor.
        aliases: as in `Exported`.
        inputs: names of the inputs, in order.
        signature: how to call the file as the torch model is called.
    """

    model: ir.Model
    aliases: dict[str, str]
    inputs: tuple[str, ...]
    signature: Signature


def export(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], taps: Sequence[str]) -> Exported:
    """Exports a module in eval mode. Dimension 0 of every tensor that has the batch there stays free.

    Raises:
        TargetError: if the module does not run or export, fixes its batch, or its outputs do not end in the taps.
    """
    return optimized(translate(module, args, kwargs, taps), taps)


def translate(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], taps: Sequence[str]) -> Translated:
    """The slow half of `export` (seconds): capture and translation. Raises TargetError as `export` does."""
    args, kwargs = _batch_of_two(args, dict(kwargs))
    bind(module, args, kwargs)
    try:
        with torch.no_grad():
            outputs = module(*args, **kwargs)
    except Exception as error:
        raise TargetError(f"the module does not run on the example: {_first_line(error)}") from error
    primary, flat = _split(outputs, len(taps))
    signature = Signature.of(module, args, kwargs, primary)
    program = _capture(module, args, kwargs)
    with _quiet():
        try:
            produced = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except Exception as error:
            raise TargetError(f"torch.onnx cannot translate the model: {_first_line(error)}") from error
        if produced is None:
            raise TargetError("torch.onnx returned nothing")
        graph_model: ir.Model = produced.model
        if len(graph_model.graph.outputs) != flat + len(taps):
            raise TargetError(
                f"the exported graph has {len(graph_model.graph.outputs)} outputs, expected {flat} outputs and {len(taps)} taps; "
                "outputs must be tensors"
            )
        inputs = tuple(name for name in program.graph_signature.user_inputs if isinstance(name, str))
        aliases = _name(graph_model, inputs, signature.outputs, taps)
    return Translated(graph_model, aliases, inputs, signature)


def optimized(translated: Translated, taps: Sequence[str]) -> Exported:
    """The fast half of `export`. Changes ``translated.model`` in place; all its taps must be among ``taps``."""
    import onnx_ir

    graph_model, aliases = translated.model, dict(translated.aliases)
    with _quiet():
        _optimize(graph_model)
        for value, name in zip(graph_model.graph.outputs, translated.signature.outputs, strict=False):
            value.name = name  # an output that is an input or another output has become an Identity with a name of its own
        for value, name in zip(graph_model.graph.inputs, translated.inputs, strict=False):
            value.name = name
        model = onnx_ir.serde.serialize_model(graph_model)
    _strip(model)
    aliases.update(_follow_identities(model, set(taps)))
    return Exported(model, aliases, translated.signature)


def _batch_of_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with two samples: export takes a size of 1 for a constant, in silence, and more than two only cost time."""
    leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    size = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 2)
    if size < 1:
        raise TargetError("the example is empty: its first tensor has no samples")
    index = torch.arange(2) % size
    leaves = [x[index.to(x.device)] if size != 2 and isinstance(x, Tensor) and x.dim() and x.shape[0] == size else x for x in leaves]
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def _split(outputs: Any, taps: int) -> tuple[Any, int]:
    """The model's own outputs and how many tensors they hold."""
    primary = outputs
    if taps:
        if not isinstance(outputs, (tuple, list)) or len(outputs) <= taps:
            raise TargetError(f"with {taps} taps the module must return a tuple (outputs..., *taps); got {type(outputs).__name__}")
        own = tuple(outputs[:-taps])
        primary = own[0] if len(own) == 1 else own
    leaves = torch.utils._pytree.tree_leaves(primary)
    return primary, sum(isinstance(leaf, Tensor) for leaf in leaves)


def _capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    batch = next((x.shape[0] for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), None)

    def free(leaf: Any) -> dict[int, Any] | None:
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else None

    shapes = {name: torch.utils._pytree.tree_map(free, value) for name, value in bind(module, args, kwargs).items()}
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            output: Any = program.graph.output_node()
            if any(not isinstance(value, torch.fx.Node) for value in output.args[0]):
                program = torch.export.export(_tensors_only(program), args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise TargetError(f"the model cannot be exported: {_first_line(error)}") from error
    _check_batch(program)
    return program


def _check_batch(program: torch.export.ExportedProgram) -> None:
    """Raises TargetError if the first input's dimension 0 came out as a number."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, Tensor) and value.dim():
            size: Any = value.shape[0]  # a size that was specialized may still be a SymInt, of a constant
            if isinstance(size, int) or size.node.maybe_as_int() is not None:
                raise TargetError(
                    f"the model fixes its batch: input {node.name!r} must have {size} samples. "
                    "Look for a batch size that is written as a number, or turned into one (int(x.shape[0]), torch.Size, a loop over samples)"
                )
            return


def _tensors_only(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program without the constants among its outputs: they live in the signature, and the translator knows tensors only."""
    module = program.module()
    output: Any = module.graph.output_node()
    kept = tuple(value for value in output.args[0] if isinstance(value, torch.fx.Node))
    output.args = (kept,)
    codegen: Any = module.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=torch.utils._pytree.tree_structure(kept))
    module.recompile()
    return module


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _name(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], taps: Sequence[str]) -> dict[str, str]:
    """Names inputs, outputs and taps by position; returns taps that are other names of a tensor that already has one."""
    values = list(model.graph.outputs)
    wanted = {*inputs, *outputs, *taps}
    for value in _values(model):
        if value.name in wanted:
            value.name = f"{value.name}.inner"
    if len(inputs) != len(model.graph.inputs):
        raise TargetError(f"the exported graph has {len(model.graph.inputs)} inputs for the tensors {', '.join(inputs)}")
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    named = {id(value): str(value.name) for value in model.graph.inputs}
    named |= {id(value): str(value.name) for value in model.graph.initializers.values()}
    aliases = {}
    for value, name in zip(values[: len(outputs)], outputs, strict=True):
        if id(value) not in named:
            value.name = named[id(value)] = name
    for value, tap in zip(values[len(outputs) :], taps, strict=True):
        if id(value) in named:
            aliases[tap] = named[id(value)]
        else:
            value.name = named[id(value)] = tap
    # taps that are other names need no output of their own; the model's own outputs must stay, in order
    keep = values[: len(outputs)] + [v for v, tap in zip(values[len(outputs) :], taps, strict=True) if tap not in aliases]
    model.graph.outputs.clear()
    model.graph.outputs.extend(keep)
    return aliases


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph:
        yield from node.outputs


def _optimize(model: ir.Model) -> None:
    """The exporter's own optimizer without its merging of equal initializers, and without folding transposed parameters and tables."""
    import onnx_ir as ir
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter

    def fold(node: ir.Node) -> bool | None:
        first = node.inputs[0] if node.inputs else None
        if first is None or not first.is_initializer():
            return None
        table = node.op_type == "Gather" and first.dtype == ir.DataType.FLOAT and first.shape is not None and len(first.shape) == 2
        return False if table or node.op_type == "Transpose" else None

    passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=fold)
        rewriter.rewrite(model)
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
    )(model)


def _strip(model: onnx.ModelProto) -> None:
    """Removes stack traces and doc strings: a third of a small file, with paths of the machine in it."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:]
    batch = ""
    for item in (*graph.input, *graph.output):
        dims = item.type.tensor_type.shape.dim
        if not batch and dims and dims[0].dim_param:
            batch = dims[0].dim_param
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    for item in (*graph.input, *graph.output):
        for dim in item.type.tensor_type.shape.dim:
            if batch and dim.dim_param == batch:
                dim.dim_param = "batch"
    for index, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{index}"
    model.producer_name, model.producer_version, model.doc_string, graph.name = "shohin", "", "", "graph"


def _follow_identities(model: onnx.ModelProto, taps: set[str]) -> dict[str, str]:
    """Removes Identity nodes that only give a tap a second name; returns tap -> the tensor's first name."""
    aliases = {}
    own = {o.name for o in model.graph.output if o.name not in taps}
    for node in list(model.graph.node):
        if node.op_type != "Identity" or node.output[0] not in taps:
            continue
        source, tap = node.input[0], node.output[0]
        for other in model.graph.node:
            other.input[:] = [source if i == tap else i for i in other.input]
        aliases[tap] = source
        model.graph.node.remove(node)
    if aliases:
        outputs = [o for o in model.graph.output if o.name not in aliases]
        del model.graph.output[:]
        model.graph.output.extend(outputs)
    for tap, source in aliases.items():
        while source in aliases:
            source = aliases[source]
        aliases[tap] = source
    if missing := own - {o.name for o in model.graph.output}:
        raise TargetError(f"the exporter lost the outputs {sorted(missing)}")
    return aliases


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter: it prints, warns and logs on every call."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
