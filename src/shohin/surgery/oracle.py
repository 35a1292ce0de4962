"""The oracle: what a cut must compute, by zeroing in the user's own class. For tests and benchmarks; shares no code with rewrite, view and cut.

A removed unit is dead when every slice of it is zero: nothing reads it and, for queries and keys, it adds nothing to a score.
A normalization over the axis is different, since zeros count in its statistics: its module is run on the kept channels only.
What can be mirrored in neither way is named by `unspoken`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from shohin.graph import Graph, UnitGroup
from shohin.graph.labels.core import Array, Labels
from shohin.plan import Plan
from shohin.program import Program, family

#: operators that compute statistics and keep the shape
NORMALIZE = frozenset({"layer_norm", "group_norm", "rms_norm", "native_layer_norm", "native_group_norm"})
#: operators whose value changes when zeros are among what they reduce
AVERAGE = frozenset(
    {
        "mean",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "logsumexp",
        "softmax",
        "_softmax",
        "log_softmax",
        "_log_softmax",
        "sum",
        "max",
        "min",
        "linalg_vector_norm",
        "amax",
        "amin",
        "prod",
        "median",
        "quantile",
    }
)
#: its softmax is over the keys
ATTENTION = "scaled_dot_product_attention"
#: pools along their last axes, of which one may be a chosen one (local response normalization)
POOLS = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3}
#: operators that make one element of a computed weight depend on others
ENTANGLE = (
    AVERAGE | NORMALIZE | {"_weight_norm", "_weight_norm_interface", "norm", "linalg_vector_norm", "sum", "batch_norm", "linalg_norm"}
)


def oracle(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A whole copy of ``model`` in which the removed units do nothing.

    Args:
        model: the module that the graph was made from; not changed.
        plan: widths of groups that `unspoken` does not name; skips are ignored.

    Returns:
        The user's class with the original shapes: outputs equal those of the cut; a kept slice of a parameter has the gradient
        that the cut's parameter has.
    """
    result = copy.deepcopy(model)
    dead = removed_slices(graph, plan)
    mirrored, _ = _normalizations(model, graph)
    entangled = _entangled(graph.program)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, axes in dead.items():
            if name.rpartition(".")[0] in mirrored or name in entangled or name not in parameters:
                continue
            for axis, indices in axes.items():
                parameters[name].index_fill_(axis, torch.tensor(sorted(indices), dtype=torch.int64), 0)
    for path in mirrored:
        gone = {i for name, axes in dead.items() if name.rpartition(".")[0] == path for i in axes.get(0, ())}
        if gone:
            parent, _, leaf = path.rpartition(".")
            owner = result.get_submodule(parent)
            setattr(owner, leaf, Mirror(getattr(owner, leaf), gone))
    return result


def removed_slices(graph: Graph, plan: Plan) -> dict[str, dict[int, set[int]]]:
    """Tensor name -> {axis: indices} of everything that the plan's removed units own."""
    out: dict[str, dict[int, set[int]]] = {}
    for name, kept in plan.widths.items():
        group = graph.group(name)
        gone = [u for u in range(group.size) if u not in set(kept)]
        for tensor, axes in group.slices.items():
            for axis, units in axes.items():
                out.setdefault(tensor, {}).setdefault(axis, set()).update(int(i) for i in units[gone].reshape(-1))
    return out


