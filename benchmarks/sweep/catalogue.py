"""All entries by name."""

from __future__ import annotations

from functools import cache

from sweep.entry import Entry


@cache
def catalogue() -> dict[str, Entry]:
    """torchvision, then transformers. Raises ValueError if two entries have one name."""
    from sweep import language, perception, vision

    found: dict[str, Entry] = {}
    for entry in (*vision.entries(), *language.entries(), *perception.entries()):
        if entry.name in found:
            raise ValueError(f"two entries are named {entry.name}")
        found[entry.name] = entry
    return found
