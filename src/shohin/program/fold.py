"""Batch normalization folded into the convolution or linear layer before it: the program that ships."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from shohin.program.origins import family
from shohin.program.program import Program

CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))


@dataclass(frozen=True, eq=False)
class Folded:
    """A program without the normalizations that could be folded.

    Args:
        program: with the folded graph, tensors and names.
        folded: weight name -> names of the batch normalization's (weight, bias, mean, variance) and its eps.
    """

    program: Program
    folded: Mapping[str, tuple[tuple[str | None, ...], float]]


def with_graph(program: Program, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> Program:
    """The program with another graph (of the same node names) and other values of its tensors."""
    used = {n.name for n in graph.nodes if n.op == "placeholder"}
    names = {node: name for node, name in program.names.items() if node in used}
    return replace(program, graph=graph, names=names, tensors={name: tensors.get(name, program.tensors[name]) for name in names.values()})


def fold(program: Program) -> Folded:
    """Folds each evaluation-mode batch normalization whose input is a convolution or linear layer that nothing else reads.

    The biases that this makes are named after the weight (``conv.weight`` -> ``conv.bias``). Values are computed in float64.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: mapping[n]))
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    names, tensors, trainable = dict(program.names), dict(program.tensors), set(program.trainable)
    folded: dict[str, tuple[tuple[str | None, ...], float]] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or family(node) != "batch_norm":
            continue
        layer: Any = node.args[0]
        if not _foldable(layer, node, names):
            continue
        args: Any = node.args
        vectors = [names.get(a.name) if isinstance(a, fx.Node) else None for a in args[1:5]]
        weight_name = names[layer.args[1].name]
        bias_node = layer.args[2] if len(layer.args) > 2 else None
        weight = tensors[weight_name].detach().double()
        bias = (
            tensors[names[bias_node.name]].detach().double()
            if isinstance(bias_node, fx.Node)
            else torch.zeros(len(weight), dtype=torch.float64)
        )
        gamma, beta, mean, variance = (None if v is None else tensors[v].detach().double() for v in vectors)
        if mean is None or variance is None:
            continue
        scale = (1.0 if gamma is None else gamma) / torch.sqrt(variance + float(args[7]))
        tensors[weight_name] = (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(program.tensors[weight_name].dtype)
        new_bias = ((bias - mean) * scale + (0.0 if beta is None else beta)).to(tensors[weight_name].dtype)
        bias_name = names[bias_node.name] if isinstance(bias_node, fx.Node) else _bias_name(weight_name, tensors)
        tensors[bias_name] = new_bias
        trainable.add(bias_name)
        if not isinstance(bias_node, fx.Node):
            with graph.inserting_before(next(iter(graph.nodes))):
                placeholder = graph.placeholder("b_" + bias_name.replace(".", "_"))
            placeholder.meta["val"] = new_bias
            names[placeholder.name] = bias_name
            layer.args = (*layer.args[:2], placeholder, *layer.args[3:])
        folded[weight_name] = (tuple(vectors), float(args[7]))
        node.replace_all_uses_with(layer)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in names and not node.users:
            graph.erase_node(node)
            del names[node.name]
    kept = set(names.values())
    result = replace(
        program,
        graph=graph,
        names=names,
        tensors={n: t for n, t in tensors.items() if n in kept},
        trainable=frozenset(trainable & kept),
        origins={n: o for n, o in program.origins.items()},
    )
    return Folded(result, folded)


def _foldable(layer: Any, norm: fx.Node, names: Mapping[str, str]) -> bool:
    return (
        isinstance(layer, fx.Node)
        and layer.op == "call_function"
        and family(layer) in CONVOLUTIONS | {"linear"}
        and len(layer.users) == 1
        and norm.args[5] is False
        and isinstance(layer.args[1], fx.Node)
        and layer.args[1].name in names
        and len(layer.args[1].users) == 1
        and (len(layer.args) < 3 or not isinstance(layer.args[2], fx.Node) or len(layer.args[2].users) == 1)
        and (family(layer) != "linear" or len(layer.meta["val"].shape) == 2)
        and all(len(v.users) == 1 for v in norm.args[1:5] if isinstance(v, fx.Node))  # its own: not shared by two layers
    )


def _bias_name(weight: str, tensors: Mapping[str, Tensor]) -> str:
    name = weight.removesuffix("weight") + "bias"
    while name in tensors:
        name += "_folded"
    return name


def unfold_state(folded: Folded, state: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for the original tensors under which the unfolded program equals the folded one with values ``state``.

    A folded normalization becomes the identity plus the bias: mean 0, variance 1, weight ``sqrt(1 + eps)``; without a weight
    of its own the variance is ``1 - eps``, and without a bias of its own the mean is minus the bias.
    """
    out = {name: tensor.detach().clone() for name, tensor in original.items()}
    for name, tensor in state.items():
        if name in out and name not in folded.folded:
            out[name] = tensor.detach().clone()
    biases = _biases(folded.program)
    for weight_name, (vectors, eps) in folded.folded.items():
        gamma, beta, mean, variance = vectors
        out[weight_name] = state[weight_name].detach().clone()
        bias_name = biases[weight_name]
        bias = state[bias_name].detach()
        if mean is None or variance is None:
            continue
        out[mean] = torch.zeros_like(original[mean])
        out[variance] = torch.full_like(original[variance], 1 - eps if gamma is None else 1)
        if gamma is not None:
            out[gamma] = torch.full_like(original[gamma], (1 + eps) ** 0.5)
        if beta is not None:
            out[beta] = bias.clone()
        else:
            out[mean] = -bias
        if bias_name in original:
            out[bias_name] = torch.zeros_like(original[bias_name])
    return out


def _biases(program: Program) -> dict[str, str]:
    """Weight name -> bias name, of every convolution and linear layer that has both."""
    return {
        program.names[weight.name]: program.names[bias.name]
        for node in program.graph.nodes
        if node.op == "call_function" and family(node) in CONVOLUTIONS | {"linear"} and len(node.args) > 2
        for weight, bias in [node.args[1:3]]
        if isinstance(weight, fx.Node) and isinstance(bias, fx.Node) and {weight.name, bias.name} <= program.names.keys()
    }