def unspoken(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Group name -> the address of a normalization over its axis that has no module of its own to be mirrored."""
    return _normalizations(model, graph)[1]


class Mirror(nn.Module):
    """A normalization that sees only the kept channels: selects them, normalizes with sliced parameters, puts zeros elsewhere.

    Args:
        norm: a module whose parameters are vectors of one length.
        gone: indices of removed channels.
    """

    def __init__(self, norm: nn.Module, gone: Iterable[int]) -> None:
        super().__init__()
        self.whole = norm
        self.size = len(next(norm.parameters()))
        removed = set(gone)
        self.kept = torch.tensor([i for i in range(self.size) if i not in removed], dtype=torch.int64)
        self.norm = copy.deepcopy(norm)
        for name, parameter in list(self.norm.named_parameters(recurse=False)):
            setattr(self.norm, name, nn.Parameter(parameter.detach()[self.kept].clone()))
        if isinstance(norm, nn.GroupNorm):
            self.norm.num_groups = len({int(i) // (self.size // norm.num_groups) for i in self.kept})  # type: ignore[assignment]
        for name, value in list(vars(self.norm).items()):
            if type(value) is int and value == self.size:
                setattr(self.norm, name, len(self.kept))
            elif isinstance(value, (tuple, list, torch.Size)) and tuple(value) == (self.size,):
                setattr(self.norm, name, type(value)((len(self.kept),)))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the normalization, with zeros in removed channels."""
        axis = self._axis(x, args, kwargs)

        def select(value: Any) -> Any:
            same = isinstance(value, Tensor) and value.dim() == x.dim() and value.shape[axis] == self.size
            return value.index_select(axis, self.kept) if same else value

        part: Tensor = self.norm(select(x), *map(select, args), **{k: select(v) for k, v in kwargs.items()})
        shape = list(part.shape)
        shape[axis] = self.size
        return part.new_zeros(shape).index_copy(axis, self.kept, part)

    def __getattr__(self, name: str) -> Any:
        """What other modules read of a normalization (``norm.weight.dtype``)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("norm", "whole"):
                raise
            return getattr(self.norm, name)

    def _axis(self, x: Tensor, args: Any, kwargs: Any) -> int:
        """The axis along which the first element of the weight acts."""
        axes = [d for d in range(x.dim()) if x.shape[d] == self.size]
        if len(axes) == 1:
            return axes[0]
        with torch.no_grad():
            parameter = next(self.whole.parameters())
            before = self.whole(x, *args, **kwargs)
            parameter[0] += 1
            changed = self.whole(x, *args, **kwargs) != before
            parameter[0] -= 1
        return next(d for d in axes if not changed.narrow(d, 1, self.size - 1).any())


def _normalizations(model: nn.Module, graph: Graph) -> tuple[set[str], dict[str, str]]:
    """Paths of modules that can be mirrored, and the groups that meet a normalization which cannot."""
    program = graph.program
    owners = np.zeros((len(graph.groups), graph.label_count), dtype=bool)  # an element can have a head and a dim, both chosen
    for number, group in enumerate(graph.groups):
        for classes in group.units:
            owners[number, classes] = True
    modules = dict(model.named_modules(remove_duplicate=False))
    entangled = _entangled(program)
    mirrored: set[str] = set()
    silent: dict[str, str] = {}
    for node in program.graph.nodes:
        name = family(node) if node.op == "call_function" else ""
        pooled = POOLS.get(name, 0)
        if name not in NORMALIZE and name not in AVERAGE and name != ATTENTION and not pooled:
            continue
        origin = program.origins[node.name]
        parameters = {program.names[n.name] for n in node.all_input_nodes if n.name in program.names}
        entering = set().union(*(_groups(graph, owners, graph.labels.get(n.name)) for n in node.all_input_nodes))
        leaving = _groups(graph, owners, graph.labels.get(node.name))
        if "softmax" in name:
            leaving -= _groups(graph, owners, _along(graph.labels.get(node.name), node.args[1]))
        for group in graph.groups:
            if group.name not in entering:
                continue
            if pooled:
                value = graph.labels.get(node.all_input_nodes[0].name)
                over = any(group.name in _groups(graph, owners, _along(value, -1 - d)) for d in range(pooled))
            elif name == ATTENTION:
                over = group.name in _groups(graph, owners, _along(graph.labels.get(node.all_input_nodes[1].name), -2))
            elif name in NORMALIZE:
                over = bool(parameters & set(group.slices)) if parameters else group.normalized
            else:
                over = group.name not in leaving
            if over and _can_mirror(modules.get(origin.module), origin.module, group):
                mirrored.add(origin.module)
            elif over:
                silent.setdefault(group.name, f"{origin.address} computes statistics over it")
    for group in graph.groups:
        for tensor in entangled & set(group.slices):
            if any(axis > 0 for axis in group.slices[tensor]):
                silent.setdefault(group.name, f"{tensor} is normalized over it")
    return mirrored, silent


def _along(labels: Any, axis: Any) -> Any:
    """Labels on one axis only."""
    if not isinstance(labels, Labels) or not isinstance(axis, int):
        return None
    return Labels((labels.plane(axis % len(labels.shape)),), labels.shape)


def _can_mirror(module: nn.Module | None, path: str, group: UnitGroup) -> bool:
    if module is None or any(True for _ in module.children()):
        return False
    own = dict(module.named_parameters(recurse=False))
    size = max((len(p) for p in own.values() if p.dim() == 1), default=0)
    if not isinstance(module, nn.GroupNorm) and any(type(v) is int and 1 < v < size and size % v == 0 for v in vars(module).values()):
        return False  # it may normalize groups of channels: of that size, or of that number
    return bool(own) and all(p.dim() == 1 and 0 in group.slices.get(f"{path}.{n}", {}) for n, p in own.items())


def _groups(graph: Graph, owners: Array, labels: Any) -> set[str]:
    """Names of the groups whose units lie in a tensor."""
    found: set[int] = set()
    for one in labels if isinstance(labels, tuple) else () if labels is None else (labels,):
        for plane in one.planes:
            found.update(np.flatnonzero(owners[:, np.unique(plane)].any(axis=1)).tolist())
    return {graph.groups[i].name for i in found}


def _entangled(program: Program) -> set[str]:
    """Names of tensors from which a weight is computed so that one element depends on others (weight_norm, standardization)."""
    sources: dict[fx.Node, set[str]] = {}
    out: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.names:
            sources[node] = {program.names[node.name]}
        elif node.op == "call_function" and node.all_input_nodes and all(n in sources for n in node.all_input_nodes):
            sources[node] = set().union(*(sources[n] for n in node.all_input_nodes))
            if family(node) in ENTANGLE:
                out |= sources[node]
    return out


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Changes a fresh model in place so that no part of it hides another: statistics, affine parameters, biases, scales and what is
    initialised to constants become random, and weights are large enough to matter. Returns the model, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.dim() <= 1:
                parameter.add_(0.2 * noise(parameter))
                continue
            wanted = parameter[0].numel() ** -0.5
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            if spread < 1e-6:
                parameter.add_(0.5 * wanted * noise(parameter))
            elif spread < 0.5 * wanted:
                parameter.mul_(0.7 * wanted / spread)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.running_mean, Tensor):
                module.running_mean.copy_(0.3 * noise(module.running_mean))
                if isinstance(module.running_var, Tensor):
                    module.running_var.copy_(0.6 + 0.8 * torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def gradients_agree(
    whole: Mapping[str, Tensor | None], cut: Mapping[str, Tensor | None], kept: Mapping[str, Mapping[int, Any]]
) -> tuple[float, str]:
    """The largest relative difference between a cut's gradients and the kept slices of the oracle's, and where it is."""
    worst, where = 0.0, ""
    floor = 1e-4 * max((float(g.abs().max()) for g in whole.values() if g is not None and g.numel()), default=0.0) + 1e-30
    for name in sorted(set(whole) & set(cut)):
        a, b = whole[name], cut[name]
        if a is None or b is None:
            continue
        scale = max(float(a.abs().max()) if a.numel() else 0.0, floor)
        for axis, indices in kept.get(name, {}).items():
            a = a.index_select(axis, torch.as_tensor(indices))
        if a.shape != b.shape:
            return float("inf"), f"gradient of {name} has shape {tuple(b.shape)}, expected {tuple(a.shape)}"
        error = float((a - b).abs().max()) / scale if a.numel() else 0.0
        if not error <= worst:
            worst, where = error, f"gradient of {name}"
    return worst, where
