"""Torch-Pruning on one model, as its README shows: half width, local ranking by magnitude, the final classifier left out.

What it pruned is read from the groups that it yields, and replayed on a copy of the original as zeros in the input slices of the
convolutions and linear layers that a group names: equal outputs mean that the pruned model computes the original without these
channels. Where that differs, a second and weaker reference is tried: the rows that make removed channels are zero as well (queries and
keys are read by no layer), and layer normalizations see the kept channels only. Where a normalization that cannot be replayed lies on
removed channels, the result is not judged.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sweep.entry import Entry
from sweep.numbers import Exact, difference, doubled, embedding_tables, outputs_of
from understanding.limits import Late, limit
from understanding.models import build, last_layer, runs, short, sizes

#: relative, in float64
TOLERANCE = 1e-8
REPLAYED = (nn.LayerNorm, nn.RMSNorm)
OBSCURE = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.LocalResponseNorm, nn.MultiheadAttention)


def pruner(model: nn.Module, arguments: Any, num_heads: dict[nn.Module, int] | None = None) -> Any:
    """The pruner with its documented defaults; heads of attention are not given unless asked."""
    import torch_pruning as tp

    args, kwargs = arguments
    last = last_layer(model, arguments)
    return tp.pruner.BasePruner(
        model,
        dict(kwargs) if kwargs else args[0] if len(args) == 1 else args,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        global_pruning=False,
        ignored_layers=[last] if last is not None else [],
        # its defaults, fresh: it fills the shared ones
        in_channel_groups={},
        out_channel_groups={},
        num_heads=num_heads or {},
    )


def timed(model: nn.Module, entry: Entry) -> dict[str, Any]:
    """Seconds of one pass on ``model``, which is changed: the dependency graph, all that precedes pruning, pruning."""
    import torch_pruning as tp

    seconds: dict[str, Any] = {}
    original = tp.DependencyGraph.build_dependency

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        found = original(*args, **kwargs)
        seconds["graph"] = time.process_time() - begun
        return found

    arguments = entry.arguments(1, 0)
    tp.DependencyGraph.build_dependency = call
    try:
        started = time.process_time()
        made = pruner(model, arguments)
        understood = time.process_time()
        made.step()
        seconds.update(understand=understood - started, cut=time.process_time() - understood)
    finally:
        tp.DependencyGraph.build_dependency = original
    return seconds


def steps(model: nn.Module, entry: Entry) -> Callable[[Callable[[str], None]], None]:
    """The same for measuring memory."""

    def go(note: Callable[[str], None]) -> None:
        made = pruner(model, entry.arguments(1, 0))
        note("understand")
        made.step()
        note("all")

    return go


def judged(entry: Entry, seconds: int, heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda _: {}) -> dict[str, Any]:
    """Whether it raises, runs, and is right; parameters left."""
    original = build(entry).double()
    model = copy.deepcopy(original)
    tables = embedding_tables(model)
    arguments = doubled(entry.arguments(1, 0))
    removed = Removed({}, {}, "")
    try:
        with limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = pruner(model, arguments, heads(model))
            removed = _prune(made)
    except Late as error:
        return {"verdict": "timeout", "detail": str(error)}
    except Exception as error:
        return {"verdict": "raised", "detail": short(error)}
    whole, left = sizes(original, tables)[0], sizes(model, tables)[0]
    found: dict[str, Any] = {"ratio": round(left / max(whole, 1), 4)}
    broken = runs(model, entry, double=True)
    if broken:
        return {**found, "verdict": "does not run", "detail": broken}
    arguments = doubled(entry.arguments(2, 9))
    with torch.no_grad(), Exact() if _casts(original, arguments) else nullcontext():
        got = outputs_of(model(*arguments[0], **arguments[1]))
        zero_in_place(original, removed.read)
        error, where = _difference(got, outputs_of(original(*arguments[0], **arguments[1])))
        if error > TOLERANCE:
            weaken(original, removed.made)
            error, where = _difference(got, outputs_of(original(*arguments[0], **arguments[1])))
            found["second_reference"] = True
    found["error"] = error
    if error <= TOLERANCE:
        return {**found, "verdict": "right" if left < whole else "nothing pruned", "detail": ""}
    if removed.obscured:
        return {**found, "verdict": "not checked", "detail": f"removed channels go through {removed.obscured}, which cannot be replayed"}
    return {**found, "verdict": "wrong", "detail": where if error == float("inf") else f"{where}, {error:.1e}"}


def _difference(got: list[Tensor], wanted: list[Tensor]) -> tuple[float, str]:
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf"), f"output shape {[tuple(t.shape) for t in got][:2]}"
    return difference(got, wanted, "output")


@dataclass(frozen=True)
class Removed:
    """Channels of the original that were removed, by module name.

    Args:
        read: input channels of convolutions and linear layers.
        made: output channels of these, and channels of layer normalizations.
        obscured: a module on removed channels that cannot be replayed, or "".
    """

    read: dict[str, set[int]]
    made: dict[str, set[int]]
    obscured: str


def _prune(made: Any) -> Removed:
    """Prunes group by group, and keeps what was removed."""
    graph = made.DG
    names = {m: n for n, m in made.model.named_modules()}
    alive: dict[tuple[str, bool], list[int]] = {}
    removed: dict[bool, dict[str, set[int]]] = {True: {}, False: {}}
    obscured = ""
    for group in made.step(interactive=True):
        for dependency, indices in group:
            module = dependency.target.module
            if not indices or not isinstance(module, nn.Module) or module not in names:
                continue
            name = names[module]
            inward = bool(graph.is_in_channel_pruning_fn(dependency.handler)) and not isinstance(module, REPLAYED)
            if isinstance(module, OBSCURE):
                obscured = obscured or f"{name} ({type(module).__name__})"
            if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, *REPLAYED)):
                continue
            if (name, inward) not in alive:
                alive[name, inward] = list(range(_width(module, inward)))
            gone = {int(getattr(i, "idx", i)) for i in indices}
            channels = alive[name, inward]
            removed[inward].setdefault(name, set()).update(channels[i] for i in gone)
            alive[name, inward] = [c for i, c in enumerate(channels) if i not in gone]
        group.prune()
    return Removed(removed[True], removed[False], obscured)


def _width(module: nn.Module, inward: bool) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features if inward else module.out_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels if inward else module.out_channels
    return int(module.weight.numel())  # type: ignore[union-attr, operator]


def weaken(model: nn.Module, made: dict[str, set[int]]) -> None:
    """Zeros the rows that make the given channels, and lets layer normalizations see the others only, in place."""
    for name, channels in made.items():
        layer, gone = model.get_submodule(name), sorted(channels)
        if isinstance(layer, REPLAYED):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Partial(layer, gone))
        elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and not isinstance(layer, nn.modules.conv._ConvTransposeNd):
            with torch.no_grad():
                layer.weight[gone] = 0
                if layer.bias is not None:
                    layer.bias[gone] = 0


class Partial(nn.Module):
    """A layer normalization of the channels that are left; zeros elsewhere."""

    def __init__(self, norm: nn.Module, gone: list[int]) -> None:
        super().__init__()
        size = _width(norm, False)
        self.size, self.kept = size, torch.tensor([i for i in range(size) if i not in set(gone)])
        self.norm: Any = copy.deepcopy(norm)
        self.norm.normalized_shape = (len(self.kept),)
        for key, parameter in list(self.norm.named_parameters(recurse=False)):
            setattr(self.norm, key, nn.Parameter(parameter.detach()[self.kept]))

    def forward(self, x: Tensor) -> Tensor:
        """As the normalization; channels lie last, or second where the class says so."""
        plain = type(self.norm).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        axis = x.dim() - 1 if plain or x.shape[1] != self.size else 1
        part: Tensor = self.norm(x.index_select(axis, self.kept))
        return torch.zeros_like(x).index_copy(axis, self.kept, part)


def zero_in_place(model: nn.Module, dead: dict[str, set[int]]) -> None:
    """Zeros what reads the given input channels, in place."""
    with torch.no_grad():
        for name, channels in dead.items():
            layer = model.get_submodule(name)
            for channel in channels:
                if isinstance(layer, nn.Linear):
                    layer.weight[:, channel] = 0
                elif isinstance(layer, nn.modules.conv._ConvTransposeNd):
                    layer.weight[channel] = 0
                elif isinstance(layer, nn.modules.conv._ConvNd):
                    group, place = divmod(channel, layer.in_channels // layer.groups)
                    rows = layer.out_channels // layer.groups
                    layer.weight[group * rows : (group + 1) * rows, place] = 0


def _casts(model: nn.Module, arguments: Any) -> bool:
    """Whether something inside returns float32 for float64."""
    found = False

    def look(_: Any, __: Any, result: Any) -> None:
        nonlocal found
        found = found or any(isinstance(t, Tensor) and t.dtype is torch.float32 for t in pytree.tree_leaves(result))

    hooks = [m.register_forward_hook(look) for m in model.modules()]
    with torch.no_grad():
        model(*arguments[0], **arguments[1])
    for hook in hooks:
        hook.remove()
    return found
