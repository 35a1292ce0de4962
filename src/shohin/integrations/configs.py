"""A model's configuration as the source of its sizes: which configuration attribute each size was computed from, and back.

The model's class is built once more, without memory, from a copy of its configuration whose integers remember where they
are held. A size then tells which attributes it is a product of, and a cut size what these must become. Whether a new
configuration holds a cut is decided by building from it and comparing every shape.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from shohin.program.provenance import Place, Source, Tagged

Shapes = dict[str, tuple[int, ...]]


def build(model: nn.Module, config: Any) -> nn.Module:
    """A new model of the same class from another configuration, on the meta device where its constructor allows."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return type(model)(config)
        except (RuntimeError, NotImplementedError):  # a constructor that reads values off tensors
            with nullcontext():
                return type(model)(config)


def shapes(model: nn.Module) -> Shapes:
    """Shapes of everything that a checkpoint holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def traced(model: nn.Module) -> nn.Module:
    """The model built again from a configuration of tagged integers (places are of module "", the configuration's own)."""
    config = copy.deepcopy(model.config)
    _tag(config, "", set())
    return build(model, config)


def _tag(held: Any, prefix: str, seen: set[int]) -> None:
    if id(held) in seen:
        return
    seen.add(id(held))
    for key, value in list(vars(held).items()):
        name = prefix + key
        if key.startswith("_"):
            continue
        if type(value) is int:
            vars(held)[key] = Tagged(value, Source(((Place("", name), value),)))
        elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
            vars(held)[key] = type(value)(Tagged(v, Source(((Place("", name, i), v),))) for i, v in enumerate(value))
        elif type(held).__module__.split(".")[0] == type(value).__module__.split(".")[0] and hasattr(value, "__dict__"):
            _tag(value, name + ".", seen)


def size_source(module: nn.Module, leaf: str, axis: int) -> Source | None:
    """What the size of one axis of a module's parameter was computed from, where the module says so."""
    first: Any = None
    if isinstance(module, nn.Linear):
        first = (module.out_features, module.in_features)[axis]
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        first = (module.out_channels, module.in_channels, None, None, None)[axis] if module.groups == 1 or axis == 0 else None
    elif isinstance(module, nn.Embedding):
        first = (module.num_embeddings, module.embedding_dim)[axis]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        first = module.normalized_shape[axis]
    elif {"nx", "nf"} <= vars(module).keys():
        first = module.nf if leaf == "bias" or axis == 1 else module.nx
    return first.source if isinstance(first, Tagged) else None


def solve(model: nn.Module, wanted: Shapes, integers: Mapping[Place, int]) -> dict[Place, int]:
    """Configuration places whose value must change so that parameters get the wanted shapes.

    Args:
        model: as `traced` gives it.
        integers: module attributes that operations read, and the values that they must have.
    """
    constraints: list[tuple[Source, int]] = []
    known: dict[Place, int] = {}
    for place, value in integers.items():
        integer = held(model, place)
        if isinstance(integer, Tagged):
            constraints.append((integer.source, value))
    for name, shape in wanted.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module._parameters.get(leaf), torch.Tensor):
            continue
        for axis, size in enumerate(shape):
            source = size_source(module, leaf, axis)
            if source is not None:
                constraints.append((source, size))
    current = {place: value for source, _ in constraints for place, value in source.factors}
    for count in sorted({len(source.factors) for source, _ in constraints}):
        for source, value in constraints:
            if len(source.factors) == count:
                solved = source.solve(value, known)
                if isinstance(solved, tuple):
                    known[solved[0]] = solved[1]
    return {place: value for place, value in known.items() if current[place] != value}


def held(model: nn.Module, place: Place) -> Any:
    """The attribute of a module; None if there is none."""
    try:
        owner: Any = model.get_submodule(place.module)
        for part in place.attribute.split("."):
            owner = getattr(owner, part)
        return owner if place.index is None else owner[place.index]
    except (AttributeError, IndexError, TypeError):
        return None


def changed(config: Any, values: Mapping[Place, int]) -> Any:
    """A copy of the configuration with new values."""
    config = copy.deepcopy(config)
    write(config, values)
    return config


def write(config: Any, values: Mapping[Place, int]) -> None:
    """Writes values into a configuration, in place."""
    for place, value in values.items():
        owner: Any = config
        *path, leaf = place.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        if place.index is None:
            setattr(owner, leaf, int(value))
        else:
            old = getattr(owner, leaf)
            setattr(owner, leaf, type(old)(value if i == place.index else v for i, v in enumerate(old)))


def differing(one: Shapes, other: Shapes) -> Iterable[str]:
    """Names whose shapes differ, or that one side lacks."""
    return (name for name in {**one, **other} if one.get(name) != other.get(name))
