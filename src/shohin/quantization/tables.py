"""Tables that embeddings look up, in 8 bits: each row has its own scale, so that a word's error does not depend on the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from shohin.evidence.layers import tensor_readers
from shohin.formats import INT8, Quantizer, Scheme
from shohin.program import Program, family

#: how a table is held, whatever few bits other weights have: fewer than 8 cost more than they save
TABLE = Scheme(INT8.weights)


def tables(program: Program) -> dict[str, str]:
    """Address of each embedding -> name of its table, where only embeddings look it up and it is float32."""
    readers = tensor_readers(program)
    first: dict[int, str] = {}
    for name, tensor in program.tensors.items():
        if name in program.trainable and tensor.dim() == 2 and tensor.dtype == torch.float32:
            first.setdefault(id(tensor), name)
    found = {}
    for key, name in first.items():
        users = readers.get(key, [])
        if users and all(user.op == "call_function" and family(user) == "embedding" and user.args[0] is node for user, node in users):
            found.update({program.origins[user.name].address: name for user, _ in users})
    return found


def quantize_tables(program: Program, addresses: Iterable[str]) -> tuple[Program, dict[str, Quantizer]]:
    """The program with these embeddings' tables on their grids, and the grids by tensor name."""
    known = tables(program)
    tensors, quantizers = dict(program.tensors), dict[str, Quantizer]()
    for name in sorted({known[address] for address in addresses}):
        table = program.tensors[name].detach()
        scale = (table.abs().amax(1).double() / TABLE.format.high).clamp_min(2.0**-60).float().double()
        q = quantizers[name] = Quantizer(TABLE.format, scale, torch.zeros(len(table), dtype=torch.int64), 0)
        snapped = q.fake(table)
        tensors |= {alias: snapped for alias, tensor in program.tensors.items() if tensor is program.tensors[name]}
    return replace(program, tensors=tensors), quantizers
