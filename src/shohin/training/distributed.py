"""Many processes (torchrun, Accelerate): what they must agree on. In one process every function here does nothing.

Each function is a meeting: all processes must call it in the same order. Code that may fail in one process alone stands inside
`guarded`, or hands its error to `agree`, so that nobody waits for a process that has left.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shohin.errors import DataError

_BUCKET = 1 << 23  # numbers reduced at once: 32 MiB of float32


def world() -> int:
    """The number of processes that train together."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process, from 0."""
    return torch.distributed.get_rank() if world() > 1 else 0


def agree(error: Exception | None, flags: Sequence[float], device: torch.device) -> list[float]:
    """The sums of ``flags`` over all processes; if there is an error in any of them, all raise.

    Args:
        error: of this process, or None.
        flags: as many in every process.
        device: of the model; the process group must be able to reduce there.

    Raises:
        Exception: this process's own error.
        DataError: if another process failed; names it and what it said.
    """
    if world() == 1:
        if error is not None:
            raise error
        return list(flags)
    sums = torch.tensor([float(error is not None), *flags], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    failed, *rest = sums.tolist()
    if failed:
        said = gather(None if error is None else f"{type(error).__name__}: {error}", device)
        if error is not None:
            raise error
        first = next(i for i, text in enumerate(said) if text is not None)
        raise DataError(f"the training stops in all {world()} processes, since process {first} failed: {said[first]}")
    return rest


@contextmanager
def guarded(device: torch.device) -> Iterator[None]:
    """An error inside is raised by all processes at the end of the block. No meeting may take place inside."""
    if world() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(error, (), device)


def gather(value: Any, device: torch.device) -> list[Any]:
    """The JSON-able values of all processes, by rank."""
    if world() == 1:
        return [value]
    text = json.dumps(value).encode()
    size = torch.tensor([len(text)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(world())]
    torch.distributed.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    own = torch.zeros(longest, dtype=torch.uint8, device=device)
    own[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    all_ = [torch.zeros_like(own) for _ in range(world())]
    torch.distributed.all_gather(all_, own)
    return [json.loads(bytes(t[: int(s)].tolist())) for t, s in zip(all_, sizes, strict=True)]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Every process takes the tensors of process 0, in place."""
    if world() == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            dense = tensor.detach().contiguous()
            torch.distributed.broadcast(dense, src=0)
            if rank():
                tensor.detach().copy_(dense)


def sum_gradients(parameters: Mapping[str, nn.Parameter], held: Sequence[bool]) -> None:
    """Adds up the gradients of all processes, in place.

    Args:
        parameters: by name, in the same order in every process.
        held: for each, whether any process has a gradient; one without counts as zeros. Parameters that no process has a
            gradient for keep None, so that weight decay leaves them alone.
    """
    if world() == 1:
        return
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for p, used in zip(parameters.values(), held, strict=True):
        if not used:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        elif p.grad.layout != torch.strided:
            p.grad = p.grad.to_dense()
        bucket = buckets.setdefault(p.grad.dtype, [])
        bucket.append(p.grad)
        if sum(g.numel() for g in bucket) >= _BUCKET:
            _sum(buckets.pop(p.grad.dtype))
    for bucket in buckets.values():
        _sum(bucket)


def _sum(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def mean_of_losses(loss: float, terms: Mapping[str, float], device: torch.device) -> tuple[float, dict[str, float]]:
    """The mean over the processes; a term counts where it is told."""
    if world() == 1:
        return loss, dict(terms)
    told: list[tuple[float, dict[str, float]]] = gather([loss, dict(terms)], device)
    names = dict.fromkeys(name for _, own in told for name in own)
    means = {name: [own[name] for _, own in told if name in own] for name in names}
    return sum(value for value, _ in told) / len(told), {name: sum(values) / len(values) for name, values in means.items()}
