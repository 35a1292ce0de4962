"""Tiny transformers models: a class, a configuration of a few layers, and tensors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sweep.entry import Arguments, Entry, floats, integers
from sweep.torchvision_schemas import torchvision_models

VOCABULARY = 96


def made(architecture: str, config: dict[str, Any], overrides: dict[str, Any] | None = None) -> Callable[[], nn.Module]:
    """A builder of ``transformers.<architecture>`` with its own configuration class.

    Args:
        config: arguments of the configuration; nested ones as dictionaries.
        overrides: attributes set on the configuration afterwards.
    """

    def build() -> nn.Module:
        torchvision_models()  # transformers imports torchvision where it is installed
        import transformers

        transformers.utils.logging.set_verbosity_error()
        cls = getattr(transformers, architecture)
        configuration = cls.config_class(**config)
        for key, value in (overrides or {}).items():
            setattr(configuration, key, value)
        model: nn.Module = cls(configuration)
        return model

    return build


def tokens(
    length: int = 12, *, vocabulary: int = VOCABULARY, mask: bool = True, low: int = 4
) -> Callable[[int, torch.Generator], Arguments]:
    """``input_ids`` and ``attention_mask``."""

    def call(batch: int, generator: torch.Generator) -> Arguments:
        kwargs: dict[str, Any] = {"input_ids": integers(generator, vocabulary, batch, length, low=low)}
        if mask:
            kwargs["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
        return (), kwargs

    return call


def pixels(size: int = 32, channels: int = 3) -> Callable[[int, torch.Generator], Arguments]:
    """``pixel_values``."""

    def call(batch: int, generator: torch.Generator) -> Arguments:
        return (), {"pixel_values": floats(generator, batch, channels, size, size)}

    return call


def wave(length: int = 1600) -> Callable[[int, torch.Generator], Arguments]:
    """``input_values``."""

    def call(batch: int, generator: torch.Generator) -> Arguments:
        return (), {"input_values": floats(generator, batch, length)}

    return call


def named(**tensors: Callable[[int, torch.Generator], Any]) -> Callable[[int, torch.Generator], Arguments]:
    """Keyword arguments, each made on its own."""

    def call(batch: int, generator: torch.Generator) -> Arguments:
        return (), {name: make(batch, generator) for name, make in tensors.items()}

    return call


def hub(
    name: str,
    family: str,
    architecture: str,
    config: dict[str, Any],
    call: Callable[[int, torch.Generator], Arguments],
    overrides: dict[str, Any] | None = None,
) -> Entry:
    """An entry of the transformers list."""
    return Entry(f"transformers/{name}", family, made(architecture, config, overrides), call)
