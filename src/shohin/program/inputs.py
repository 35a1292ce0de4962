"""The arguments of one call: how they are written, which of them are tensors, and how they are brought into one form."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.errors import DataError, ModelError

#: values beside tensors that a call may hold; a program is captured for one value of each
FIXED = (bool, str, type(None))


def call_of(example: Any) -> Call:
    """An example as a call: a `Call`, a tuple of positional arguments, a dict of keyword arguments, or one tensor."""
    if isinstance(example, Call):
        return example
    if isinstance(example, Tensor):
        return Call((example,), {}, None, None)
    if isinstance(example, Mapping):
        return Call((), dict(example), None, None)
    if not isinstance(example, (tuple, list)):
        raise ModelError(f"an example is a tensor, a tuple of arguments or a dict of keyword arguments, not {type(example).__name__}")
    return Call(tuple(example), {}, None, None)


def in_order(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments in the order of the signature of forward: one call has one form however it is written."""
    names = list(inspect.signature(model.forward).parameters)
    return dict(sorted(kwargs.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))


def batch_of(values: Any) -> int | None:
    """The first dimension of the first tensor that has one."""
    return next((int(x.shape[0]) for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.dim()), None)


def at_least_two(values: Any) -> Any:
    """The values with a batch of 1 repeated to 2."""
    if batch_of(values) != 1:
        return values
    return pytree.tree_map_only(Tensor, lambda x: x.repeat(2, *[1] * (x.dim() - 1)) if x.dim() and x.shape[0] == 1 else x, values)


def first_two(values: Any) -> Any:
    """The values with the first two samples of a larger batch."""
    size = batch_of(values)
    return pytree.tree_map_only(Tensor, lambda x: x[:2] if x.dim() and len(x) == size else x, values)


def samples(inputs: tuple[Any, ...], size: int, start: int, stop: int) -> tuple[Any, ...]:
    """Some samples of a batch of ``size``: tensors with as many rows are cut, all else is of every sample."""
    if start <= 0 and stop >= size:
        return inputs
    return tuple(x[start:stop] if isinstance(x, Tensor) and x.dim() and len(x) == size else x for x in inputs)


def dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Dynamic first dimensions by parameter name, as torch.export wants them."""
    shapes = pytree.tree_map(lambda x: {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None, (args, kwargs))
    return dict(inspect.signature(model.forward).bind_partial(*shapes[0], **shapes[1]).arguments)


def name_keywords(copy: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Shows the names of a call in the signature of a private copy whose forward takes ``**kwargs``: export needs them."""
    signature, forward = inspect.signature(copy.forward), copy.forward
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [name for name in kwargs if name not in {p.name for p in kept}]
    if not more:
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*kept, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more)]
    )
    copy.forward = named


def describe_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Shapes and types of a call, for messages."""
    return ", ".join([_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()])


def _describe(value: Any) -> str:
    return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else type(value).__name__


def open_dataclasses(value: Any, what: str) -> None:
    """Registers the dataclasses inside a value with torch's pytrees, so that they are taken apart and put together again.

    Raises:
        ModelError: for an object that is neither a tensor, a number, None nor a container that can be taken apart.
    """
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, (Tensor, int, float, complex, str, torch.dtype, torch.device, type(None))):
            continue
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            open_dataclasses(leaf, what)
            continue
        raise ModelError(
            f"the model's {what} holds a {type(leaf).__name__}; only tensors, numbers, None, tuples, lists, dicts and dataclasses of these "
            "can be followed. Give or return these, or switch it off (use_cache=False, for instance)"
        )


def arranged(call: tuple[tuple[Any, ...], dict[str, Any]], spec: Any, signature: inspect.Signature, example: Sequence[Any]) -> list[Any]:
    """The flat arguments of a call in the form that the example had: positional or by keyword, defaults left out or not.

    Args:
        example: flat values of the captured call; what is not a tensor must be equal in every call.

    Raises:
        DataError: if the call cannot be brought into this form.
    """
    flat, own = pytree.tree_flatten(call)
    if own != spec:
        flat, own = pytree.tree_flatten(_rebound(call, spec, signature, example))
    if own != spec:
        raise DataError(f"a batch calls the model as {own}, but the example was {spec}: all batches must have one structure")
    for x, known in zip(flat, example, strict=True):
        if isinstance(known, Tensor) != isinstance(x, Tensor) or (isinstance(known, FIXED) and x != known):
            raise DataError(f"a batch gives {_describe(x)} {'' if isinstance(x, Tensor) else x!r} where the example gave {_value(known)}")
    return flat


def _value(known: Any) -> str:
    return _describe(known) if isinstance(known, Tensor) else repr(known)


def _rebound(call: Any, spec: Any, signature: inspect.Signature, example: Sequence[Any]) -> Any:
    """The call with the arguments that the example gave, in the way in which it gave them."""
    wanted_args, wanted_kwargs = pytree.tree_unflatten(list(example), spec)
    try:
        given = signature.bind(*call[0], **call[1])
        wanted = signature.bind(*wanted_args, **wanted_kwargs)
    except TypeError:
        return call
    own, theirs = given.arguments, wanted.arguments
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    for name in own.keys() - theirs.keys():
        if name not in defaults or own[name] is not defaults[name]:
            raise DataError(f"a batch gives the argument {name!r}, which the example did not give: all batches must have one structure")
    missing = [name for name in theirs if name not in own]
    if any(name not in defaults for name in missing):
        return call
    wanted.arguments.update({name: own.get(name, defaults.get(name)) for name in theirs})
    args, kwargs = list(wanted.args), dict(wanted.kwargs)
    for name in list(wanted_kwargs):  # bound arguments that can be positional are given by position
        if name not in kwargs and name in theirs:
            kwargs[name] = wanted.arguments[name]
    return tuple(args[: len(wanted_args)]), {name: kwargs[name] for name in wanted_kwargs if name in kwargs}
