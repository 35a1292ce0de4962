"""Lowering: a torch module and its quantizers to the one ONNX file that ships."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from shohin.errors import TargetError, closest
from shohin.formats import Quantizer
from shohin.run import write_atomic
from shohin.targets.base import Lowered
from shohin.targets.onnx import dynamic as ranging
from shohin.targets.onnx import few_bits, tables
from shohin.targets.onnx.edges import Layer, array, layers
from shohin.targets.onnx.export import Exported, export
from shohin.targets.onnx.qdq import insert_qdq, same, smooth
from shohin.targets.onnx.rewrite import drop_outputs, drop_unused, flatten_linears, fold_transposes, pool_means, rename, shield_float
from shohin.targets.onnx.signature import KEY

if TYPE_CHECKING:
    import onnx

LAYERS, ALIASES = "shohin.layers", "shohin.aliases"
_LIMIT = 2**31 - 2**20


@dataclass(frozen=True)
class Rules:
    """What a runtime asks of grids before it runs integer kernels.

    Args:
        conform: (model, grids by tensor as asked, the layers whose weights are quantized) -> grids that the runtime can use, for every
            tensor that needs one, and name -> reason for each that is not the one asked for.
        remarks: (model, grids, layers, names of quantized weights) -> layers that will not run as asked, as far as the graph alone tells.
        flat: whether integer linear layers on sequences must be products of two matrices.
    """

    conform: Callable[[onnx.ModelProto, Mapping[str, Quantizer], Iterable[Layer]], tuple[dict[str, Quantizer], dict[str, str]]]
    remarks: Callable[[onnx.ModelProto, Mapping[str, Quantizer], Iterable[Layer], Iterable[str]], list[str]]
    flat: bool


def lower(
    module: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    rules: Rules,
    *,
    kwargs: Mapping[str, Any] | None = None,
    taps: Sequence[str] = (),
    activations: Mapping[str, Quantizer] | None = None,
    weights: Mapping[str, Quantizer] | None = None,
    dynamic: Collection[str] = (),
) -> Lowered:
    """Writes an ONNX file (opset 20, one file, free batch), quantized where quantizers are given.

    Args:
        module: in eval mode. With taps it returns ``(outputs..., *taps)``.
        args, kwargs: an example call; its batch is cut or repeated to 2, because export takes 1 for a constant.
        path: of the file; replaced atomically.
        rules: of the runtime that is to read the file.
        taps: names for the extra outputs, in order. Each names its tensor in the file and is not an output of the file.
        activations: tap or input name -> per-tensor 8-bit quantizer.
        weights: parameter name -> quantizer, per tensor or per output channel; with groups the layer keeps float activations
            (see `shohin.targets.onnx.few_bits`); of a table that is looked up, one scale for each row.
        dynamic: of these the weights of linear layers that round their input in the range that it has itself.

    Raises:
        TargetError: if the module does not export, a name matches nothing, or a quantizer does not fit.
    """
    if len(set(taps)) != len(taps):
        raise TargetError(f"tap names must differ; twice: {sorted({t for t in taps if list(taps).count(t) > 1})}")
    exported = export(module, args, kwargs or {}, taps)
    parameters, buffers = dict(module.named_parameters(remove_duplicate=False)), dict(module.named_buffers(remove_duplicate=False))
    return write(
        exported, path, parameters, buffers, rules, taps=taps, activations=activations or {}, weights=weights or {}, dynamic=dynamic
    )


def write(
    exported: Exported,
    path: str | Path,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    rules: Rules,
    *,
    taps: Sequence[str],
    activations: Mapping[str, Quantizer],
    weights: Mapping[str, Quantizer],
    dynamic: Collection[str] = (),
) -> Lowered:
    """The second half of `lower`: an exported model (which is changed) to a file.

    Args:
        parameters, buffers: of the module that was exported, tied ones under each of their names.
    """
    import onnx

    model, aliases = exported.model, exported.aliases
    tied = _untie(model, parameters)
    pool_means(model)
    transposed = fold_transposes(model)
    own = set(exported.signature.outputs)
    drop_outputs(model, set(taps) - own)
    aliases.update(tied)
    drop_unused(model)
    found = layers(model, transposed)
    by_name = tied | _resolve(model, {**parameters, **buffers}, found, {k: v for k, v in weights.items() if k not in tied})
    given = {by_name.get(name, name): quantizer for name, quantizer in weights.items()}
    rows = tables.looked_up(model, given.keys() - {layer.weight for layer in found})  # a layer's own codes serve a lookup as they are
    tables.insert(model, {name: given.pop(name) for name in rows})
    moving = {by_name.get(name, name): given.pop(by_name.get(name, name)) for name in sorted(dynamic)}
    chosen = {name: q for name, q in given.items() if q.group is None}
    grouped = {name: q for name, q in given.items() if q.group is not None}
    outputs = {layer.weight: layer.output for layer in found}
    if rules.flat:
        flatten_linears(model, [layer for layer in layers(model, transposed) if layer.weight in chosen])
    found = layers(model, transposed)
    for index, layer in enumerate(found):  # optimizations keep node names: so a layer is found again in the optimized graph
        again = sum(other.weight == layer.weight for other in found[:index])
        layer.node.name = f"{layer.weight}:{again}" if again else layer.weight
    asked, smoothed = smooth(model, _by_tensor(model, activations, aliases), found, chosen)
    found = layers(model, transposed) if smoothed else found
    fitted, reasons = rules.conform(model, asked, [layer for layer in found if layer.weight in chosen])
    notes = rules.remarks(model, fitted, found, chosen)
    shield_float(model, [layer for layer in found if layer.weight not in given.keys() | moving.keys()], fitted)
    few_bits.insert(model, grouped, found)
    ranging.insert(model, moving, found)
    insert_qdq(model, fitted, chosen, layers(model, transposed) if grouped or moving else found)
    del model.graph.value_info[:]
    for key, value in ((KEY, exported.signature.to_json()), (LAYERS, json.dumps(outputs)), (ALIASES, json.dumps(aliases))):
        model.metadata_props.add(key=key, value=value)
    if model.ByteSize() > _LIMIT:
        raise TargetError(f"the model is {model.ByteSize() / 2**30:.1f} GiB; a single ONNX file holds at most 2 GiB")
    data = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(data)
    path = Path(path)
    write_atomic(path, data)
    names = {name: aliases.get(name, name) for name in activations}
    used = {name: fitted[tensor] for name, tensor in names.items() if tensor in fitted}
    used |= {name: activations[name] for name, tensor in names.items() if any(even in fitted for even in smoothed.get(tensor, ()))}
    adjusted = {name: reasons[tensor] for name, tensor in names.items() if tensor in reasons}
    return Lowered(path, len(data), used, adjusted, outputs, aliases, tuple(notes))


def _untie(model: onnx.ModelProto, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Names tied parameters by the first of their names; returns other name -> first name."""
    first: dict[int, str] = {}
    out = {}
    for name, parameter in parameters.items():
        if first.setdefault(id(parameter), name) != name:
            out[name] = first[id(parameter)]
    held = {i.name for i in model.graph.initializer}
    for name, original in out.items():
        if name in held and original not in held:
            rename(model, name, original)
            held.add(original)
    return out


