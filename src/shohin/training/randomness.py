"""Random numbers of a training: a function of (seed, epoch), and the caller's own left as they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def mix(*parts: object) -> int:
    """A 63-bit seed from any values with a stable text form."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def generators_of(*loaders: Any) -> list[torch.Generator]:
    """The private generators of DataLoaders and their samplers."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        for part in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def seed_everything(seed: int, generators: list[torch.Generator], rank: int = 0) -> torch.Generator:
    """Seeds torch (all devices), NumPy, Python and the loaders' generators; returns a fresh CPU generator for the caller.

    The loaders' generators are the same in every process, since samplers that share out an order rely on it; the rest (dropout,
    augmentation) differs by ``rank``.
    """
    shared, seed = seed, mix(seed, "rank", rank) if rank else seed
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for i, generator in enumerate(generators):
        generator.manual_seed(mix(shared, i))
    return torch.Generator().manual_seed(mix(seed, "own"))


@contextmanager
def isolated(generators: list[torch.Generator]) -> Iterator[None]:
    """Puts every random state back on leaving."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    saved = (torch.get_rng_state(), np.random.get_state(), random.getstate(), torch.cuda.get_rng_state_all() if cuda else None)
    own = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        np.random.set_state(saved[1])
        random.setstate(saved[2])
        if saved[3] is not None:
            torch.cuda.set_rng_state_all(saved[3])
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)
