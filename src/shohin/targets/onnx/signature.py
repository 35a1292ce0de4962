"""How a file is called: the torch model's parameters and output structure, kept in the file's own metadata."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from shohin.errors import TargetError

KEY = "shohin.signature"


class Outputs(dict[str, Any]):
    """Named outputs, by key, by attribute and by position (as model output classes allow)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)


# its tensors are found where those of any output are
register_pytree_node(
    Outputs,
    lambda value: (list(value.values()), tuple(value)),
    lambda values, keys: Outputs(zip(keys, values, strict=True)),
)


@dataclass(frozen=True)
class Signature:
    """The call of a file.

    Args:
        parameters: all parameters of the model's forward, in order.
        given: those that were given in the example, in order; their tensors are the file's inputs.
        structure: the outputs: ``{"tensor": i}``, ``{"tuple": [...]}``, ``{"list": [...]}``, ``{"dict": {...}}``,
            ``{"object": {...}}`` or ``{"value": constant}``.
        outputs: names of the output tensors.
    """

    parameters: tuple[str, ...]
    given: tuple[str, ...]
    structure: dict[str, Any]
    outputs: tuple[str, ...]

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any) -> Signature:
        """The signature of a call that returned ``outputs``."""
        counter: list[str] = []
        structure = _structure(outputs, counter)
        names = ("output",) if len(counter) == 1 else tuple(f"output.{i}" for i in range(len(counter)))
        parameters = tuple(inspect.signature(module.forward).parameters)
        return Signature(parameters, tuple(bind(module, args, kwargs)), structure, names)

    def feed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The input tensors of a call, in the file's order. Raises TargetError if an argument is missing or unknown."""
        bound = dict(zip(self.parameters, args, strict=False))
        bound.update(kwargs)
        if missing := [name for name in self.given if name not in bound]:
            raise TargetError(f"the file needs the arguments {', '.join(self.given)}; {', '.join(missing)} is missing")
        if extra := [name for name in bound if name not in self.given and bound[name] is not None]:
            raise TargetError(f"the file was made for the arguments {', '.join(self.given)}; {', '.join(extra)} cannot be given")
        return tensors([bound[name] for name in self.given])

    def unflatten(self, values: Sequence[Tensor]) -> Any:
        """The model's output structure from the file's output tensors."""
        return _build(self.structure, values)

    def to_json(self) -> str:
        """One line of JSON."""
        data = {"parameters": self.parameters, "given": self.given, "structure": self.structure, "outputs": self.outputs}
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Signature:
        """The inverse of `to_json`."""
        data = json.loads(text)
        return Signature(tuple(data["parameters"]), tuple(data["given"]), data["structure"], tuple(data["outputs"]))


def read_signature(path: str | Path) -> Signature | None:
    """What lowering left in a file; None if Shohin did not write it."""
    import onnx

    held = {p.key: p.value for p in onnx.load(str(path), load_external_data=False).metadata_props}
    return Signature.from_json(held[KEY]) if KEY in held else None


def numbered(
    path: Path, signature: Signature | None, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    """A call as the inputs of a file by name. Without a signature, tensors are taken by position.

    Raises:
        TargetError: if the call does not fit the file, or an input has a type that NumPy lacks.
    """
    found = signature.feed(args, kwargs) if signature else tensors([*args, *kwargs.values()])
    if len(found) != len(names):
        raise TargetError(f"{path.name} takes {len(names)} tensors ({', '.join(names)}); got {len(found)}")
    return {name: _to_numpy(tensor) for name, tensor in zip(names, found, strict=True)}


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    try:
        return np.ascontiguousarray(tensor.detach().cpu().numpy())
    except TypeError:
        raise TargetError(f"an input of type {tensor.dtype} cannot be given to a runtime; convert it to float32") from None


def call_outputs(signature: Signature | None, values: Sequence[Tensor]) -> Any:
    """A file's output tensors in the model's own structure; without a signature a tensor or a tuple."""
    if signature:
        return signature.unflatten(values)
    return values[0] if len(values) == 1 else tuple(values)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name, in the order of the signature. Raises TargetError if they do not fit."""
    try:
        return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TargetError(f"the example does not fit the model's forward: {error}") from None


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nested value, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _structure(value: Any, counter: list[str]) -> dict[str, Any]:
    if isinstance(value, Tensor):
        counter.append("")
        return {"tensor": len(counter) - 1}
    if isinstance(value, Mapping):
        # model output classes are mappings with attributes; keys that are None are not items of theirs
        kind = "dict" if type(value) is dict else "object"
        return {kind: {str(k): _structure(v, counter) for k, v in value.items()}}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"object": {k: _structure(getattr(value, k), counter) for k in value._fields}}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_structure(v, counter) for v in value]}
    if value is None or isinstance(value, (int, float, str, bool)):
        return {"value": value}
    raise TargetError(f"an output of type {type(value).__name__} cannot be kept in a file; outputs are tensors, tuples, lists and dicts")


def _build(structure: Mapping[str, Any], values: Sequence[Tensor]) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return values[content]
    if kind == "value":
        return content
    if kind in ("tuple", "list"):
        items = [_build(item, values) for item in content]
        return tuple(items) if kind == "tuple" else items
    named = {key: _build(item, values) for key, item in content.items()}
    return named if kind == "dict" else Outputs(named)