def _by_tensor(model: onnx.ModelProto, activations: Mapping[str, Quantizer], aliases: Mapping[str, str]) -> dict[str, Quantizer]:
    """Quantizers by tensor of the graph; two names of one tensor must agree."""
    tensors = {o for node in model.graph.node for o in node.output} | {i.name for i in model.graph.input}
    out: dict[str, Quantizer] = {}
    for name, quantizer in activations.items():
        tensor = aliases.get(name, name)
        if tensor not in tensors:
            raise TargetError(f"no tap or input is named {name!r}{closest(name, [*aliases, *tensors])}")
        if tensor in out and not same(out[tensor], quantizer):
            raise TargetError(f"{name!r} is another name of the tensor {tensor!r}, and their quantizers differ; give one of them")
        out[tensor] = quantizer
    return out


def _resolve(
    model: onnx.ModelProto, values: Mapping[str, Tensor], found: Sequence[Layer], weights: Mapping[str, Quantizer]
) -> dict[str, str]:
    """Parameter name -> layer weight name in the file, for parameters that the export names otherwise (tied, or computed)."""
    known = {layer.weight for layer in found} | {i.name for i in model.graph.initializer}
    initializers = {i.name: i for i in model.graph.initializer}
    out = {}
    for name in weights:
        if name in known:
            continue
        if name not in values:
            raise TargetError(f"the model has no parameter {name!r}{closest(name, values)}")
        value = values[name].detach().cpu().numpy()
        for layer in found:
            held = array(initializers[layer.initializer])
            held = held.T if layer.transposed else held
            if held.shape == value.shape and np.array_equal(held, value):
                out[name] = layer.weight
                break
        else:
            raise TargetError(f"no layer of the graph holds the values of the parameter {name!r}; is it used, and not computed from?")
    return out
