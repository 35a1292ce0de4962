"""Torch-Pruning on one model, as its README shows: half width, local ranking by magnitude, the final classifier left out.

What it pruned is read from the groups that it yields, and replayed on a copy of the original as zeros in the input slices of the
convolutions and linear layers that a group names: equal outputs mean that the pruned model computes the original without these
channels. Where a layer or group normalization lies on pruned channels this does not hold, and the result is not judged.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sweep.entry import Entry
from sweep.numbers import Exact, difference, doubled, outputs_of
from understanding.limits import Late, limit
from understanding.models import build, embedding_tables, last_layer, runs, short, sizes

#: relative, in float64
TOLERANCE = 1e-8
NORMALIZATIONS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


def pruner(model: nn.Module, arguments: Any) -> Any:
    """The pruner with its documented defaults; heads of attention are not given."""
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
        num_heads={},
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


def judged(entry: Entry, seconds: int) -> dict[str, Any]:
    """Whether it raises, runs, and is right; parameters left."""
    original = build(entry).double()
    model = copy.deepcopy(original)
    tables = embedding_tables(model)
    arguments = doubled(entry.arguments(1, 0))
    dead: dict[str, set[int]] = {}
    try:
        with limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = pruner(model, arguments)
            normalized = _prune(made, dead)
    except Late as error:
        return {"verdict": "timeout", "detail": str(error)}
    except Exception as error:
        return {"verdict": "raised", "detail": short(error)}
    whole, left = sizes(original, tables)[0], sizes(model, tables)[0]
    found: dict[str, Any] = {"ratio": round(left / max(whole, 1), 4), "normalized": normalized}
    broken = runs(model, entry, double=True)
    if broken:
        return {**found, "verdict": "does not run", "detail": broken}
    arguments = doubled(entry.arguments(2, 9))
    with torch.no_grad(), Exact() if _casts(original, arguments) else nullcontext():
        got = outputs_of(model(*arguments[0], **arguments[1]))
        zero_in_place(original, dead)
        wanted = outputs_of(original(*arguments[0], **arguments[1]))
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return {**found, "verdict": "wrong", "detail": f"output shape {[tuple(t.shape) for t in got][:2]}"}
    error, where = difference(got, wanted, "output")
    if error <= TOLERANCE:
        return {**found, "verdict": "right" if left < whole else "nothing pruned", "detail": "", "error": error}
    if normalized:
        return {**found, "verdict": "not checked", "detail": f"a normalization lies on pruned channels ({normalized})"}
    return {**found, "verdict": "wrong", "detail": f"{where}, {error:.1e}", "error": error}


def _prune(made: Any, dead: dict[str, set[int]]) -> str:
    """Prunes group by group; fills module name -> original input channels removed. Returns a normalization on pruned channels, or ""."""
    graph = made.DG
    names = {m: n for n, m in made.model.named_modules()}
    alive: dict[str, list[int]] = {}
    normalized = ""
    for group in made.step(interactive=True):
        for dependency, indices in group:
            module = dependency.target.module
            if not indices or not isinstance(module, nn.Module) or module not in names:
                continue
            if isinstance(module, (*NORMALIZATIONS, nn.MultiheadAttention)):
                normalized = normalized or names[module]
            inward = graph.is_in_channel_pruning_fn(dependency.handler)
            if inward and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                name = names[module]
                size = module.in_features if isinstance(module, nn.Linear) else module.in_channels
                channels = alive.setdefault(name, list(range(size)))
                gone = {int(getattr(i, "idx", i)) for i in indices}
                dead.setdefault(name, set()).update(channels[i] for i in gone)
                alive[name] = [c for i, c in enumerate(channels) if i not in gone]
        group.prune()
    return normalized


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
