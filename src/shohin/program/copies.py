"""Copies of a module tree that share its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from shohin.errors import ModelError
from shohin.program.refusals import first_lines


def structural_copy(model: nn.Module, replace: dict[int, Any] | None = None, *, share: bool = False) -> nn.Module:
    """A copy of the module tree that shares parameters and buffers, except those in ``replace`` (id -> new tensor).

    Tensors that are plain attributes are shared if nothing is replaced or with ``share``; else they are copied.
    Tensors that a hook computes before each forward (``weight`` of the old `torch.nn.utils.weight_norm`) are detached:
    `copy.deepcopy` refuses them.

    Raises:
        ModelError: if the module cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    computed = [t for t in _plain_tensors(model) if not t.is_leaf]
    memo.update({id(t): t.detach() for t in computed})
    if share or replace is None:
        memo.update({id(t): t for t in _plain_tensors(model) if t.is_leaf})
    memo.update(replace or {})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied (copy.deepcopy failed: {first_lines(error)}); remove what it holds that cannot be copied"
        ) from error


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Gives parameters that a module holds under other names, too, tensors of their own, in place."""
    for name in names:
        path, _, own = name.rpartition(".")
        held = model.get_parameter(name)
        setattr(model.get_submodule(path), own, nn.Parameter(held.detach().clone(), held.requires_grad))


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold as attributes, alone or in a list, tuple or dict, and that are neither parameters nor buffers."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (v for v in value if isinstance(v, Tensor))
            elif isinstance(value, dict) and value is not module._parameters and value is not module._buffers:
                yield from (v for v in value.values() if isinstance(v, Tensor))
