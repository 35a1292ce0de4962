"""A program: the exported graph of a model, its tensors by qualified name, and where each operation came from."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shohin.program.provenance import Source


@dataclass(frozen=True)
class Origin:
    """Where an operation comes from.

    Args:
        address: ``module path/family.ordinal``.
        module: path of the module whose forward runs it.
        line: the user's source line ("model.py:12 in forward: x = x.view(...)"), or "".
    """

    address: str
    module: str
    line: str


class _Name(str):
    """A node in the text of an operation's arguments, which no string argument can be taken for."""

    def __repr__(self) -> str:
        return f"<{self}>"


@dataclass(frozen=True, eq=False)
class Program:
    """The exported graph of a model.

    Args:
        graph: placeholders (parameters, buffers and constants, then inputs), operations, output. Every operation is functional.
        names: placeholder node name -> qualified tensor name, for tensors that the model owns.
        tensors: qualified name -> the model's own tensor (never a copy); tied tensors under each of their names.
        trainable: names that are parameters (the rest are buffers or constants).
        inputs: input placeholder node names, in flattened order.
        input_names: their names in the model's forward, which exported files use.
        in_spec, out_spec: pytree specs of ``(args, kwargs)`` and of the outputs.
        example: flattened example inputs, batch >= 2.
        signature: of the model's forward, without ``self``.
        origins: operation node name -> `Origin`.
        sources: (node name, flattened argument position) -> the attribute that gave this integer, where it is known.
        remarks: what lies outside the program (hooks, static batch...), one sentence each.
        training: True if training mode was captured.
        plan_fingerprint: of the evaluation program whose plans a training program accepts; "" for its own.
        fixed: input placeholder whose batch is a number in the program -> why, as the remark says it.
    """

    graph: fx.Graph
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    trainable: frozenset[str]
    inputs: tuple[str, ...]
    input_names: tuple[str, ...]
    in_spec: Any
    out_spec: Any
    example: tuple[Any, ...]
    signature: inspect.Signature
    origins: Mapping[str, Origin]
    sources: Mapping[tuple[str, int], Source] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    training: bool = False
    plan_fingerprint: str = ""
    fixed: Mapping[str, str] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Batch size of the example."""
        return next(int(x.shape[0]) for x in self.example if isinstance(x, Tensor) and x.dim())

    @property
    def fingerprint(self) -> str:
        """Hash of structure: names, shapes and types of tensors, and every operation with its arguments. Weights do not enter.

        A training program answers with the fingerprint of its evaluation program: plans belong to both.
        """
        if self.plan_fingerprint:
            return self.plan_fingerprint
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype};".encode())
        names = {node: self.names.get(name, name) for node, name in ((n, n.name) for n in self.graph.nodes)}
        names |= {node: self.origins[node.name].address for node in self.graph.nodes if node.name in self.origins}
        for node in self.graph.nodes:
            args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Name(names[n]))
            digest.update(f"{names[node]} {node.target if node.op == 'call_function' else node.op} {args!r};".encode())
        return digest.hexdigest()[:32]

    def weights_hash(self) -> str:
        """Hash of the values of all tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode())
            digest.update(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                if tensor.numel() and tensor.dim()
                else repr(tensor.tolist()).encode()
            )
        return digest.hexdigest()[:32]


def concrete(value: Any) -> Any:
    """A size that may be symbolic, as the integer it had in the example."""
    if isinstance(value, torch.SymInt):
        hint = value.node.hint
        return int(hint) if hint is not None else int(value)
    return value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The example shape of a node's tensor."""
    return tuple(concrete(s) for s in node.meta["val"].shape)
